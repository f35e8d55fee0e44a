"""Shapes: is a file of results what a measurement writes? Asked before anything reads it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Check = type | tuple[type, ...] | Mapping[str, Any] | list[Any] | Callable[[Any], bool]
"""Types; name -> check ("*" for every name, "name?" where it may be missing); [check of each]; a
function."""


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _maybe(value: Any) -> bool:
    return value is None or value in ("inf", "-inf") or _number(value)


def _share(value: Any) -> bool:
    return value is None or _number(value)


def _outcomes(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"[01?]*", value) is not None
    return isinstance(value, list) and all(v is None or _number(v) for v in value)


ESTIMATE = {"value": _share, "n": int, "low": _share, "high": _share}
CHOICE = {"*": lambda v: not isinstance(v, Mapping) or misfit(v, ESTIMATE) is None}
POINT = {
    "label": str,
    "baseline": bool,
    "measures": {"*": {**ESTIMATE, "outcomes": _outcomes}},
    "quality": {"length": {"value": _maybe}, "repetition": {"value": _maybe}, "perplexity": _maybe},
    "p_baseline?": {"*": _share},
    "dominated_by?": (str, type(None)),
}
BOUND = {"measure": str, "limit": _number, "at_least": bool, "of_baseline": bool}
RECOMMENDATION = {
    "label": str,
    "meets_floor": bool,
    "bounds": [BOUND],
    "chosen_on": CHOICE,
    "reported_on": CHOICE,
    "default_label": (str, type(None)),
}
AREA = {"value": _number, "n": int, "low": _number, "high": _number}
FRONTIER = {"texts": AREA, "all": AREA, "gain": {**AREA, "p_value": _number}}
EFFECT = {
    "text": str,
    "with_rates": [_number],
    "without_rates": [_number],
    "p_value": _share,
    "direction": int,
}
RESULTS = {
    "metric": str,
    "title?": str,
    "command": str,
    "settings": Mapping,
    "points?": [POINT],
    "numbers?": Mapping,
    "frontier?": lambda v: v is None or misfit(v, FRONTIER) is None,
    "effects?": [EFFECT],
    "recommendation?": lambda v: v is None or misfit(v, RECOMMENDATION) is None,
}


def results_misfit(results: Any) -> str | None:
    """Return what is odd in the results of a measurement, None where nothing is."""
    odd = misfit(results, RESULTS)
    if odd is None and not (results.get("points") or "numbers" in results):
        return "neither `points` nor `numbers`"
    if odd is None and not isinstance(results["settings"].get("data", {}), Mapping):
        return "`settings.data`"
    if odd is None and any(not p["measures"] for p in results.get("points", ())):
        return "`points` without measures"
    return odd or _odd_numbers(results.get("numbers", {})) or _odd_choice(results)


def misfit(value: Any, check: Any, name: str = "") -> str | None:
    """Return the name of the first part of a value that is not as the check has it."""
    shown = f"`{name}`" if name else "the whole"
    if isinstance(check, Mapping):
        if not isinstance(value, Mapping):
            return shown
        for key, inner in check.items():
            names = list(value) if key == "*" else [key.removesuffix("?")]
            for part in names:
                place = f"{name}.{part}" if name else str(part)
                if part not in value:
                    if not key.endswith("?"):
                        return f"`{place}` is missing"
                elif (odd := misfit(value[part], inner, place)) is not None:
                    return odd
        return None
    if isinstance(check, list):
        if not isinstance(value, list):
            return shown
        odd_ones = (misfit(v, check[0], f"{name}[{i}]") for i, v in enumerate(value))
        return next((odd for odd in odd_ones if odd is not None), None)
    if isinstance(check, (type, tuple)):
        return None if isinstance(value, check) else shown
    return None if check(value) else shown


def _odd_numbers(numbers: Mapping[str, Any]) -> str | None:
    loose = {"value": _maybe, "n": int, "low": _maybe, "high": _maybe}
    for name, value in numbers.items():
        if isinstance(value, Mapping) and "low" in value and misfit(value, loose):
            return f"`numbers.{name}`"
    return None


def _odd_choice(results: Mapping[str, Any]) -> str | None:
    """Return the half of a recommendation that lacks a measure of another one."""
    found = results.get("recommendation") or {}
    names = {k for k, v in found.get("chosen_on", {}).items() if isinstance(v, Mapping)}
    halves = ["reported_on"] + ["baseline_on"] * bool(found.get("baseline_on"))
    halves += ["default_on"] * (found.get("default_label") is not None)
    for half in halves:
        own = found.get(half, {}) if found else dict.fromkeys(names)
        if not isinstance(own, Mapping) or any(misfit(own.get(n), ESTIMATE) for n in names):
            return f"`recommendation.{half}`"
    tests = [found.get(f"p_{name}") for name in names]
    return "`recommendation`" if not all(map(_share, tests)) else None
