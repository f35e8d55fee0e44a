"""A stage of a stream, and what a strategy is: how weights go on, and a way to keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trueline.continual.families import Kind
from trueline.train.keep import Keep
from trueline.train.keep.stage import Stage

Weights = Literal["stack", "one", "joint", "all", "apart"]
"""How weights go on: a fresh LoRA on the merged earlier ones; one LoRA; one on all tasks at once;
all weights; a fresh LoRA on the untouched model."""


@dataclass(frozen=True)
class TaskStage(Stage):
    """What a strategy may see of the task being trained."""

    kind: Kind


@dataclass(frozen=True)
class Strategy:
    """How a stream is trained."""

    name: str
    keep: Keep = field(default_factory=Keep)
    weights: Weights = "stack"
