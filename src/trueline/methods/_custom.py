"""Methods in files of the user's own: FILE.py:Class, or module:Class."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from trueline.errors import ConfigError, suggestion

NEEDED = ("name", "prompts", "combine")
FAILURES = (ImportError, OSError, ValueError, TypeError, NameError, AttributeError, LookupError,
            ArithmeticError, AssertionError, RuntimeError)  # fmt: skip
"""What running a file of the user's own can come to."""


def load_class(name: str) -> type[Any]:
    """Return the class at "FILE.py:Class" or "module:Class".

    A file is run once in a process. Raises `ConfigError` for a file, module or class that is not
    there, and for a class without `name`, `prompts` and `combine`.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ConfigError(f'A method of your own is FILE.py:Class or module:Class, got "{name}".')
    if place.endswith(".py"):
        module = _run_file(str(Path(place).expanduser().resolve()), place)
    else:
        module = _import(place)
    cls = getattr(module, attribute, None)
    if not isinstance(cls, type):
        classes = [k for k, v in vars(module).items() if isinstance(v, type)]
        raise ConfigError(f'"{place}" has no class "{attribute}".{suggestion(attribute, classes)}')
    if lacking := [part for part in NEEDED if not hasattr(cls, part)]:
        raise ConfigError(
            f'Class "{attribute}" of "{place}" is no decoding method: it lacks '
            f"{' and '.join(f'`{part}`' for part in lacking)}. See docs/methods.md."
        )
    return cls


def code_hash(cls: type[Any]) -> str:
    """Return the hash of the file that a class stands in; of its name where it has no file."""
    try:
        content = Path(inspect.getfile(cls)).read_bytes()
    except (OSError, TypeError):  # typed into a notebook or a prompt
        content = cls.__qualname__.encode()
    return hashlib.sha256(content).hexdigest()[:16]


@cache
def _run_file(path: str, shown: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"trueline_method_{code_name(path)}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ConfigError(f'No file "{shown}" with a method in it.')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names of annotations
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[spec.name]
        raise ConfigError(f"Cannot import {shown}:{error.lineno}: {error.msg}.") from None
    except FAILURES as error:
        del sys.modules[spec.name]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        place = f"{shown}:{lines[-1]}" if lines else shown
        raise ConfigError(f"Cannot import {place}: {error}.") from None
    return module


def code_name(path: str) -> str:
    """Return a name for the module of a file: its stem, and what tells it from others."""
    return f"{Path(path).stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _import(name: str) -> ModuleType:
    try:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ImportError("that is no module's name")
        return importlib.import_module(name)
    except (SyntaxError, *FAILURES) as error:
        raise ConfigError(
            f'Cannot import "{name}": {error}. For a file give FILE.py:Class.'
        ) from None
