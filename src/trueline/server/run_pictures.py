"""What runs left in a folder, read for the page to draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LARGEST = 16_000_000
"""Bytes of a run's file that the page takes."""
SHOWN = ("loss", "kl_to_teacher", "kl_to_reference", "reward", "entropy", "adherence")
"""Curves of a distillation that the page draws."""
LOG = "log.jsonl"
"""Of a training, a row a step."""
POINTS = 600
"""A curve of more steps is thinned to so many."""
NOT_A_RUN = (OSError, ValueError, KeyError, TypeError, AttributeError)


def found(home: Path) -> list[dict[str, Any]]:
    """Return what the runs under `home` left, by folder: points, curves, scores or a verdict.

    A run is a folder with results.json, or with log.jsonl while it is under way. What is none, too
    large, or a link out of the folder is left out.
    """
    runs = []
    for path in sorted(home.rglob("*.json*")):
        reader = READERS.get(path.name)
        inside = path.resolve().is_relative_to(home) and path.is_file()
        if reader is None or not inside or path.stat().st_size > LARGEST:
            continue
        try:
            content = reader(path.read_text(encoding="utf-8"))
        except NOT_A_RUN:
            continue
        kind, finished = _manifest(path.parent)
        if content is None or (path.name == LOG and kind not in (None, "distillation")):
            continue
        name = path.parent.relative_to(home).as_posix()
        own = {"name": home.name if name == "." else name, "finished": finished}
        runs.append({**own, **content})
    return runs


def _manifest(folder: Path) -> tuple[str | None, bool]:
    """Return what kind of run it is, and whether it has ended; without a manifest it has."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest["settings"].get("kind"), bool(manifest.get("finished", True))
    except NOT_A_RUN:
        return None, True


def _results(text: str) -> dict[str, Any] | None:
    """Return what a results.json is drawn from; None for what has no picture."""
    results: Mapping[str, Any] = json.loads(text)
    if "verdict" in results and "checks" in results:
        return _verdict(results)
    if "R" in results and "tasks" in results:
        return {"kind": "scores", "title": "Scores after each task", **_scores(results, "tasks")}
    return _points(results) if "points" in results else None


def _points(results: Mapping[str, Any]) -> dict[str, Any]:
    points: list[dict[str, Any]] = [
        {
            "label": str(point["label"]),
            "baseline": bool(point.get("baseline")),
            "measures": {
                str(name): {k: _number(m.get(k)) for k in ("value", "low", "high")}
                for name, m in point["measures"].items()
                if m.get("value") is not None
            },
        }
        | ({"dominated_by": point["dominated_by"]} if "dominated_by" in point else {})
        for point in results["points"]
    ]
    rates = {"over_refusal", "harmful_refusal"}
    both = bool(points) and all(rates <= set(point["measures"]) for point in points)
    return {
        "kind": "frontier" if both else "points",
        "title": str(results["title"]),
        "points": points,
        "recommended": (results.get("recommendation") or {}).get("label"),
        "frontier": results.get("frontier"),
    }


def _scores(content: Mapping[str, Any], names: str) -> dict[str, Any]:
    before, measures = content.get("untouched"), content.get("measures") or content
    return {
        "tasks": list(map(str, content[names])),
        "R": [[float(v) for v in row] for row in content["R"]],
        "untouched": None if before is None else [float(v) for v in before],
        "measures": {k: _number(measures[k]) for k in MEASURES if k in measures},
    }


MEASURES = ("average_accuracy", "backward_transfer", "forgetting", "forward_transfer")


def _verdict(results: Mapping[str, Any]) -> dict[str, Any]:
    wanted = ("principle", "says", "value", "low", "high", "at_least", "limit", "passed")
    table = results.get("R")
    return {
        "kind": "align",
        "title": str(results.get("title") or "Alignment"),
        "verdict": str(results["verdict"]),
        "reasons": list(map(str, results.get("reasons", ()))),
        "checks": [{k: check[k] for k in wanted} for check in results["checks"]],
        "R": None if not table else _scores(table, "names"),
    }


def _curves(text: str) -> dict[str, Any] | None:
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # a line that is being written
            continue
    curves = {}
    for name in SHOWN:
        points = [[row["step"], row[name]] for row in rows if _number(row.get(name)) is not None]
        if len(points) > 1:
            curves[name] = points[:: 1 + len(points) // POINTS]
    return {"kind": "curves", "title": "Distillation", "curves": curves} if curves else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


READERS: dict[str, Callable[[str], dict[str, Any] | None]] = {
    "results.json": _results,
    LOG: _curves,
}
"""What a run leaves, and how it is read."""
