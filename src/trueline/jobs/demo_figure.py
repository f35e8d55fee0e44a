"""The demo's figure: adherence over the ratio, refusals over alpha. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trueline.records.style import BLUE, FAINT, GREEN, ORANGE, SOFT, STYLE, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trueline.evals.statistics import Estimate
    from trueline.jobs.demo_counts import Adherence, Refusal


def draw_demo(
    adherence: Sequence[Adherence], refusal: Sequence[Refusal], model: str = "bundled model"
) -> Figure:
    """Return the demo's figure: adherence over the ratio, refusals over alpha, 95 % intervals."""
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_adherence(left, adherence, model)
        _draw_refusal(right, refusal, model)
        for axes in (left, right):
            axes.set(ylim=(-3, 106), yticks=range(0, 101, 25))
            axes.yaxis.set_major_formatter("{x:.0f} %")
            axes.grid(axis="y", color=FAINT, linewidth=0.8)
            axes.spines["left"].set_visible(False)
            axes.tick_params(length=0)
        figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
    return figure


def _draw_adherence(axes: Axes, rows: Sequence[Adherence], model: str) -> None:
    """Ratio -1 is the plain model and 0 the principle prompt, so one axis holds them all."""
    kept = [row for row in rows if row.candidates != 1]
    masked = [(-1.0 if row.ratio is None else row.ratio, row) for row in kept]
    places = [place for place, _ in masked]
    for colour, field in ((BLUE, "followed"), (GREEN, "facts")):
        _line(axes, places, [getattr(row, field) for _, row in masked], colour)
    for row in rows:
        if row.candidates == 1 and row.ratio is not None:
            place = row.ratio + 0.35
            for colour, estimate in ((BLUE, row.followed), (GREEN, row.facts)):
                _point(axes, place, estimate, colour, hollow=True)
            middle = 50 * (row.followed.value + row.facts.value)
            axes.text(place, middle, "no\nmask", color=SOFT, ha="center", va="center", fontsize=9)
    title, n = "Linear Alignment: is the principle followed?", rows[0].followed.n
    _title(axes, title, f"{model}, {n} answers a point, 95 % intervals")
    axes.set_xlabel("ratio")
    ticks = range(1, round(places[-1]) + 1)
    names = ["no\nprinciple", "0 = prompt\nalone", *map(str, ticks)]
    axes.set_xticks([-1, 0, *ticks], names)
    axes.set_xlim(-1.35, places[-1] + 0.7)
    place, shown = masked[len(masked) // 2]
    _name(axes, place, shown.followed, "follows the principle", BLUE, above=True)
    _name(axes, place, shown.facts, "fact still right", GREEN, above=False)


def _draw_refusal(axes: Axes, rows: Sequence[Refusal], model: str) -> None:
    """Alpha 0 is the safety prompt and 1 the plain model."""
    path = [(row.alpha, row) for row in rows if row.alpha is not None]
    places = [alpha for alpha, _ in path]
    for colour, field in ((BLUE, "harmful_refusal"), (ORANGE, "over_refusal")):
        _line(axes, places, [getattr(row, field) for _, row in path], colour)
    side = places[-1] + 0.55
    for row in rows:
        if row.name == "AdaCD":
            _point(axes, side, row.harmful_refusal, BLUE)
            _point(axes, side, row.over_refusal, ORANGE)
    n = rows[0].over_refusal.n
    note = f"{model}, {n} requests of each kind, 95 % intervals"
    _title(axes, "Self-CD: what is refused?", note)
    axes.set_xlabel("alpha")
    named = {0.0: "0 = safety\nprompt", 1.0: "1 = plain\nmodel"}
    ticks = [place for place in places if place == round(place)]
    axes.set_xticks([*ticks, side], [*(named.get(t, f"{t:g}") for t in ticks), "AdaCD"])
    axes.set_xlim(-0.25, side + 0.3)
    place, shown = path[len(path) // 2 + 1]
    _name(axes, place, shown.harmful_refusal, "harmful ones (should be)", BLUE, above=False)
    _name(axes, place, shown.over_refusal, "harmless ones (should not be)", ORANGE, above=True)


def _line(axes: Axes, places: Sequence[float], estimates: Sequence[Estimate], colour: str) -> None:
    axes.fill_between(
        places, [100 * e.low for e in estimates], [100 * e.high for e in estimates],
        color=colour, alpha=0.15, linewidth=0,
    )  # fmt: skip
    axes.plot(places, [100 * e.value for e in estimates], color=colour, linewidth=2, marker="o",
              markersize=5)  # fmt: skip


def _point(axes: Axes, place: float, e: Estimate, colour: str, *, hollow: bool = False) -> None:
    axes.vlines(place, 100 * e.low, 100 * e.high, color=colour, linewidth=2, alpha=0.35)
    face = "white" if hollow else colour
    axes.plot([place], [100 * e.value], "o", color=colour, markersize=6, markerfacecolor=face)


def _name(axes: Axes, place: float, e: Estimate, name: str, colour: str, *, above: bool) -> None:
    """Write a line's name above or below its interval."""
    y = 100 * e.high + 1.5 if above else 100 * e.low - 1.5
    axes.text(place, y, name, color=colour, weight="bold", ha="center",
              va="bottom" if above else "top")  # fmt: skip


def _title(axes: Axes, title: str, note: str) -> None:
    axes.set_title(title, pad=24)
    axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=9, color=SOFT)
