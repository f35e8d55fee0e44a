"""A stage of a stream: what a strategy may see of it, and what it may do about it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from trueline.continual.families import Kind, Row
from trueline.continual.tasks import TaskSettings
from trueline.train.keep.regularisers import Regulariser

Weights = Literal["stack", "one", "all", "apart"]
"""How weights go on: a fresh LoRA on the merged earlier ones; one LoRA; all weights; a fresh LoRA
on the untouched model."""


@dataclass(frozen=True)
class Stage:
    """What a strategy may see of the task being trained."""

    index: int
    total: int
    """Stages of the whole stream."""
    rows: Sequence[Row]
    """Encoded training rows of the stage."""
    earlier_rows: Sequence[Sequence[Row]]
    """Those of each earlier stage; only `replay` may read them."""
    folders: Sequence[Path]
    """Adapter folders of the earlier stages."""
    kind: Kind
    settings: TaskSettings
    batch_size: int
    seed: int

    def draw(self, n: int, rows: Sequence[Row] | None = None, key: str = "") -> list[Row]:
        """Return n rows by the stage's seed, all if there are fewer."""
        rows = self.rows if rows is None else rows
        places = random.Random(f"{self.seed} {key}").sample(range(len(rows)), min(n, len(rows)))
        return [rows[i] for i in sorted(places)]


@dataclass(frozen=True)
class Strategy:
    """The hooks of a strategy; this one trains one task after the other and does nothing else."""

    name: ClassVar[str] = ""
    weights: ClassVar[Weights] = "stack"
    joint: ClassVar[bool] = False
    """All tasks in one stage."""
    orthogonal_start: ClassVar[bool] = False

    def training_rows(self, stage: Stage) -> list[Row]:
        """Return the rows to train on; the number of steps is that of the stage's own rows."""
        return list(stage.rows)

    def before(self, model: Any, stage: Stage) -> None:
        """Change the model before it is trained."""

    def regularisers(self, stage: Stage) -> list[Regulariser]:
        """Return the terms that are added to the loss."""
        return []

    def after(self, model: Any, stage: Stage, folder: Path) -> None:
        """Write into the adapter's folder what later stages need; the same at every call."""
