"""The decoding methods, one file per paper.

A new one is its file, its line here, its test and its row in the docs.

Reading this table loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trueline.errors import ConfigError, suggestion
from trueline.methods.ada_cd import AdaCD
from trueline.methods.blend import Blend
from trueline.methods.contrast import Contrast
from trueline.methods.linear_alignment import LinearAlignment
from trueline.methods.plain import Plain
from trueline.methods.self_cd import SelfCD
from trueline.types import Method

METHODS: dict[str, type[Any]] = {
    "plain": Plain,
    "linear-alignment": LinearAlignment,
    "self-cd": SelfCD,
    "ada-cd": AdaCD,
    "contrast": Contrast,
    "blend": Blend,
}


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Return the method called `name` with `options` as its fields.

    Raises `ConfigError` for a name or an option that does not exist, with the closest that does.

    >>> make_method("self-cd", {"alpha": 1.5})
    """
    if name not in METHODS:
        raise ConfigError(f'Unknown method "{name}".{suggestion(name, METHODS)}')
    options, fields = dict(options or {}), {f.name: f for f in dataclasses.fields(METHODS[name])}
    for option in options:
        if option not in fields:
            others = [m for m, cls in METHODS.items() if option in cls.__dataclass_fields__]
            hint = f" It belongs to {', '.join(others)}." if others else suggestion(option, fields)
            raise ConfigError(f'Method "{name}" has no option `{option}`.{hint}')
    missing = [
        f.name
        for f in fields.values()
        if f.default is dataclasses.MISSING and f.name not in options
    ]
    if missing:
        raise ConfigError(f'Method "{name}" needs `{missing[0]}`.')
    return METHODS[name](**options)
