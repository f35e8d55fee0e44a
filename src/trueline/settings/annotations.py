"""Does a value fit a type annotation? Values of TOML files and of the command line, converted."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union


class Word(str):
    """A value typed on the command line, whose type only the field it goes to can tell."""

    @property
    def parsed(self) -> Any:
        """The value read as TOML, or the text itself where it is none."""
        try:
            found = tomllib.loads(f"v = {self}")
        except tomllib.TOMLDecodeError:
            return str(self)
        return found["v"] if set(found) == {"v"} else str(self)


class Mismatch(ValueError):
    """A value that a field's type does not take."""


def table_of(kind: Any) -> type | None:
    """Return the dataclass that a field holds, if it holds one that can be filled from a table."""
    for member in _members(kind):
        if dataclasses.is_dataclass(member) and isinstance(member, type):
            root = (member.__module__ or "").split(".")[0]
            return None if root in ("accelerate", "transformers", "peft") else member
    return None


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if _is_union(kind) else (kind,)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


def convert(value: Any, kind: Any, *, has_default: bool = True) -> Any:
    """Return the value as the annotation has it; `has_default` is whether the default is a value.

    The word "none" is None where None is allowed and either text is not, or the default is
    something else: so every setting can be written into a file that has no null.
    """
    if _is_union(kind):
        return _convert_union(value, typing.get_args(kind), has_default)
    if kind is Any:
        return value.parsed if isinstance(value, Word) else value
    origin = typing.get_origin(kind)
    if isinstance(value, Word) and kind is not str and kind is not Path and origin is not Literal:
        value = value.parsed
    if kind is type(None):
        return _accept(value, value is None)
    if origin is Literal:
        parsed = value.parsed if isinstance(value, Word) else value
        for one in typing.get_args(kind):
            if any(type(v) is type(one) and v == one for v in (parsed, _text(value))):
                return one
        raise Mismatch
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _accept(value, value in [e.value for e in kind] or isinstance(value, kind))
    if kind is bool:
        return _accept(value, isinstance(value, bool))
    if kind in (int, float):
        whole = isinstance(value, float) and value.is_integer()
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return kind(_accept(value, number and (kind is float or isinstance(value, int) or whole)))
    if kind in (str, Path):
        return kind(_accept(value, isinstance(value, str)))
    if (origin or kind) in (list, tuple, Sequence):
        inner = typing.get_args(kind) or (Any,)
        items = _accept(value, isinstance(value, (list, tuple)))
        if origin is tuple and Ellipsis not in inner:
            return tuple(map(convert, _accept(items, len(items) == len(inner)), inner))
        return (tuple if origin is tuple else list)(convert(v, inner[0]) for v in items)
    if (origin or kind) in (dict, Mapping):
        inner = typing.get_args(kind)[1:] or (Any,)
        table = _accept(value, isinstance(value, Mapping))
        return {str(k): convert(v, inner[0]) for k, v in table.items()}
    raise Mismatch


def _convert_union(value: Any, members: tuple[Any, ...], has_default: bool) -> Any:
    texts = str in members
    enums = [m for m in members if isinstance(m, type) and issubclass(m, Enum)]
    none = value is None or (_text(value) == "none" and (has_default or not texts))
    if none and type(None) in members:
        return None
    if enums and isinstance(value, str):  # "SchedulerType | str": any other text is a mistake
        return convert(_text(value), enums[0])
    for member in sorted(members, key=lambda m: m is str):  # "5" for `int | str` is a number
        try:
            return convert(value, member)
        except Mismatch:
            continue
    raise Mismatch


def _accept(value: Any, fits: bool) -> Any:
    if not fits:
        raise Mismatch
    return value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value


def describe(kind: Any) -> str:
    """Return an annotation in words: "a number or none"."""
    if _is_union(kind):
        parts = list(dict.fromkeys(describe(m) for m in _union_shown(typing.get_args(kind))))
        return " or ".join(parts)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(json.dumps(a) for a in typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(json.dumps(e.value) for e in kind)
    if table_of(kind) is not None:
        return "a table"
    named = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    named |= {Path: "a path", type(None): "none", list: "a list", tuple: "a list", dict: "a table"}
    name = named.get(typing.get_origin(kind) or kind)
    return name or f"{getattr(kind, '__name__', kind)}, which no file can hold"


def _union_shown(members: tuple[Any, ...]) -> list[Any]:
    has_enum = any(isinstance(m, type) and issubclass(m, Enum) for m in members)
    return [m for m in members if not (has_enum and m is str)]
