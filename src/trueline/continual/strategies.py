"""Strategies of a stream: what is trained at each task, on which rows, held back by what.

    o-lora      a LoRA a task on the frozen earlier ones, kept out of their directions
    inc-lora    the same without a penalty
    inf-lora    the same with a fixed reading matrix outside the earlier tasks' inputs
    drift       the same, held back by the change of outputs on the earlier tasks' inputs (ours)
    ewc         one LoRA throughout, each weight held by its diagonal Fisher information
    replay      one LoRA throughout, some rows of each earlier task among the new ones
    seq-lora    one LoRA throughout
    seq-ft      all weights that are not frozen, throughout
    per-task    a LoRA a task on the untouched model, chosen by task id at inference: a bound
    multi-task  one LoRA on all tasks at once: a bound

Papers: O-LoRA, `trueline.methods.o_lora`; InfLoRA, `trueline.methods.inf_lora`; drift,
`trueline.methods.drift`; EWC: Kirkpatrick et al., PNAS 2017, arXiv 1612.00796.

Every strategy makes the same number of optimiser steps on a task, so many as its own rows take; the
rows that `replay` adds take the place of new ones. Differs from the O-LoRA paper: its replay and
EWC train all weights of the model, here they train one LoRA, as seq-lora does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from trueline.continual.memories import DriftLora, Ewc, InfLora, Replay
from trueline.continual.stages import Stage, Strategy, Weights
from trueline.errors import ConfigError, check_number, suggestion
from trueline.methods.o_lora import Penalty, check_penalty
from trueline.train.keep.regularisers import Norm, Overlap, Regulariser


@dataclass(frozen=True)
class IncLora(Strategy):
    """A LoRA a task on the frozen earlier ones, no penalty."""

    name: ClassVar[str] = "inc-lora"


@dataclass(frozen=True)
class OLora(Strategy):
    """O-LoRA; `lambda_1` and `lambda_2` of a task's own settings go before those here."""

    name: ClassVar[str] = "o-lora"

    lambda_1: float = 0.5
    """Strength of the orthogonality penalty, at least 0."""
    lambda_2: float = 0.0
    """Strength of the norm penalty, at least 0."""
    penalty: Penalty = "abs"
    """"abs" (the code's) or "squared" (the paper's)."""
    normalize: bool = True
    """A penalty that does not grow with the model and the tasks; off, the released sums."""

    def __post_init__(self) -> None:
        check_number("lambda_1", self.lambda_1, low=0)
        check_number("lambda_2", self.lambda_2, low=0)
        check_penalty(self.penalty)

    def regularisers(self, stage: Stage) -> list[Regulariser]:
        """Return the overlap with earlier rows, and the norm."""
        own = stage.settings
        strength = self.lambda_1 if own.lambda_1 is None else own.lambda_1
        second = self.lambda_2 if own.lambda_2 is None else own.lambda_2
        terms: list[Any] = [
            Overlap(strength, self.penalty, self.normalize),
            Norm(second, self.normalize),
        ]
        return [term for term in terms if term.strength > 0]


@dataclass(frozen=True)
class SeqLora(Strategy):
    """One LoRA throughout."""

    name: ClassVar[str] = "seq-lora"
    weights: ClassVar[Weights] = "one"


@dataclass(frozen=True)
class SeqFT(Strategy):
    """All weights that the model came with unfrozen."""

    name: ClassVar[str] = "seq-ft"
    weights: ClassVar[Weights] = "all"


@dataclass(frozen=True)
class PerTask(Strategy):
    """A LoRA a task on the untouched model; scoring is told the task."""

    name: ClassVar[str] = "per-task"
    weights: ClassVar[Weights] = "apart"


@dataclass(frozen=True)
class MultiTask(Strategy):
    """One LoRA on all tasks at once."""

    name: ClassVar[str] = "multi-task"
    joint: ClassVar[bool] = True


STRATEGIES: dict[str, type[Strategy]] = {
    "o-lora": OLora,
    "inc-lora": IncLora,
    "inf-lora": InfLora,
    "drift": DriftLora,
    "ewc": Ewc,
    "replay": Replay,
    "seq-lora": SeqLora,
    "seq-ft": SeqFT,
    "per-task": PerTask,
    "multi-task": MultiTask,
}


def make_strategy(name: str, **options: Any) -> Strategy:
    """Return a strategy by name; `ConfigError` for an unknown name or option.

    >>> make_strategy("replay", buffer=64)
    Replay(buffer=64, share=0.5)
    """
    if name not in STRATEGIES:
        raise ConfigError(f'Unknown strategy "{name}".{suggestion(name, STRATEGIES)}')
    known = [f.name for f in fields(STRATEGIES[name])]
    for option in options:
        if option not in known:
            raise ConfigError(
                f'Strategy "{name}" has no option "{option}".{suggestion(option, known)}'
            )
    return STRATEGIES[name](**options)
