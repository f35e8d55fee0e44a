"""Curves of a training run: a panel over steps for each number that was logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trueline.records.style import BLUE, FAINT, ORANGE, STYLE, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curves(
    rows: Sequence[Mapping[str, Any]], panels: Mapping[str, str], title: str
) -> Figure | None:
    """Return a figure with a panel over steps for each name of `panels` that the rows have.

    A panel's second line is the same name with `eval_` before it. None where no row has a number.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = [n for n in panels if _series(rows, n)[0] or _series(rows, f"eval_{n}")[0]]
    if not found:
        return None
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.9 * columns, 2.7 * lines + 0.4), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
        every = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axes, name in zip(every, found, strict=False):
            for key, colour, marker in ((name, BLUE, ""), (f"eval_{name}", ORANGE, "o")):
                steps, values = _series(rows, key)
                only = "o" if len(steps) == 1 else marker
                axes.plot(steps, values, color=colour, linewidth=1.6, marker=only, markersize=4)
            axes.set_title(panels[name], fontsize=10, weight="normal")
            axes.grid(axis="y", color=FAINT, linewidth=0.8)
            axes.set_xlabel("step")
            axes.tick_params(length=0)
        for axes in every[len(found) :]:
            axes.set_visible(False)
    return figure


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of the rows that have a number under this name."""
    pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    return [step for step, _ in pairs], [value for _, value in pairs]
