"""Settings from TOML files and the command line into config dataclasses, misspelt names refused.

    layers = [check(read_toml("run.toml"), classes, "run.toml"), check(options, classes, "...")]
    values = merge(*layers)                      the later layer wins
    config = build(InverseQConfig, values)       the fields that this class has
    write_toml(resolved(values, classes))        all that repeats it, to be given back as a file

One flat file may hold the fields of several classes; a field that is itself a dataclass is a table.
Values are checked against the annotations. Reading and checking load nothing heavy.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from trueline.errors import ConfigError, DataError, suggestion
from trueline.records.lines import BOM, read_input, shown
from trueline.settings.annotations import Mismatch, Word, convert, describe, table_of
from trueline.settings.options import field_docs

C = TypeVar("C")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the settings in a TOML file; `DataError` with path:line where it is none."""
    try:
        text = read_input(path).removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start + 1}.") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)", str(error))
        reason = str(error)[: place.start()] if place else str(error)
        line = place[1] if place and place[1] else len(text.splitlines())
        column = f" at column {place[2]}" if place and place[2] else ""
        raise DataError(f"{path}:{line}: broken TOML{column}: {reason}.") from None


def assignments(pairs: Iterable[str]) -> dict[str, Any]:
    """Return {"lora": {"rank": Word("8")}} for ["lora.rank=8"]: values of `--set`."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        path = [part.strip().replace("-", "_") for part in name.split(".")]
        if not equals or not all(path):
            raise ConfigError(f'`--set` takes NAME=VALUE, e.g. learning_rate=1e-4, got "{pair}".')
        place = found
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f'`--set {pair}`: "{part}" has a value of its own already.')
        place[path[-1]] = Word(value.strip())
    return found


def check(values: Mapping[str, Any], classes: Sequence[type], source: str) -> dict[str, Any]:
    """Return the values with the types that the fields of the classes ask for.

    Raises `ConfigError`, naming `source`, for a name that no class has, with the closest that one
    has, and for a value of another type.
    """
    return _check(values, classes, source, "")


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layers as one, the later winning; tables are merged key by key."""
    whole: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            old = whole.get(name)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            whole[name] = merge(old, value) if both else value  # type: ignore[arg-type]
    return whole


def build(cls: type[C], values: Mapping[str, Any]) -> C:
    """Return the dataclass made of those values that are its fields.

    A `ValueError` of its own checks becomes a `ConfigError`; a field that is missing is named.
    """
    given: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        if f.name in values:
            value, table = values[f.name], table_of(hints[f.name])
            made = table is not None and isinstance(value, Mapping)
            given[f.name] = build(table, value) if made and table is not None else value
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"`{f.name}` is missing. Give it in the file or on the command line.")
    try:
        return cls(**given)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from None


def resolved(values: Mapping[str, Any], classes: Sequence[type]) -> dict[str, Any]:
    """Return the values with the defaults of the fields that the classes' own packages declare.

    What a class inherits from another package (hundreds of names in a trainer's arguments) is
    there only where it was given: its defaults belong to that package's version.
    """
    whole: dict[str, Any] = {}
    for cls in classes:
        hints = typing.get_type_hints(cls)
        own = _own(cls)
        for f in fields(cls):
            table = table_of(hints[f.name])
            if f.name in values:
                value = values[f.name]
                nested = table is not None and isinstance(value, Mapping)
                whole[f.name] = resolved(value, [table]) if nested and table else value
            elif f.name in own:
                whole[f.name] = as_values(_default(f))
            if whole.get(f.name, 0) is None and f.default is not None:
                whole[f.name] = "none"
    return whole


def as_values(value: Any) -> Any:
    """Return a value as what TOML and JSON can hold: dataclasses as tables, enums as values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_values(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): as_values(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_values(v) for v in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def fields(cls: type) -> list[dataclasses.Field[Any]]:
    """Return the fields of a dataclass that can be given."""
    return [f for f in dataclasses.fields(cls) if f.init]


def explain(classes: Sequence[type]) -> list[tuple[str, str, str]]:
    """Return (name, default, what it is) of every setting, tables with dots."""
    rows = []
    for cls in classes:
        hints, docs = typing.get_type_hints(cls), field_docs(cls)
        for f in fields(cls):
            if (table := table_of(hints[f.name])) is not None:
                rows += [(f"{f.name}.{name}", d, text) for name, d, text in explain([table])]
                continue
            text = " ".join(str(docs.get(f.name) or f.metadata.get("help") or "").split())
            rows.append((f.name, json.dumps(as_values(_default(f)), default=str), text))
    return rows


def write_toml(values: Mapping[str, Any]) -> str:
    """Return settings as TOML; what is None is left out, since TOML has no such value."""
    return tomli_w.dumps(_without_none(as_values(values)))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value if v is not None]
    return value


# Fields


def _check(
    values: Mapping[str, Any], classes: Sequence[type], source: str, prefix: str
) -> dict[str, Any]:
    known = {f.name: (f, hint) for cls in classes for f, hint in _typed(cls)}
    checked: dict[str, Any] = {}
    for given, value in values.items():
        name, full = given.replace("-", "_"), f"{prefix}{given}"
        if name not in known:
            hint = suggestion(name, known) if len(known) <= 30 else _closest(name, known)
            raise ConfigError(f'Unknown setting "{full}" ({source}).{hint}')
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"`{full}` holds a NUL character ({source}). Leave it out.")
        field, kind = known[name]
        if (table := table_of(kind)) is not None and isinstance(value, Mapping):
            checked[name] = _check(value, [table], source, f"{full}.")
            continue
        try:
            checked[name] = convert(value, kind, has_default=field.default is not None)
        except Mismatch:
            got = shown(as_values(value)) if _plain(value) else repr(value)
            raise ConfigError(f"`{full}` must be {describe(kind)}, got {got} ({source}).") from None
    return checked


def _typed(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(f, hints[f.name]) for f in fields(cls)]


def _closest(name: str, known: Iterable[str]) -> str:
    hint = suggestion(name, known)
    return hint if "Did you mean" in hint else " --list-settings shows all."


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, list, tuple, Mapping, Enum, type(None)))


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default; None where it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _own(cls: type) -> set[str]:
    """Return the names of fields that the class's own package declares."""
    root = cls.__module__.split(".")[0]
    return {
        name
        for c in cls.__mro__
        if c.__module__.split(".")[0] == root
        for name in vars(c).get("__annotations__", {})
    }
