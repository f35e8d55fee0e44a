"""The trainer of a stage: the loss of its family of model, the terms of its strategy."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trueline.train.keep.trainer import KeptTrainer
from trueline.train.progress import no_bars, quiet
from trueline.train.tasks.families import Family
from trueline.train.tasks.stream_config import StreamConfig
from trueline.train.tasks.task import TaskSettings


class TaskTrainer(Trainer):
    """The Trainer with the family's own loss where it has one."""

    def __init__(self, *args: Any, family: Family, **options: Any) -> None:
        super().__init__(*args, **options)
        self.data_collator: Any = family.collate
        self.family = family
        if family.name != "causal":
            self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the family's loss over a micro-batch, or the model's."""
        if "offered" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        fed = {k: v for k, v in inputs.items() if k not in ("offered", "labels")}
        outputs = model(**fed)
        loss = self.family.loss(outputs.logits, inputs)
        return (loss, outputs) if return_outputs else loss


class AdapterTrainer(KeptTrainer, TaskTrainer):
    """The same for one adapter, with the terms of a way to keep."""


def training_arguments(
    config: StreamConfig, settings: TaskSettings, seed: int, steps: int, work: Path, *, on_cpu: bool
) -> TrainingArguments:
    """Return transformers' arguments for so many optimiser steps; checkpoints go to `work`."""
    logging_steps = min(config.logging_steps, steps)
    return TrainingArguments(
        output_dir=str(work),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=settings.learning_rate or config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.bf16,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        seed=seed,
        save_strategy="steps",
        # A logged mean goes over the steps since the last row: none is cut by a checkpoint.
        save_steps=-(-config.save_steps // logging_steps) * logging_steps,
        save_total_limit=2,
        logging_steps=logging_steps,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )


@contextlib.contextmanager
def calm() -> Iterator[None]:
    """Train many short stages: libraries are quiet, and what is there is not collected each time.

    Each trainer ends with a garbage collection over all that is there.
    """
    with quiet(), no_bars():
        gc.collect()
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()
