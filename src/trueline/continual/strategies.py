"""Strategies of a stream: what is trained at each task, on which rows, held back by what.

    inc-lora    a LoRA a task on the frozen earlier ones, no penalty
    o-lora      the same, kept out of their directions
    inf-lora    the same with a fixed reading matrix outside the earlier tasks' inputs
    drift       the same, held back by the change of outputs on the earlier tasks' inputs (ours)
    ella        the same, held back where earlier ones changed the weights
    ewc         one LoRA throughout, each weight held by its diagonal Fisher information
    replay      one LoRA throughout, some rows of each earlier task among the new ones
    seq-lora    one LoRA throughout
    seq-ft      all weights that are not frozen, throughout
    per-task    a LoRA a task on the untouched model, chosen by task id at inference: a bound
    multi-task  one LoRA on all tasks at once: a bound

Every strategy makes the same number of optimiser steps on a task, so many as its own rows take; the
rows that `replay` adds take the place of new ones. Differs from the O-LoRA paper: its replay and
EWC train all weights of the model, here they train one LoRA, as seq-lora does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trueline.continual.ewc import Ewc
from trueline.continual.weights import AllWeights, Apart, Joint, OneLora
from trueline.errors import ConfigError, suggestion
from trueline.train.keep import KEEP, Keep, check_options
from trueline.train.tasks.stacked import Stacked


@dataclass(frozen=True)
class Strategy:
    """How a stream is trained."""

    name: str
    keep: Keep
    weights: type[Stacked]
    """How weights go on from task to task."""


STRATEGIES: dict[str, tuple[type[Keep], type[Stacked]]] = {
    "o-lora": (KEEP["o-lora"], Stacked),
    "inc-lora": (Keep, Stacked),
    "inf-lora": (KEEP["inf-lora"], Stacked),
    "drift": (KEEP["drift"], Stacked),
    "ella": (KEEP["ella"], Stacked),
    "ewc": (Ewc, OneLora),
    "replay": (KEEP["replay"], OneLora),
    "seq-lora": (Keep, OneLora),
    "seq-ft": (Keep, AllWeights),
    "per-task": (Keep, Apart),
    "multi-task": (Keep, Joint),
}
"""The way to keep of each strategy, and how its weights go on."""


def make_strategy(name: str, **options: Any) -> Strategy:
    """Return a strategy by name; `ConfigError` for an unknown name or option.

    >>> make_strategy("replay", buffer=64).keep
    Replay(buffer=64, share=0.5)
    """
    if name not in STRATEGIES:
        raise ConfigError(f'Unknown strategy "{name}".{suggestion(name, STRATEGIES)}')
    way, weights = STRATEGIES[name]
    check_options(f'Strategy "{name}"', way, options)
    return Strategy(name, way(**options), weights)
