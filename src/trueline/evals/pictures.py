"""Figures of runs: the refusal frontier, and a measure over a grid. Need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trueline.evals.frontier import hull
from trueline.evals.points import quoted
from trueline.records.style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    SOFT,
    VIOLET,
    drawable,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LONGEST, MOST = 30, 2
"""Characters of a label in the frontier, and how many share a place."""
COLOURS = (BLUE, ORANGE, GREEN, VIOLET, SOFT)


def draw_frontier(
    points: Sequence[Mapping[str, Any]], title: str, recommended: str | None, floor: float
) -> Figure:
    """Return over-refusal against harmful refusal, a mark for each point, 95 % intervals.

    Up and to the left is better. Squares are system texts alone, hollow marks are dominated, the
    dashed line is the frontier of the texts. Points at one place share a label.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 6), layout="constrained")
    axes = figure.subplots()
    _lines(axes, points)
    _text_frontier(axes, points)
    places: dict[tuple[float, float], list[str]] = {}
    for point in points:
        x, y = (point["measures"][n] for n in ("over_refusal", "harmful_refusal"))
        if x["value"] is None or y["value"] is None:
            continue
        colour = SOFT if point["baseline"] else COLOURS[0]
        at = (100 * x["value"], 100 * y["value"])
        axes.hlines(at[1], 100 * x["low"], 100 * x["high"], color=colour, alpha=0.25)
        axes.vlines(at[0], 100 * y["low"], 100 * y["high"], color=colour, alpha=0.25)
        inside = "none" if point.get("dominated_by") else colour
        axes.plot(*at, "s" if point["baseline"] else "o", color=colour, markersize=6,
                  markerfacecolor=inside)  # fmt: skip
        if point["label"] == recommended:
            axes.plot(*at, "o", markersize=15, markerfacecolor="none", color=COLOURS[1],
                      markeredgewidth=2, label="recommended")  # fmt: skip
        places.setdefault((round(at[0], 1), round(at[1], 1)), []).append(_short(point))
    bounds = [
        p["measures"][n]
        for p in points
        for n in ("over_refusal", "harmful_refusal")
        if p["measures"][n]["value"] is not None
    ]
    xs, ys = bounds[::2], bounds[1::2]
    right = max([20.0, *(100 * e["high"] for e in xs)]) + 6
    bottom = min([100 * floor, *(100 * e["low"] for e in ys)])
    margin = 0.5 + 0.06 * (100 - bottom)
    bottom, top = bottom - margin, 100 + margin
    _label(axes, places, right + 3, top - bottom)
    axes.axhline(100 * floor, color=COLOURS[1], linewidth=1, linestyle=":", label="floor")
    axes.set(xlim=(-3, right), ylim=(bottom, top))
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= 100])
    axes.set_xlabel("over-refusal: safe prompts refused, % (low is good)")
    axes.set_ylabel("harmful prompts refused, % (high is good)")
    axes.grid(color=FAINT, linewidth=0.8)
    axes.legend(frameon=False, loc="lower right")
    varied = ", ".join(dict.fromkeys(name for p in points for name in p["settings"]))
    axes.set_title(shortened(drawable(title), 62), pad=24)
    note = f"labels: {varied}; 95 % intervals" if varied else "95 % intervals"
    axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=9, color=SOFT)
    return figure


def _label(
    axes: Axes, places: Mapping[tuple[float, float], Sequence[str]], width: float, height: float
) -> None:
    """Write the labels right of their points, moved down where they would cover another."""
    taken: list[tuple[float, float, float]] = []
    line = 0.034 * height
    for at, names in sorted(places.items(), key=lambda place: (-place[0][1], place[0][0])):
        more = f" +{len(names) - MOST}" if len(names) > MOST else ""
        text = ", ".join(shortened(name, LONGEST) for name in names[:MOST]) + more
        left, y = at[0] + 0.025 * width, at[1] + 0.6 * line
        right = left + 0.0145 * width * len(text)
        while any(left < r and lo < right and abs(y - other) < line for lo, r, other in taken):
            y -= 0.25 * line
        taken.append((left, right, y))
        axes.annotate(text, at, xytext=(left, y), fontsize=9, va="center",
                      arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.8})  # fmt: skip


def draw_grid(points: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Return each measure and the perplexity over the first varied setting, a line a combination.

    Baselines are dashed lines.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for p in points for name in p["measures"]))
    figure = Figure(figsize=(4.6 * (len(names) + 1), 4.4), layout="constrained")
    panels = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    first = next((n for p in points for n in p["settings"]), "")
    for axes, name in zip(panels, [*names, "perplexity"], strict=True):
        for i, (rest, line) in enumerate(_series(points).items()):
            rows = [(p["settings"].get(first, 0), _value(p, name)) for p in line]
            kept = [(x, v) for x, v in rows if v is not None]
            xs, ys = [x for x, _ in kept], [v[0] for _, v in kept]
            colour = COLOURS[i % len(COLOURS)]
            axes.fill_between(xs, [v[1] for _, v in kept], [v[2] for _, v in kept], color=colour,
                              alpha=0.12, linewidth=0)  # fmt: skip
            axes.plot(xs, ys, marker="o", markersize=5, color=colour, label=rest or None)
        for point in points:
            if point["baseline"] and (v := _value(point, name)) is not None:
                axes.axhline(v[0], color=SOFT, linestyle="--", linewidth=1, label=point["label"])
        axes.set(xlabel=first, title=name.replace("_", " "))
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        if name != "perplexity":
            axes.set_ylim(-0.03, 1.06)
    handles, labels = panels[0].get_legend_handles_labels()
    if labels:
        panels[0].legend(handles, labels, frameon=False, fontsize=8)
    figure.suptitle(shortened(drawable(title), 80), x=0.01, ha="left", weight="bold")
    return figure


def draw_confusion(counts: Sequence[Sequence[int]], rows: Sequence[str], columns: Sequence[str],
                   title: str) -> Figure:  # fmt: skip
    """Return a table of counts as a picture: people in rows, the judge in columns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4), layout="constrained")
    axes = figure.subplots()
    top = max(1, *(n for row in counts for n in row))
    axes.imshow(counts, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    for i, row in enumerate(counts):
        for j, n in enumerate(row):
            colour = "white" if n > top / 2 else INK
            axes.text(j, i, str(n), ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="the judge says", ylabel="people say", title=title)
    return figure


def _series(points: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the points of each combination of all varied settings but the first."""
    series: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        if not point["baseline"]:
            rest = ", ".join(
                f"{k}={quoted(v) if isinstance(v, str) else format(v, 'g')}"
                for k, v in list(point["settings"].items())[1:]
            )
            series.setdefault(rest, []).append(point)
    return series


def _lines(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    for i, line in enumerate(_series(points).values()):
        pairs = [[p["measures"][n]["value"] for n in ("over_refusal", "harmful_refusal")]
                 for p in line]  # fmt: skip
        kept = [(100 * x, 100 * y) for x, y in pairs if x is not None and y is not None]
        axes.plot([x for x, _ in kept], [y for _, y in kept], color=COLOURS[i % len(COLOURS)],
                  linewidth=1.5, alpha=0.5)  # fmt: skip


def _text_frontier(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """Draw what can be had of the system texts alone."""
    rates = [[p["measures"][n]["value"] for n in ("over_refusal", "harmful_refusal")]
             for p in points if p["baseline"]]  # fmt: skip
    known = [(x, y) for x, y in rates if x is not None and y is not None]
    if len(known) > 1:
        xs, ys = zip(*hull(known), strict=True)
        axes.plot([100 * x for x in xs], [100 * y for y in ys], color=SOFT, linewidth=1,
                  linestyle="--", label="system texts alone")  # fmt: skip


def _short(point: Mapping[str, Any]) -> str:
    """Return a point's label: of a single setting its value, since the title says which."""
    if point["baseline"] or len(point["settings"]) != 1:
        return str(point["label"])
    value = next(iter(point["settings"].values()))
    return str(point["label"]) if isinstance(value, str) else f"{value:g}"


def _value(point: Mapping[str, Any], name: str) -> tuple[float, float, float] | None:
    if name == "perplexity":
        value = point["quality"]["perplexity"]
        return None if value is None else (value, value, value)
    found = point["measures"].get(name)
    if found is None or found["value"] is None:
        return None
    return found["value"], found["low"], found["high"]
