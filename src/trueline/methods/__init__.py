"""The decoding methods, one file per paper, and how one is found, made and described.

A new one is its file, its line here, its test and its row in the docs. One in a file of your own
needs no line: `find_method("my_method.py:MyMethod")`, or `module:Class`.

Reading this table loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trueline.errors import ConfigError, check_kind, suggestion
from trueline.methods._custom import code_hash, load_class
from trueline.methods._ops import with_system as with_system
from trueline.methods.ada_cd import AdaCD
from trueline.methods.blend import Blend
from trueline.methods.contrast import Contrast
from trueline.methods.linear_alignment import LinearAlignment
from trueline.methods.plain import Plain
from trueline.methods.self_cd import SelfCD
from trueline.settings.options import REQUIRED, option_defaults
from trueline.types import Method, SamplingParams

METHODS: dict[str, type[Any]] = {
    "plain": Plain,
    "linear-alignment": LinearAlignment,
    "self-cd": SelfCD,
    "ada-cd": AdaCD,
    "contrast": Contrast,
    "blend": Blend,
}


def find_method(name: str) -> type[Any]:
    """Return the class of a method: a name in `METHODS`, or FILE.py:Class or module:Class.

    Raises `ConfigError` for a name that does not exist, with the closest that does, and for a class
    that is no method.
    """
    if not isinstance(name, str):
        raise ConfigError(f"A method's name must be text, got {name!r}.")
    if name in METHODS:
        return METHODS[name]
    if ":" in name:
        return load_class(name)
    raise ConfigError(f'Unknown method "{name}".{suggestion(name, METHODS)}')


def method_values(method: Method) -> dict[str, Any]:
    """Return the options of a method with their values, those that it keeps as attributes."""
    names = option_defaults(type(method))
    return {name: getattr(method, name) for name in names if hasattr(method, name)}


def describe_method(method: Method) -> dict[str, Any]:
    """Return what tells a method from another: name, options, for a class of your own its hash."""
    described = {"name": method.name, **method_values(method)}
    if type(method) not in METHODS.values():
        described["code"] = code_hash(type(method))
    return described


def with_options(method: Method, **options: Any) -> Method:
    """Return the method with other values of these options."""
    changed: Method = type(method)(**method_values(method) | options)
    return changed


def make_method(name: str | type[Any], options: Mapping[str, Any] | None = None) -> Method:
    """Return the method called `name`, or of that class, with `options` as its fields.

    Raises `ConfigError` for a name or an option that does not exist, with the closest that does.

    >>> make_method("self-cd", {"alpha": 1.5})
    """
    check_kind("options", options, (Mapping, type(None)), "a mapping from names to values")
    cls = name if isinstance(name, type) else find_method(name)
    name, options = name if isinstance(name, str) else cls.name, dict(options or {})
    known = option_defaults(cls)
    for option in options:
        if option not in known:
            others = [m for m, other in METHODS.items() if option in option_defaults(other)]
            hint = (
                f" It belongs to {', '.join(others)}." if others else suggestion(str(option), known)
            )
            raise ConfigError(f'Method "{name}" has no option `{option}`.{hint}')
    missing = [o for o, default in known.items() if default is REQUIRED and o not in options]
    if missing:
        raise ConfigError(f'Method "{name}" needs `{missing[0]}`.')
    try:
        made: Method = cls(**options)
    except TypeError as error:  # a class of the user's own that takes other values
        raise ConfigError(f'Method "{name}" cannot be made: {error}.') from error
    return made


def method_name(given: Mapping[str, Any], default: str = "plain") -> str:
    """Return which method `given` asks for; a principle alone means Linear Alignment."""
    name = given.get("method")
    if name is None:
        return "linear-alignment" if "principle" in given else default
    return str(name)


def split_options(
    given: Mapping[str, Any], default: str = "plain"
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return (name of the method, its options, those of the sampling): who owns which.

    An option that both have is the method's; one that neither has is left to the method, which
    refuses it by name.
    """
    name = method_name(given, default)
    own = option_defaults(find_method(name))
    sampling = {f.name for f in dataclasses.fields(SamplingParams)} - own.keys()
    rest = {k: v for k, v in given.items() if k != "method"}
    return (
        name,
        {k: v for k, v in rest.items() if k not in sampling},
        {k: v for k, v in rest.items() if k in sampling},
    )


def resolve(given: Mapping[str, Any], default: str = "plain") -> tuple[Method, SamplingParams]:
    """Return the method and the sampling that options by name describe, `method` among them.

    >>> resolve({"principle": "Be brief.", "ratio": 3, "temperature": 0.7})
    """
    name, options, sampling = split_options(given, default)
    if {"epsilon", "ratio"} <= options.keys():
        raise ConfigError("Give `ratio` or `epsilon`, not both: epsilon replaces ratio.")
    return make_method(name, options), SamplingParams(**sampling)
