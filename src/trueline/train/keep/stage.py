"""A stage of training as a way to keep what came before sees it, and what a way may do about it.

    stage = Stage(index, total, folders, rows, batches, seed)
    stack = AdapterStack.load(stage.folders)
    model = stack.attach(base, LoraConfig(...))
    keep.begin(model, stage)
    trainer = kept(SomeTrainer)(model, ..., train_dataset=keep.rows(stage),
                                stack=stack, terms=keep.terms(stage))
    trainer.train()
    save_adapter(model, folder)
    keep.end(model, stage, folder)

The trainer is any of the Trainer family. Everything that a later stage needs is in the folders of
the earlier adapters.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from trueline.train.adapters.stack import adapter_layers
from trueline.train.keep.second_moments import Moments, collect_moments
from trueline.train.keep.terms import Term

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, Any]
"""A row as the trainer takes it; what JSON can hold."""


@dataclass(frozen=True)
class Stage:
    """What a way may see of the stage being trained."""

    index: int
    """From 0."""
    total: int
    """Stages of the whole chain, as far as it is known."""
    folders: Sequence[Path]
    """Adapter folders of the earlier stages."""
    rows: Sequence[Row]
    """Training rows of the stage."""
    batches: Callable[[Any, int], Iterable[Mapping[str, Tensor]]]
    """(model, n) -> what the model's forward takes, of at most n rows of the stage, with `labels`:
    what statistics are taken over."""
    seed: int

    def draw(self, n: int, key: str = "") -> list[Row]:
        """Return n rows by the stage's seed and the key, in their order; all if there are fewer."""
        rng = random.Random(f"{self.seed} {key}")
        places = rng.sample(range(len(self.rows)), min(n, len(self.rows)))
        return [self.rows[i] for i in sorted(places)]

    def moments(self, model: Any, rows: int, **options: Any) -> dict[str, Moments]:
        """Return second moments of the adapted modules; `options` are of `collect_moments`."""
        return collect_moments(
            model,
            self.batches(model, rows),
            list(adapter_layers(model)),
            generator=torch.Generator(model.device).manual_seed(self.seed),
            **options,
        )


@dataclass(frozen=True)
class Keep:
    """The hooks of a way; this one keeps nothing: adapters are merely added up."""

    name: ClassVar[str] = "none"

    def rows(self, stage: Stage) -> list[Row]:
        """Return the rows to train on, as many as the stage's own."""
        return list(stage.rows)

    def begin(self, model: Any, stage: Stage) -> None:
        """Change the new adapter before it is trained."""

    def terms(self, stage: Stage) -> list[Term]:
        """Return what is added to the loss."""
        return []

    def end(self, model: Any, stage: Stage, folder: Path) -> None:
        """Write into the adapter's folder what later stages need; the same at every call."""
