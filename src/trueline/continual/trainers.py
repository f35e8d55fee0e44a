"""The trainer of a stage: the loss of its kind of model, the terms of its strategy."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trueline.continual.config import StreamConfig
from trueline.continual.families import Kind, Row
from trueline.continual.stages import Strategy, TaskStage
from trueline.continual.tasks import TaskSettings
from trueline.train.adapters.stack import AdapterStack
from trueline.train.keep import Keep
from trueline.train.keep.trainer import KeptTrainer


class TaskTrainer(Trainer):
    """The Trainer with the kind's own loss where it has one."""

    kind: Kind

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the kind's loss over a micro-batch, or the model's."""
        if "offered" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        fed = {k: v for k, v in inputs.items() if k not in ("offered", "labels")}
        outputs = model(**fed)
        loss = self.kind.loss(outputs.logits, inputs)
        return (loss, outputs) if return_outputs else loss


class AdapterTrainer(KeptTrainer, TaskTrainer):
    """The same for one adapter, with the strategy's terms."""


def make_trainer(
    model: Any,
    stack: AdapterStack,
    strategy: Strategy,
    keep: Keep,
    stage: TaskStage,
    rows: Sequence[Row],
    arguments: dict[str, Any],
) -> Any:
    """Return the trainer of a stage; `arguments` are those of `training_arguments`."""
    common: dict[str, Any] = {"train_dataset": rows, "data_collator": stage.kind.collate}
    if strategy.weights == "all":
        trainer: Any = TaskTrainer(model, TrainingArguments(**arguments), **common)
    else:
        trainer = AdapterTrainer(
            model,
            TrainingArguments(**arguments),
            stack=stack,
            terms=keep.terms(stage),
            **common,
        )
    trainer.kind = stage.kind
    if stage.kind.name != "causal":
        trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def training_arguments(
    config: StreamConfig, settings: TaskSettings, seed: int, steps: int, work: Path, *, on_cpu: bool
) -> dict[str, Any]:
    """Return transformers' arguments for so many optimiser steps; checkpoints go to `work`."""
    logging_steps = min(config.logging_steps, steps)
    return {
        "output_dir": str(work),
        "max_steps": steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": settings.learning_rate or config.learning_rate,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": config.bf16,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "seed": seed,
        "save_strategy": "steps",
        # A logged mean goes over the steps since the last row: none is cut by a checkpoint.
        "save_steps": -(-config.save_steps // logging_steps) * logging_steps,
        "save_total_limit": 1,
        "logging_steps": logging_steps,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


@contextlib.contextmanager
def fast_collection() -> Iterator[None]:
    """Keep what is there out of the garbage collection that each trainer ends with."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
