"""Pictures of numbers that others measured: the inspect page, the trace figure, the demo figure.

The page is plain HTML with no script and no outside resource; the figures need matplotlib
(`pip install 'trueline[plots]'`), which is imported on first use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trueline.engine.trace import Comparison, Recording, TokenTrace
    from trueline.evals.statistics import Estimate
    from trueline.jobs.demo import Adherence, Refusal

TICKS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Numbers in nats on the page's colour scale; the last one has full colour."""
PER_ROW = 16
"""Tokens in one row of the trace figure."""
BLUE, ORANGE, GREEN, VIOLET = "#2563b0", "#d9580d", "#1a8a72", "#7b4fb5"
INK, SOFT, FAINT = "#1c1f24", "#6b7280", "#dfe2e7"
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}


def need_matplotlib() -> None:
    """Raise `ConfigError` with the install command if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "The figure needs the package matplotlib. Install it: pip install 'trueline[plots]'"
        )


def heat(kl: float) -> float:
    """Return the place of a KL on the colour scale, 0 to 1: log(1 + KL / 0.03), 1 at 10 nats."""
    return min(1.0, math.log1p(max(kl, 0.0) / 0.03) / math.log1p(TICKS[-1] / 0.03))


def render_page(recording: Recording, question: str, settings: Sequence[tuple[str, object]]) -> str:
    """Return the inspect page as HTML; `settings` are pairs of name and value to show on top."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("trueline", "assets"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["share"] = lambda logprob: percent(math.exp(logprob))
    environment.filters |= {"percent": percent, "number": number, "visible": visible}
    branches = [c for c in recording.comparisons if c.branch is not None]
    tokens = recording.tokens
    return environment.get_template("inspect.html.jinja").render(
        question=question,
        settings=settings,
        tokens=[_token_view(token, branches) for token in tokens],
        branches=branches,
        comparisons=recording.comparisons,
        ticks=[(f"{kl:g}", round(100 * heat(kl), 2)) for kl in TICKS],
        cut=recording.finish_reason == "length",
        flips=sum(token.flipped for token in tokens),
        mean_kl=sum(token.kl for token in tokens) / len(tokens),
    )


def _token_view(token: TokenTrace, branches: Sequence[Comparison]) -> dict[str, Any]:
    """Return what the page shows of a token; a branch that no longer runs is None."""
    running = {b.branch: b for b in token.branches}
    by_branch = [running.get(k) for k in range(len(branches))]
    columns: list[dict[str, Any]] = [
        {"label": "Combined", "branch": None, "alternatives": token.alternatives}
    ]
    for k, branch in running.items():
        system = branches[k].system or "no system text"
        label = f"Branch {k}: {system}{'' if branches[k].adapter else ', adapter off'}"
        columns.append({"label": label, "branch": branch, "alternatives": branch.alternatives})
    return {
        "text": token.text.replace("\n", "⏎\n"),
        "token": token.token,
        "token_id": token.token_id,
        "logprob": token.logprob,
        "entropy": token.entropy,
        "flipped": token.flipped,
        "branches": token.branches,
        "by_branch": by_branch,
        "columns": columns,
        "heats": [round(heat(b.kl), 3) if b else 0 for b in by_branch],
    }


def visible(token: str) -> str:
    """Return a token with a sign for every space, tab and line break."""
    return token.replace(" ", "␣").replace("\t", "⇥").replace("\n", "⏎")


def percent(share: float) -> str:
    """Return 0.123 as "12.3 %", and tiny shares as "< 0.1 %"."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def number(value: float) -> str:
    """Return a number in nats with two digits behind the point."""
    return "∞" if math.isinf(value) else f"{value:.2f}"


def draw_trace(tokens: Sequence[TokenTrace], title: str, labels: Sequence[str]) -> Figure:
    """Return a figure: KL from the first branch, and the chosen token's probability everywhere.

    `labels` name the branches. Tokens run along the x axis, `PER_ROW` in a row; flipped ones are
    underlined.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [tokens[i : i + PER_ROW] for i in range(0, len(tokens), PER_ROW)]
    finite = [t.kl for t in tokens if math.isfinite(t.kl)]
    top = 1.15 * max([0.1, *finite])
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 1.1 + 2.9 * len(rows)), layout="constrained")
        grid = figure.subplots(2 * len(rows), 1, squeeze=False)[:, 0]
        for i, row in enumerate(rows):
            _draw_kl(grid[2 * i], row, top)
            _draw_shares(grid[2 * i + 1], row, labels, legend=i == 0)
        first = tokens[0].branches[0].branch
        note = f"KL(combined ‖ branch {first}); dark: branch {first} alone takes another token"
        grid[0].set_title(note, size=9, weight="normal", color=SOFT)
        figure.suptitle(
            shortened(drawable(" ".join(title.split())), 100), x=0.01, ha="left", weight="bold"
        )
    return figure


def _draw_kl(axes: Axes, row: Sequence[TokenTrace], top: float) -> None:
    heights = [min(token.kl, top) for token in row]
    colours = [ORANGE if token.flipped else "#f2b48c" for token in row]
    axes.bar(range(len(row)), heights, width=0.7, color=colours)
    for i, token in enumerate(row):
        if token.kl >= 0.005:
            axes.text(i, heights[i], number(token.kl), ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(-0.6, PER_ROW - 0.4), ylim=(0, top), ylabel="KL (nats)")
    axes.set_xticks([])
    axes.spines["bottom"].set_color(FAINT)


def _draw_shares(
    axes: Axes, row: Sequence[TokenTrace], labels: Sequence[str], *, legend: bool
) -> None:
    colours = [BLUE, GREEN, VIOLET, SOFT]
    for i, token in enumerate(row):
        logprobs = [token.logprob, *(branch.logprob for branch in token.branches)]
        shares = [math.exp(logprob) for logprob in logprobs]
        axes.vlines(i, min(shares), max(shares), color=FAINT, linewidth=3, zorder=1)
    for k, label in enumerate(labels):
        places = [(i, b) for i, t in enumerate(row) for b in t.branches if b.branch == k]
        axes.scatter(
            [i + 0.12 * (k + 1) for i, _ in places],
            [math.exp(b.logprob) for _, b in places],
            s=30, color=colours[k % len(colours)], marker="os^Dv"[k % 5], label=drawable(label),
            clip_on=False,
        )  # fmt: skip
    chosen = [math.exp(token.logprob) for token in row]
    axes.scatter(
        range(len(row)), chosen, s=60, color=INK, marker="_", label="combined", linewidth=2
    )
    axes.set(xlim=(-0.6, PER_ROW - 0.4), ylim=(-0.05, 1.08), ylabel="p(token)", yticks=[0, 0.5, 1])
    axes.set_xticks(range(len(row)), [_label(token) for token in row])
    axes.tick_params(axis="x", length=0)
    for i, (token, name) in enumerate(zip(row, axes.get_xticklabels(), strict=True)):
        if token.flipped:
            name.set(color=ORANGE, weight="bold")
            axes.plot([i - 0.3, i + 0.3], [-0.05, -0.05], color=ORANGE, linewidth=3, clip_on=False)
    if legend:
        axes.legend(ncols=len(labels) + 1, frameon=False, fontsize=8, loc="lower right",
                    bbox_to_anchor=(1, 1), borderaxespad=0)  # fmt: skip


def _label(token: TokenTrace) -> str:
    return shortened(drawable(visible(token.token.strip(" ") or token.token)), 10)


def shortened(text: str, size: int) -> str:
    """Return at most `size` characters of `text`, the last one an ellipsis if it was longer."""
    return text if len(text) <= size else text[: size - 1] + "…"


def drawable(text: str) -> str:
    """Return `text` with a box for every character that the figure's font lacks."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont(STYLE["font.family"])).get_charmap()
    return "".join(c if ord(c) in known else "□" for c in text)


def draw_demo(adherence: Sequence[Adherence], refusal: Sequence[Refusal]) -> Figure:
    """Return the demo's figure: adherence over the ratio, refusals over alpha, 95 % intervals."""
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11.5, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_adherence(left, adherence)
        _draw_refusal(right, refusal)
        for axes in (left, right):
            axes.set(ylim=(-3, 106), yticks=range(0, 101, 25))
            axes.yaxis.set_major_formatter("{x:.0f} %")
            axes.grid(axis="y", color=FAINT, linewidth=0.8)
            axes.spines["left"].set_visible(False)
            axes.tick_params(length=0)
        figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr, call-arg]
    return figure


def _draw_adherence(axes: Axes, rows: Sequence[Adherence]) -> None:
    """Ratio -1 is the plain model and 0 the principle prompt, so one axis holds them all."""
    masked = [(-1.0 if row.ratio is None else row.ratio, row) for row in rows if row.top_p != 1]
    places = [place for place, _ in masked]
    for colour, field in ((BLUE, "followed"), (GREEN, "facts")):
        _line(axes, places, [getattr(row, field) for _, row in masked], colour)
    for row in rows:
        if row.top_p == 1 and row.ratio is not None:
            place = row.ratio + 0.35
            for colour, estimate in ((BLUE, row.followed), (GREEN, row.facts)):
                _point(axes, place, estimate, colour, hollow=True)
            middle = 50 * (row.followed.value + row.facts.value)
            axes.text(place, middle, "no\nmask", color=SOFT, ha="center", va="center", fontsize=9)
    title, n = "Linear Alignment: is the principle followed?", rows[0].followed.n
    _title(axes, title, f"bundled model, {n} answers a point, 95 % intervals")
    axes.set_xlabel("ratio")
    ticks = range(1, round(places[-1]) + 1)
    names = ["no\nprinciple", "0 = prompt\nalone", *map(str, ticks)]
    axes.set_xticks([-1, 0, *ticks], names)
    axes.set_xlim(-1.35, places[-1] + 0.7)
    place, shown = masked[len(masked) // 2]
    _name(axes, place, shown.followed, "follows the principle", BLUE, above=True)
    _name(axes, place, shown.facts, "fact still right", GREEN, above=False)


def _draw_refusal(axes: Axes, rows: Sequence[Refusal]) -> None:
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
    note = f"bundled model, {n} requests of each kind, 95 % intervals"
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
