"""How weights go on in the strategies that O-LoRA and its like are compared with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from trueline.train.adapters.stack import AdapterStack
from trueline.train.chain import Link
from trueline.train.keep.terms import Term
from trueline.train.tasks.families import Row
from trueline.train.tasks.stacked import Stacked, load_adapter
from trueline.train.tasks.task_trainer import TaskTrainer


class OneLora(Stacked):
    """One LoRA, going on from the stage before."""

    def adapters(self, folders: Sequence[Path]) -> tuple[Path, ...]:
        """Return the last one."""
        return super().adapters(folders[-1:])

    def start(self, link: Link, rank: int) -> tuple[Any, AdapterStack]:
        """Return the model with the adapter of the stage before."""
        model, stack = super().start(link, self.config.rank)
        if link.earlier:
            load_adapter(model, link.earlier[-1] / self.file)
        return model, stack

    def again(self, link: Link, rank: int) -> Any:
        """Return the model with this stage's adapter."""
        return super().again(link, self.config.rank)

    def merged(self, link: Link) -> list[Path]:
        """Return none."""
        return []


class Apart(Stacked):
    """A fresh LoRA on the untouched model; scoring is told the task."""

    def measured(self, link: Link, last: int, tasks: int) -> Sequence[int]:
        """Return the task of the stage alone."""
        return [link.index]

    def carried(self, link: Link, tasks: int) -> Sequence[int]:
        """Return all others: each has a model of its own, and its score is known."""
        return [j for j in range(tasks) if j != link.index]

    def adapters(self, folders: Sequence[Path]) -> tuple[Path, ...]:
        """Return none: they make up no one model."""
        return ()

    def merged(self, link: Link) -> list[Path]:
        """Return none."""
        return []


class Joint(Stacked):
    """One LoRA on all tasks at once."""

    def groups(self, tasks: int) -> list[list[int]]:
        """Return one stage."""
        return [list(range(tasks))]


class AllWeights(Stacked):
    """All weights that the model came with unfrozen, going on from the stage before."""

    file = "weights.pt"

    def adapters(self, folders: Sequence[Path]) -> tuple[Path, ...]:
        """Return none."""
        return ()

    def start(self, link: Link, rank: int) -> tuple[Any, AdapterStack]:
        """Return the model with the weights of the stage before."""
        return self._loaded(link.earlier[-1] if link.earlier else None), AdapterStack()

    def again(self, link: Link, rank: int) -> Any:
        """Return the model with this stage's weights."""
        return self._loaded(link.folder)

    def trainer(
        self, model: Any, stack: AdapterStack, terms: list[Term], rows: Sequence[Row],
        arguments: TrainingArguments, **options: Any,
    ) -> Any:  # fmt: skip
        """Return a trainer without terms."""
        return TaskTrainer(model, arguments, train_dataset=rows, **options)

    def save(self, model: Any, link: Link) -> None:
        """Write the state of the model."""
        part = link.folder / f"{self.file}.part"
        torch.save(model.state_dict(), part)
        os.replace(part, link.folder / self.file)

    def drop(self, link: Link) -> None:
        """Remove the weights of the stage before."""
        if link.earlier:
            (link.earlier[-1] / self.file).unlink(missing_ok=True)

    def _loaded(self, folder: Path | None) -> Any:
        model = self.fresh()
        if folder is not None:
            model.load_state_dict(torch.load(folder / self.file, weights_only=True))
        return model
