"""Train a stage's adapter with terms that keep earlier stages, on transformers' own Trainer.

    stack = AdapterStack.load(["run/task1"])
    model = stack.attach(base, LoraConfig(r=8, lora_alpha=32, target_modules=["q", "v"]))
    trainer = KeptTrainer(model, TrainingArguments("run/work"), train_dataset=rows, stack=stack,
                          terms=[Overlap(0.5)], processing_class=tokenizer)
    trainer.train()
    save_adapter(trainer.model, "run/task2")

Causal language models, T5 and classifiers. Other trainers take the same terms through
`trueline.train.keep.penalty.kept`.
"""

from __future__ import annotations

from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trueline.train.keep.penalty import PenaltyMixin


class KeptTrainer(PenaltyMixin, Trainer):
    """Takes the Trainer's arguments and those of `PenaltyMixin`.

    Without `data_collator` rows of `input_ids` and `labels` are padded with the
    `processing_class`, labels with -100.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        *,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if data_collator is None and processing_class is not None:
            data_collator = _collator(model, processing_class)
        super().__init__(model, args, data_collator, processing_class=processing_class, **kwargs)
        # Only losses of causal language models divide by `num_items_in_batch`. T5 and classifiers
        # take the argument and drop it, and gradient accumulation would multiply their loss.
        if type(_base(model)).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            self.model_accepts_loss_kwargs = False


def _collator(model: Any, tokenizer: Any) -> Any:
    if type(_base(model)).__name__.endswith("ForSequenceClassification"):
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, model=model)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
