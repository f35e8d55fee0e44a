"""What a class can be given: its options with kind, default and docs, for the surfaces to offer.

They are the fields of a dataclass, or the parameters of `__init__` of any other class. The docs are
the docstring under each field, read from the source.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
import typing
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

REQUIRED = inspect.Parameter.empty
"""The default of an option that has none."""


@dataclass(frozen=True)
class Option:
    """One thing that can be given."""

    name: str
    kind: Any
    """Its annotation; without one, the type of its default, or text."""
    default: Any
    doc: str
    """One paragraph without its last full stop; may be empty."""

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is REQUIRED


def option_defaults(cls: type[Any]) -> dict[str, Any]:
    """Return option -> default, `REQUIRED` where there is none; reads no source."""
    kind: Any = cls
    return dict(_defaults(kind))


@functools.lru_cache(maxsize=256)
def _defaults(cls: Any) -> dict[str, Any]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in found if p.kind in named}


def options_of(cls: type[Any]) -> list[Option]:
    """Return the options of a class in their order."""
    hints = typing.get_type_hints(cls)
    if cls.__init__ is not object.__init__:
        hints = typing.get_type_hints(cls.__init__) | hints
    docs = field_docs(cls)
    return [
        Option(name, hints.get(name, _kind(default)), default, docs.get(name, "").rstrip("."))
        for name, default in option_defaults(cls).items()
    ]


@dataclass(frozen=True)
class Range:
    """What a number may be; a bound that is not given is infinite."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    whole: bool = False


def ranges_of(cls: type[Any]) -> dict[str, Range]:
    """Return field -> its range, as `check_number` holds it in the source of `__post_init__`."""
    names = [field.name for field in dataclasses.fields(Range)]
    found: dict[str, Range] = {}
    for c in reversed(cls.__mro__[:-1]):
        own: Any = vars(c).get("__post_init__")
        for call in [] if own is None else ast.walk(_tree(own)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "check_number":
                bounds = {
                    str(k.arg): eval(ast.unparse(k.value), own.__globals__)
                    for k in call.keywords
                    if k.arg in names
                }
                if isinstance(call.args[0], ast.Constant):
                    found[str(call.args[0].value)] = Range(**bounds)
    return found


def _tree(source: Any) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(source)))


def _kind(default: Any) -> Any:
    return str if default is REQUIRED or default is None else type(default)


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a class and of what it inherits, on one line."""
    return dict(_field_docs(cls))


@functools.cache
def _field_docs(cls: Hashable) -> dict[str, str]:
    assert isinstance(cls, type)
    docs: dict[str, str] = {}
    for c in reversed(cls.__mro__[:-1]):
        try:
            tree = _tree(c).body[0]
        except (OSError, TypeError):  # a class with no source file
            continue
        assert isinstance(tree, ast.ClassDef)
        for node, after in zip(tree.body, tree.body[1:], strict=False):
            named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if named and said:
                docs[node.target.id] = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
    return docs
