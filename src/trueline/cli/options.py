"""Options that several commands share: the model, the method, the sampling.

Those of methods and sampling are generated from their classes (`trueline.settings.options`); which
of the two an option belongs to is decided by `trueline.methods.resolve` alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError
from trueline.methods import METHODS, find_method, resolve
from trueline.models.source import ModelConfig
from trueline.settings.options import Option, options_of
from trueline.types import Method, SamplingParams

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

METAVAR = {float: "X", int: "N", str: "TEXT"}
NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)=(.+)")
"""An adapter with a name."""
PATHS = {"adapter": "DIR", "chat_template": "FILE"}
"""Settings of a model that are places; others that are text are names."""
LONGEST = 40
"""Characters of a default that --help shows."""


def add_model_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add an option for each setting of a model; `several` takes more than one adapter."""
    group = parser.add_argument_group("model")
    for option in options_of(ModelConfig):
        if option.name == "adapters":
            continue
        if option.name == "engine_options":
            group.add_argument("--engine-option", metavar="NAME=VALUE", action="append", default=[],
                help="an option of vLLM, by its own name; repeatable (none)")  # fmt: skip
            continue
        if several and option.name == "adapter":
            text = f"{option.doc}; a named one is a model of its own; repeatable"
            _add(group, option, metavar="[NAME=]DIR", action="append", default=[], help=text)
            continue
        named = dataclasses.replace(option, name=_place(option))
        doc = option.doc.replace("%", "%%")
        shown = {None: "none", False: "off", True: "on"}.get(option.default, option.default)
        typed = _typed(option, {})
        if typed.get("metavar") == METAVAR[str]:
            typed["metavar"] = PATHS.get(option.name, "NAME")
        _add(group, named, help=f"{doc} ({shown})", default=option.default, **typed)


def model_config(args: argparse.Namespace) -> ModelConfig:
    """Return the model that the options name."""
    apart = ("adapters", "engine_options")
    found = {
        o.name: getattr(args, _place(o)) for o in options_of(ModelConfig) if o.name not in apart
    }
    found["engine_options"] = dict(map(_engine_option, args.engine_option))
    if isinstance(args.adapter, list):
        found |= _adapters(args.adapter)
    return ModelConfig(**found)


def _place(option: Option) -> str:
    return "model" if option.name == "name" else option.name


def _adapters(given: Sequence[str]) -> dict[str, Any]:
    """Return `adapter` and `adapters` for what `[NAME=]DIR` says, once or several times."""
    found: dict[str, str] = {}
    for text in given:
        named = NAMED.fullmatch(text)
        name, source = named.groups() if named else ("", text)
        if name in found:
            which = f'The adapter name "{name}" is' if name else "An adapter without a name is"
            raise ConfigError(f"{which} given twice. Give each a name of its own: NAME=DIR.")
        found[name] = source
    return {"adapter": found.pop("", None), "adapters": found}


def _engine_option(text: str) -> tuple[str, Any]:
    """Return the name and the value of NAME=VALUE, a value as JSON reads it, else as text."""
    name, equals, value = text.partition("=")
    if not (equals and name.strip()):
        raise ConfigError(f'`--engine-option` takes NAME=VALUE, got "{text}".')
    try:
        return name.strip().replace("-", "_"), json.loads(value)
    except ValueError:
        return name.strip().replace("-", "_"), value


def add_system_option(parser: Any) -> None:
    """Add `--system`."""
    parser.add_argument("--system", metavar="TEXT", help='your own system message; "" is an empty '
        "one, with which templates leave out their own (none)")  # fmt: skip


def check_system(text: str | None) -> None:
    """Raise `ConfigError` for a system message of white space."""
    if text and not text.strip():
        raise ConfigError('`--system` is only white space. Give it some text, or "" for none.')


def load(args: argparse.Namespace) -> LanguageModel:
    """Load the model that the options name, and set the number of threads."""
    return model_config(args).load()


def add_method_options(
    parser: argparse.ArgumentParser,
    numbers: Mapping[type, Callable[[str], Any]] | None = None,
    *,
    repeated: bool = False,
) -> None:
    """Add `--method` and one option for each field of each method, from the methods themselves.

    Where a method of the user's own is asked for, its options are added instead. `numbers` reads
    what is typed for a float or an int in another way, e.g. as a range; with `repeated` an option
    that takes a text may be given several times, and its value is a list.
    """
    group = parser.add_argument_group("method (see `trueline methods`)")
    text = f"{', '.join(METHODS)}, or one of your own: FILE.py:Class or module:Class (plain, or"
    group.add_argument("--method", metavar="NAME", help=f"{text} linear-alignment for a principle)")
    for name, users in method_options(typed_method(getattr(parser, "words", ()))).items():
        first = next(iter(users.values()))
        text = f"{first.doc.split('. ')[0]} [{', '.join(map(_user, users, users.values()))}]"
        _add(group, first, help=text.replace("%", "%%"), dest=f"method_{name}",
             default=argparse.SUPPRESS, **_typed(first, numbers or {}, repeated))  # fmt: skip


def typed_method(words: Sequence[str]) -> str | None:
    """Return what stands behind `--method`, where it is a class of the user's own."""
    joined = [word.removeprefix("--method=") for word in words if word.startswith("--method=")]
    apart = [name for word, name in itertools.pairwise(words) if word == "--method"]
    return next((name for name in [*apart, *joined] if ":" in name), None)


def method_options(own: str | None = None) -> dict[str, dict[str, Option]]:
    """Return option -> {method that has it: what it is there}, of all methods, or of `own`."""
    found: dict[str, dict[str, Option]] = {}
    for method, cls in {own: find_method(own)}.items() if own else METHODS.items():
        for option in options_of(cls):
            found.setdefault(option.name, {})[method] = option
    return found


def _user(method: str, option: Option) -> str:
    """Return a method's name with the option's default there."""
    if option.required:
        return f"{method}: required"
    if option.default is None or option.default is False:
        return f"{method}: none" if option.default is None else f"{method}: off"
    shown = f"{option.default:g}" if isinstance(option.default, float) else str(option.default)
    return f"{method}: {shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + '…'}"


def base_kind(kind: Any) -> Any:
    """Return an annotation without None: float for `float | None`; tuple for any tuple or list."""
    members = [m for m in typing.get_args(kind) if m is not type(None)]
    if type(None) in typing.get_args(kind) and members:
        kind = members[0]
    origin = typing.get_origin(kind) or kind
    return tuple if origin in (list, tuple) else origin


def _typed(
    option: Option, numbers: Mapping[type, Callable[[str], Any]], repeated: bool = False
) -> dict[str, Any]:
    """Return how argparse reads an option."""
    kind = base_kind(option.kind)
    if kind is bool:
        on = option.default is True
        return {"action": argparse.BooleanOptionalAction if on else "store_true"}
    if kind is tuple:
        pairs = "tuple[str, float]" in str(option.kind)
        return {"nargs": "+", "metavar": "WEIGHT:TEXT" if pairs else "TEXT"}
    if kind is typing.Literal:
        return {"choices": _words(option.kind)}
    if kind in numbers:
        return {"type": numbers[kind], "metavar": "X|A:B:STEP|A,B"}
    often = {"action": "append"} if repeated and kind is str else {}
    return often | {"type": kind if kind in METAVAR else str, "metavar": METAVAR.get(kind, "TEXT")}


def _words(kind: Any) -> tuple[str, ...]:
    """Return the words of `Literal["4bit", "8bit"] | None`."""
    inner = [m for m in typing.get_args(kind) if m is not type(None)]
    found: tuple[str, ...] = typing.get_args(inner[0]) or tuple(inner)
    return found


def _add(group: Any, option: Option, **extra: Any) -> None:
    group.add_argument("--" + option.name.replace("_", "-"), **extra)


def parse_weighted(text: str) -> tuple[str, float]:
    """Return ("Be brief.", 1.5) for "1.5:Be brief."."""
    weight, colon, principle = text.partition(":")
    try:
        if colon and principle.strip():
            return principle.lstrip(), float(weight)
    except ValueError:
        pass
    raise ConfigError(f'`principles` takes WEIGHT:TEXT, e.g. "1.5:Be brief.", got "{text}".')


def add_sampling_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the options that choose tokens and stop, `defaults` other than those of the class."""
    group = parser.add_argument_group("sampling")
    known = parser._option_string_actions
    for option in options_of(SamplingParams):
        default, kind = defaults.get(option.name, option.default), base_kind(option.kind)
        if f"--{option.name.replace('_', '-')}" in known:  # a method has it
            continue
        if kind is tuple:
            text = "end the text here; repeatable (none)"
            _add(group, option, action="append", default=[], metavar="TEXT", help=text)
        elif kind is bool:
            _add(group, option, action="store_true", help=option.doc)
        else:
            text = f"{option.doc} (default {default:g})"
            _add(group, option, type=kind, default=default, metavar=METAVAR[kind], help=text)
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the first row (0)")


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the method and the sampling by name, `method` among them."""
    found = {k.removeprefix("method_"): v for k, v in vars(args).items() if k.startswith("method_")}
    if "principles" in found:
        found["principles"] = tuple(map(parse_weighted, found["principles"]))
    names = [f.name for f in dataclasses.fields(SamplingParams)]
    found |= {name: getattr(args, name) for name in names if hasattr(args, name)}
    return found | ({"method": args.method} if args.method is not None else {})


def method_and_sampling(
    args: argparse.Namespace, default: str = "plain"
) -> tuple[Method, SamplingParams]:
    """Return the method and the sampling that the options describe."""
    return resolve(given(args), default)
