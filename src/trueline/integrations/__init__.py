"""Decoding methods inside other people's evaluation harnesses.

Each module needs its harness: `pip install 'trueline[lm-eval]'` or `'trueline[inspect]'`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from trueline.errors import ConfigError, suggestion
from trueline.methods import METHODS, make_method
from trueline.types import Method


def split_options(options: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """Return the method that flat options describe, and the options left for `load_model`.

    Values may be the strings of a command line. A principle with no `method` means Linear
    Alignment.

    Raises:
        ConfigError: An option belongs to neither, or does not convert.

    >>> split_options({"principle": "Be brief.", "ratio": "3", "dtype": "float32"})
    """
    from trueline.models.load import load_model

    loading = set(inspect.signature(load_model).parameters) - {"name", "raw"}
    given = dict(options)
    name = given.pop("method", None) or ("linear-alignment" if "principle" in given else "plain")
    known = {f.name for cls in METHODS.values() for f in dataclasses.fields(cls)}
    for option in given:
        if option == "raw":
            raise ConfigError(
                "Leave `raw` out: here the harness decides whether there is a chat template."
            )
        if option not in known | loading:
            hint = suggestion(option, ["pretrained", "method", *sorted(loading | known)])
            raise ConfigError(f"Unknown option `{option}`.{hint}")
    if {"epsilon", "ratio"} <= given.keys():
        raise ConfigError("Give `ratio` or `epsilon`, not both.")
    load = {key: given.pop(key) for key in list(given) if key in loading}
    fields = METHODS[name].__dataclass_fields__ if name in METHODS else {}
    converted = {
        key: convert(key, value, str(fields[key].type)) if key in fields else value
        for key, value in given.items()
    }
    return make_method(name, converted), load


def convert(name: str, value: Any, kind: str) -> Any:
    """Return a command line's value as the type that a field is annotated with.

    Raises `ConfigError` for a string that is no such number. Numbers given for a text become text.
    """
    kind, optional = kind.split(" |")[0], "None" in kind
    if optional and (value is None or value == "None"):
        return None
    if kind == "str":
        return str(value)
    if kind == "bool":
        if str(value).lower() not in ("true", "false"):
            raise ConfigError(f"`{name}` must be true or false, got {value!r}.")
        return str(value).lower() == "true"
    if kind in ("float", "int") and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"`{name}` must be a number, got {value!r}.") from None
        return int(number) if kind == "int" and number.is_integer() else number
    return value
