"""Train a task's adapter with terms that keep earlier tasks, on any trainer of the Trainer family.

    stack = AdapterStack.load(["run/task1"])
    model = stack.attach(base, LoraConfig(r=8, lora_alpha=32, target_modules=["q", "v"]))
    trainer = OLoraTrainer(model, OLoraConfig("run/work"), train_dataset=rows, stack=stack,
                           processing_class=tokenizer)
    trainer.train()
    save_adapter(trainer.model, "run/task2")

`OLoraTrainer` is transformers' Trainer: causal language models, T5 and classifiers. Other trainers
take the same terms through `trueline.train.keep.penalty`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trueline.errors import check_number
from trueline.methods.o_lora import check_penalty
from trueline.train.keep.penalty import PenaltyMixin
from trueline.train.keep.regularisers import Norm, Overlap, Regulariser


@dataclass
class OLoraConfig(TrainingArguments):
    """Settings of `OLoraTrainer`: its own, and all of transformers' arguments."""

    output_dir: str | None = field(
        default="o-lora", metadata={"help": "Where checkpoints and the trained model go."}
    )
    lambda_1: float = field(
        default=0.5, metadata={"help": "Strength of the orthogonality penalty, at least 0."}
    )
    lambda_2: float = field(
        default=0.0, metadata={"help": "Strength of the norm penalty, at least 0."}
    )
    penalty: str = field(
        default="abs",
        metadata={"help": "Overlap by absolute values (abs, the code's) or squares (squared)."},
    )
    normalize: bool = field(
        default=True,
        metadata={
            "help": "Penalties that do not grow with width, rank, modules and tasks; off, the "
            "released code's sums."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lambda_1", self.lambda_1, low=0)
        check_number("lambda_2", self.lambda_2, low=0)
        check_penalty(self.penalty)

    def regularisers(self) -> list[Regulariser]:
        """Return the terms that these settings ask for; none where both strengths are 0."""
        penalty: Any = self.penalty
        terms: list[Any] = [
            Overlap(self.lambda_1, penalty, self.normalize),
            Norm(self.lambda_2, self.normalize),
        ]
        return [term for term in terms if term.strength > 0]


class OLoraTrainer(PenaltyMixin, Trainer):
    """O-LoRA on transformers' Trainer: causal language models, T5, sequence classifiers.

    Takes the Trainer's arguments and those of `PenaltyMixin`. Without `regularisers` the terms are
    those of the `OLoraConfig`; without `data_collator` rows of `input_ids` and `labels` are padded
    with the `processing_class`, labels with -100.
    """

    def __init__(
        self,
        model: Any,
        args: OLoraConfig | None = None,
        data_collator: Any = None,
        *,
        regularisers: Sequence[Regulariser] | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        args = OLoraConfig() if args is None else args
        if data_collator is None and processing_class is not None:
            data_collator = _collator(model, processing_class)
        super().__init__(
            model,
            args,
            data_collator,
            regularisers=args.regularisers() if regularisers is None else regularisers,
            processing_class=processing_class,
            **kwargs,
        )
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
