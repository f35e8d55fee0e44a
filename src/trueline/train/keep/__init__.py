"""Ways to keep what came before, one file each, under any trainer of the Trainer family.

none        nothing: adapters are merely added up
o-lora      out of the directions that earlier adapters read
inf-lora    a fixed reading matrix outside of the earlier stages' inputs
drift       little change of outputs on the earlier stages' inputs (ours)
ella        away from the weights that earlier adapters changed
replay      rows of earlier stages among the new ones
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from trueline.errors import ConfigError, suggestion
from trueline.train.keep.drift import DriftKeep
from trueline.train.keep.ella import Ella
from trueline.train.keep.inf_lora import InfLora
from trueline.train.keep.o_lora import OLora
from trueline.train.keep.penalty import kept
from trueline.train.keep.replay import Replay
from trueline.train.keep.stage import Keep, Stage

__all__ = ["KEEP", "Keep", "Stage", "check_options", "find_keep", "kept", "make_keep"]

KEEP: dict[str, type[Keep]] = {
    way.name: way for way in (Keep, OLora, InfLora, DriftKeep, Ella, Replay)
}


def make_keep(name: str, **options: Any) -> Keep:
    """Return a way by its name; `ConfigError` for an unknown name or option.

    >>> make_keep("replay", buffer=64)
    Replay(buffer=64, share=0.5)
    """
    way = find_keep(name)
    check_options(f'"{name}"', way, options)
    return way(**options)


def find_keep(name: str) -> type[Keep]:
    """Return the class of a way by its name."""
    if name not in KEEP:
        raise ConfigError(f'Unknown way to keep "{name}".{suggestion(name, KEEP)}')
    return KEEP[name]


def check_options(who: str, way: type[Keep], options: Iterable[str]) -> None:
    """Raise `ConfigError` for an option that the way has not."""
    known = [f.name for f in fields(way)]
    for option in options:
        if option not in known:
            raise ConfigError(f'{who} has no option "{option}".{suggestion(option, known)}')
