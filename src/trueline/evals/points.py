"""Points: the settings of a sweep, each a method and a sampling, checked before any compute."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trueline.errors import ConfigError, suggestion
from trueline.methods import (
    METHODS,
    describe_method,
    find_method,
    make_method,
    method_values,
    with_system,
)
from trueline.records.style import shortened
from trueline.settings.options import option_defaults, options_of
from trueline.settings.ranges import parse_values
from trueline.types import Message, Method, SamplingParams

Grid = Mapping[str, Sequence[Any]]
"""Name of a number or a text -> its values; "system" is the chat's system text."""
SYSTEM = "system"
HELPFUL = "You are a helpful assistant."
"""The system text that anybody would try first."""
SHOWN = 28
"""Characters of a text in a label."""


@dataclass(frozen=True)
class Way:
    """A method with some of its options: what the points of a sweep share."""

    method: str
    """Its name."""
    options: Mapping[str, Any] = field(default_factory=dict)
    cls: type[Any] | None = None
    """The method's class, where its name is none of ours."""

    @classmethod
    def of(cls, method: Method | type[Method] | str, options: Mapping[str, Any]) -> Way:
        """Return the way of a method: made, as a class, or by name."""
        if isinstance(method, str):
            find_method(method)
            return cls(method, options)
        made = not isinstance(method, type)
        kind: type[Any] = method if isinstance(method, type) else type(method)
        name = getattr(kind, "name", None)
        if not isinstance(name, str) or not hasattr(kind, "combine"):
            raise ConfigError(f"`method` must be a decoding method or its name, got {method!r}.")
        if made and options:
            raise ConfigError("Give `options` with a method's name; a made method has its own.")
        defaults = option_defaults(kind)
        values = method_values(method) if made else options  # type: ignore[arg-type]
        given = {k: v for k, v in values.items() if not made or v != defaults[k]}
        return cls(name, given, None if METHODS.get(name) is kind else kind)

    @property
    def kind(self) -> type[Any]:
        """The method's class."""
        return self.cls or find_method(self.method)

    @property
    def defaults(self) -> dict[str, Any]:
        """Name -> default of all its options."""
        return option_defaults(self.kind)

    @property
    def goal(self) -> str:
        """What the method is for: the metric that it is measured by if no other is named."""
        return str(getattr(self.kind, "goal", "adherence"))


@dataclass(frozen=True)
class Point:
    """One setting of a sweep."""

    label: str
    way: Way
    sampling: SamplingParams
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the sweep varies, and its values here."""
    baseline: bool = False
    """Whether it is there for comparison: no setting of the method."""
    system: str | None = None
    """System text in place of the chat's own; None keeps that, "" is none."""
    added: str | None = None
    """Text that is added to the chat's system text."""

    @property
    def method(self) -> str:
        """The method's name."""
        return self.way.method

    @property
    def fields(self) -> Mapping[str, Any]:
        """The options that the method is given."""
        return self.way.options

    def make(self, principle: str | None = None) -> Method:
        """Return the method, with this principle in place of its own; a baseline takes none."""
        fields = dict(self.fields)
        if principle is not None and not self.baseline and "principle" in self.way.defaults:
            fields["principle"] = principle
        if self.way.cls is None:
            return make_method(self.method, fields)
        made: Method = self.way.cls(**fields)
        return made

    def placed(self, chat: Sequence[Message]) -> list[Message]:
        """Return the chat with the point's system text."""
        messages = list(chat)
        if self.system is not None:
            rest = messages[messages[0]["role"] == "system" :]
            messages = [{"role": "system", "content": self.system}, *rest]
        return with_system(messages, self.added)

    def describe(self) -> dict[str, Any]:
        """Return what decides its responses, beside model and prompts."""
        sampling = dataclasses.asdict(self.sampling)
        sampling["stop"] = list(self.sampling.stop)
        about = {"method": self.method, "fields": dict(self.fields), "sampling": sampling}
        texts = {"system": self.system, "added": self.added}
        about |= {name: text for name, text in texts.items() if text is not None}
        code = describe_method(self.make("?")).get("code")
        return about | ({"code": code} if code else {})


def baseline_point(sampling: SamplingParams) -> Point:
    """Return the plain model, to compare with."""
    return Point("plain", Way("plain"), sampling, baseline=True)


def parse_grid(words: Sequence[str], method: str) -> dict[str, tuple[float | int, ...]]:
    """Return name -> values for words like "ratio=0,1,2"; names are the method's or of sampling."""
    grid: dict[str, tuple[float | int, ...]] = {}
    kinds = _numbers(Way.of(method, {}))
    for word in words:
        name, sign, values = word.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not sign:
            raise ConfigError(f'`--grid` takes NAME=VALUES, e.g. ratio=0,1,2, got "{word}".')
        _check_number_name(name, method, kinds)
        if name in grid:
            raise ConfigError(f"`--grid` names `{name}` twice. Give all its values at once.")
        grid[name] = parse_values(values, whole=kinds[name] == "int")
    return grid


def grid_points(
    way: Way, grid: Grid, sampling: SamplingParams, *, principle: str | None = None
) -> list[Point]:
    """Return a point for every combination; all are checked before any compute.

    Args:
        way: The method, and the options that all points share.
        grid: Name -> values, of the method or of the sampling.
        sampling: What all points share.
        principle: Stands in for one that every prompt will bring.
    """
    own = way.defaults
    if {"epsilon", "ratio"} <= {*way.options, *grid}:
        raise ConfigError("Give `--ratio` or `--epsilon`, not both.")
    points = []
    named = {name: names_of(values) for name, values in grid.items()}
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        rest = {k: v for k, v in settings.items() if k not in own and hasattr(sampling, k)}
        system = settings.get(SYSTEM) if SYSTEM not in own else None
        fields = {k: v for k, v in settings.items() if k in own or k not in {SYSTEM, *rest}}
        label = ", ".join(f"{k}={named[k][v]}" for k, v in settings.items()) or way.method
        its = dataclasses.replace(way, options={**way.options, **fields})
        point = Point(label, its, dataclasses.replace(sampling, **rest), settings, system=system)
        point.make(principle)
        points.append(point)
    return points


def names_of(values: Sequence[Any]) -> dict[Any, str]:
    """Return value -> what labels call it: a number as it is, a text quoted and cut."""
    named: dict[Any, str] = {}
    for value in values:
        text = value if isinstance(value, str) else f"{value:g}"
        name = quoted(text) if isinstance(value, str) else text
        same = sum(quoted(v) == name for v in named if isinstance(v, str))
        named.setdefault(value, f"{name} ({same + 1})" if same else name)
    return named


def quoted(text: str) -> str:
    """Return a text as labels show it: on one line, in quotes, cut."""
    return f'"{shortened(" ".join(text.split()), SHOWN)}"'


def text_points(points: Sequence[Point], default: str | None) -> list[Point]:
    """Return the system texts that a user would try before any contrast, each as a baseline.

    They are none, the helpful one, the template's default, each text of the methods' own alone, and
    each of their branches: what the contrast is made of.

    Args:
        points: Of the sweep; baselines among them add nothing.
        default: The text that the model's template puts in, if there is one.
    """
    sampling = points[-1].sampling
    found = {"no system text": Point("", Way("plain"), sampling, system="")}
    found["helpful text"] = dataclasses.replace(found["no system text"], system=HELPFUL)
    if default is not None:
        found["default text"] = dataclasses.replace(found["no system text"], system=default)
    own = [p for p in points if not p.baseline]
    texts = names_of(list(dict.fromkeys(text for p in own for text in method_texts(p))))
    systems = names_of([s for s in dict.fromkeys(p.system for p in own) if s is not None])
    plain = found["no system text"]
    for text, name in texts.items():
        found[f"{name} alone"] = dataclasses.replace(plain, system=text)
    for text, name in systems.items():
        found[f"{name} as system text"] = dataclasses.replace(plain, system=text)
    for p in own:
        for text in method_texts(p):
            behind = f" behind {systems[p.system]}" if p.system is not None else " added"
            its = dataclasses.replace(plain, system=p.system, added=text)
            found[texts[text] + behind] = its
    return [dataclasses.replace(p, label=label, baseline=True) for label, p in found.items()]


def method_texts(point: Point) -> list[str]:
    """Return the system texts of a point's method in the order of its branches, each once."""
    chat: list[Message] = [{"role": "user", "content": "?"}]
    heads = [branch[0] for branch in point.make().prompts(chat)]
    return list(dict.fromkeys(m["content"] for m in heads if m["role"] == "system"))


def default_label(points: Sequence[Point]) -> str | None:
    """Return the label of the point that has the method's own defaults, if there is one."""
    for point in points:
        defaults = point.way.defaults
        standard = {k: defaults[k] for k in point.settings if k in defaults}
        if not point.baseline and standard and standard == dict(point.settings):
            return point.label
    return None


def check_grid(grid: Grid, way: Way) -> None:
    """Raise `ConfigError` for a grid of what are no numbers of the method or the sampling.

    Texts of the method, and "system", take texts.
    """
    kinds = _numbers(way)
    texts = {SYSTEM, *(o.name for o in options_of(way.kind) if _is_text(o.kind))}
    for name, values in grid.items():
        if name not in texts:
            _check_number_name(name, way.method, kinds)
        if isinstance(values, str) or not values:
            raise ConfigError(f"`grid` takes a list of values for `{name}`, got {values!r}.")
        for value in values:
            if name in texts:
                if not isinstance(value, str) or (value and not value.strip()):
                    raise ConfigError(f"`grid` takes texts for `{name}`, got {value!r}.")
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"`grid` takes numbers for `{name}`, got {value!r}.")


def _numbers(way: Way) -> dict[str, str]:
    """Return name -> "int" or "float" of the numbers that a grid may vary."""
    kinds = {o.name: o.kind for o in (*options_of(SamplingParams), *options_of(way.kind))}
    found = {}
    for name, kind in kinds.items():
        members = {kind, *typing.get_args(kind)}
        if name != "n" and members & {int, float}:
            found[name] = "float" if float in members else "int"
    return found


def _is_text(kind: Any) -> bool:
    return str in {kind, *typing.get_args(kind)}


def _check_number_name(name: str, method: str, kinds: Mapping[str, str]) -> None:
    if name not in kinds:
        raise ConfigError(f'Method "{method}" has no number `{name}`.{suggestion(name, kinds)}')
