"""Pictures of a stream: R as a heat map, each task over time, strategies side by side, trade-offs.

Scores are shares between 0 and 1 and shown in per cent. Need matplotlib.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from numpy.typing import ArrayLike

from trueline.errors import DataError
from trueline.evals.statistics import Estimate
from trueline.records.style import (
    COLOURS,
    FAINT,
    INK,
    ORANGE,
    SOFT,
    STYLE,
    need_matplotlib,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Return the function drawing in the style of all of Trueline's pictures."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        need_matplotlib()
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def draw_matrix(
    R: ArrayLike,
    tasks: Sequence[str],
    title: str,
    untouched: ArrayLike | None = None,
    *,
    score: str = "accuracy",
) -> Figure:
    """Return R as a heat map: a row for each trained task, a column for each measured one.

    The diagonal is framed; what is not measured stays white. `untouched` is a row above the others;
    `score` says in the title what R holds.
    """
    matrix = np.asarray(R, dtype=np.float64)
    names = list(tasks) if len(matrix) == len(tasks) else ["all tasks"] * len(matrix)
    rows = [f"after {name}" for name in names]
    first = 0
    if untouched is not None:
        matrix = np.vstack([np.asarray(untouched, dtype=np.float64), matrix])
        rows, first = ["untouched", *rows], 1
    if matrix.shape[1] != len(tasks):
        raise DataError(f"R has {matrix.shape[1]} columns for {len(tasks)} tasks.")
    height, width = matrix.shape
    figure, axes = _figure(2.4 + 0.62 * width, 1.7 + 0.42 * height)
    axes.imshow(100 * matrix, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for i in range(height):
        for j in range(width):
            if not np.isnan(matrix[i, j]):
                colour = "white" if matrix[i, j] > 0.6 else INK
                axes.text(j, i, f"{100 * matrix[i, j]:.0f}", ha="center", va="center",
                          color=colour, fontsize=9)  # fmt: skip
    if height - first == width:
        for j in range(width):
            _frame(axes, j, j + first)
    axes.set_xticks(range(width), tasks, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(height), rows)
    axes.tick_params(length=0)
    axes.set_title(f"{title}: {score}, %")
    return figure


@_styled
def draw_over_time(R: ArrayLike, tasks: Sequence[str], title: str) -> Figure:
    """Return the accuracy of each task after every task, from its own training on.

    Before it a line is faint; the mark is where the task was trained.
    """
    matrix = 100 * np.asarray(R, dtype=np.float64)
    figure, axes = _figure(max(6.5, 2.5 + 0.6 * len(tasks)), 4.4)
    steps = np.arange(len(matrix))
    for j, name in enumerate(tasks):
        colour = COLOURS[j % len(COLOURS)]
        style = "-" if j < len(COLOURS) else "--"
        axes.plot(steps[: j + 1], matrix[: j + 1, j], style, color=colour, alpha=0.2, linewidth=1)
        axes.plot(steps[j:], matrix[j:, j], style, color=colour, label=name, linewidth=1.8)
        if j < len(matrix):
            axes.plot(j, matrix[j, j], MARKS[j % len(MARKS)], color=colour, markersize=6)
    axes.set_xticks(steps, tasks[: len(steps)], rotation=40, ha="right", rotation_mode="anchor")
    axes.set(ylim=(-3, 103), ylabel="accuracy, %", xlabel="after training")
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_title(title)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


@_styled
def draw_strategies(
    measures: Mapping[str, Mapping[str, Estimate]], title: str, unit: str = "points"
) -> Figure:
    """Return strategies side by side: a panel for each measure, a bar for each strategy.

    Args:
        measures: For each strategy, its measures by name, as shares; the whisker is the interval,
            and the number behind it the value with its standard error. A strategy may lack some.
        title: Above all panels.
        unit: Of 100 times the shares.
    """
    names = list(dict.fromkeys(name for found in measures.values() for name in found))
    if not names:
        raise DataError("There are no measures to draw.")
    figure, panels = _panels(1, len(names), 3.2 * len(names) + 1.2, 1.3 + 0.42 * len(measures))
    for axes, name in zip(panels, names, strict=True):
        for i, (strategy, found) in enumerate(measures.items()):
            if (e := found.get(name)) is None or np.isnan(e.value):
                continue
            value = 100 * e.value
            axes.barh(i, value, color=_colour(strategy, measures), height=0.62, alpha=0.85)
            if not np.isnan(e.low):
                axes.hlines(i, 100 * e.low, 100 * e.high, color=INK, linewidth=1.2)
            spread = "" if np.isnan(e.standard_error) else f" ± {100 * e.standard_error:.1f}"
            # On the side where the bar does not reach.
            side, place = ("left", 3) if value >= 0 else ("right", -3)
            edge = value if np.isnan(e.low) else 100 * (e.high if value >= 0 else e.low)
            axes.annotate(f"{value:.1f}{spread}", (edge, i), (place, 0), fontsize=8, ha=side,
                          textcoords="offset points", va="center", color=INK)  # fmt: skip
        axes.set_yticks(range(len(measures)), list(measures) if axes is panels[0] else [])
        axes.set_ylim(len(measures) - 0.5, -0.5)
        axes.axvline(0, color=SOFT, linewidth=0.8)
        axes.margins(x=0.35)
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel(unit)
        axes.grid(axis="x", color=FAINT, linewidth=0.8)
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    return figure


@_styled
def draw_trade_off(
    points: Sequence[Mapping[str, Any]],
    title: str,
    *,
    x: str = "learning_accuracy",
    y: str = "backward_transfer",
) -> Figure:
    """Return the stability-plasticity curve: `y` over `x`, a line for each strategy.

    Args:
        points: Each has `strategy`, `x` and `y` under their names (an `Estimate` or a share), and
            perhaps `label`, the setting. Points of a strategy are joined in their order; those with
            a `line` only to others of the same one.
        title: Above the picture.
        x: Plasticity, to the right is good.
        y: Stability, up is good.
    """
    strategies = list(dict.fromkeys(point["strategy"] for point in points))
    if not strategies:
        raise DataError("There are no points to draw.")
    figure, axes = _figure(7.2, 5.2)
    for k, strategy in enumerate(strategies):
        own = [p for p in points if p["strategy"] == strategy]
        colour = COLOURS[k % len(COLOURS)]
        xs, ys = ([_estimate(p[name]) for p in own] for name in (x, y))
        for i, line in enumerate(dict.fromkeys(p.get("line") for p in own)):
            on = [j for j, p in enumerate(own) if p.get("line") == line]
            axes.plot([100 * xs[j].value for j in on], [100 * ys[j].value for j in on],
                      MARKS[k % len(MARKS)] + "-", color=colour, markersize=6, linewidth=1.3,
                      alpha=0.9, label="_" * (i > 0) + strategy)  # fmt: skip
        for p, a, b in zip(own, xs, ys, strict=True):
            if not np.isnan(a.low):
                axes.hlines(100 * b.value, 100 * a.low, 100 * a.high, color=colour, alpha=0.3)
            if not np.isnan(b.low):
                axes.vlines(100 * a.value, 100 * b.low, 100 * b.high, color=colour, alpha=0.3)
            if p.get("label"):
                axes.annotate(str(p["label"]), (100 * a.value, 100 * b.value), (4, 4),
                              textcoords="offset points", fontsize=8, color=colour)  # fmt: skip
    axes.set_xlabel(f"{x.replace('_', ' ')}, % (to the right: learns more)")
    axes.set_ylabel(f"{y.replace('_', ' ')}, points (up: keeps more)")
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_title(title)
    axes.legend(frameon=False)
    return figure


def _estimate(value: Any) -> Estimate:
    if isinstance(value, Estimate):
        return value
    return Estimate(float(value), 1, np.nan, np.nan, np.nan)


def _colour(strategy: str, measures: Mapping[str, Any]) -> str:
    return COLOURS[list(measures).index(strategy) % len(COLOURS)]


def _frame(axes: Axes, x: float, y: float) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor=ORANGE, linewidth=1.6))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure, panels = _panels(1, 1, width, height)
    return figure, panels[0]


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return an empty figure and its panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
