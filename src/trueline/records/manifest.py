"""Whose output is this? What decides a run, kept beside what it wrote, and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trueline.errors import ConfigError, DataError
from trueline.records.disk import replace_file
from trueline.records.lines import plain, shown

WAY_OUT = "Give another --output, or --overwrite."
TABLES, LISTS = ("settings", "facts"), ("sessions", "files")
"""What a manifest may hold, by type."""


def as_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a run as it comes back from JSON."""
    kept: dict[str, Any] = json.loads(json.dumps(plain(settings)))
    return kept


def read_manifest(path: Path, way_out: str = WAY_OUT) -> dict[str, Any] | None:
    """Return what a run keeps of itself, None where there is nothing.

    Raises `ConfigError` where it cannot be read, or is not what a run writes.
    """
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(kept, dict) and isinstance(kept.get("settings"), dict)
        whole = whole and all(isinstance(kept.get(name, {}), dict) for name in TABLES)
        whole = whole and all(isinstance(kept.get(name, []), list) for name in LISTS)
        whole = whole and all(isinstance(name, str) for name in kept.get("files", []))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise ConfigError(f'Cannot read "{path}", the settings of a run. {way_out}')
    return kept


def check_same(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise `ConfigError` with what differs between the settings of `what` and these."""
    if changed := different(old, new):
        changes = "; ".join(f"{name} was {a}, now {b}" for name, a, b in changed[:6])
        raise ConfigError(f"{what} belongs to another run: {changes}. {WAY_OUT}")


def different(old: Any, new: Any, name: str = "") -> list[tuple[str, str, str]]:
    """Return (name, old, new) of everything in which two settings differ, names with dots."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        dotted = [(k, f"{name}.{k}" if name else str(k)) for k in keys]
        return [d for k, full in dotted for d in different(old.get(k), new.get(k), full)]
    return [] if old == new else [(name, shown(old), shown(new))]


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that at every moment the old or the new file is there, whole."""
    replace_file(path, json.dumps(plain(content), ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return what `write_json` wrote; `DataError` where it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}. Give --overwrite.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not what a run writes. Give --overwrite.")
    return content
