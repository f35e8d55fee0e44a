"""The inspect page and the trace figure: what a method changed at every token, to look at.

The page is plain HTML with no script and no outside resource; the figure needs matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trueline.records.style import (
    BLUE,
    FAINT,
    GREEN,
    INK,
    ORANGE,
    PALE,
    SOFT,
    STYLE,
    VIOLET,
    drawable,
    nats,
    need_matplotlib,
    share,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trueline.engine.trace import Comparison, Recording, TokenTrace

TICKS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Numbers in nats on the page's colour scale; the last one has full colour."""
PER_ROW = 16
"""Tokens in one row of the trace figure."""


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
    environment.filters["share"] = lambda logprob: share(math.exp(logprob))
    environment.filters |= {"percent": share, "number": nats, "visible": visible}
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
        {"label": "under the method", "branch": None, "alternatives": token.alternatives}
    ]
    for k, branch in running.items():
        label, rows = f"{branches[k].name}, alone", branch.alternatives
        columns.append({"label": label, "branch": branch, "alternatives": rows})
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
        "first": branches[token.branches[0].branch].name,
        "heats": [round(heat(b.kl), 3) if b else 0 for b in by_branch],
    }


def visible(token: str) -> str:
    """Return a token with a sign for every space, tab and line break."""
    return token.replace(" ", "␣").replace("\t", "⇥").replace("\n", "⏎")


def draw_trace(tokens: Sequence[TokenTrace], title: str, labels: Sequence[str]) -> Figure:
    """Return a figure: how far each token was moved, and the chosen token's probability everywhere.

    `labels` name the branches. Tokens run along the x axis, `PER_ROW` in a row; those that the
    first branch alone would not take are underlined.
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
        first = labels[tokens[0].branches[0].branch]
        note = f"how far the method moved each token from: {first}; dark: that alone takes another"
        grid[0].set_title(drawable(note), size=9, weight="normal", color=SOFT)
        figure.suptitle(
            shortened(drawable(" ".join(title.split())), 100), x=0.01, ha="left", weight="bold"
        )
    return figure


def _draw_kl(axes: Axes, row: Sequence[TokenTrace], top: float) -> None:
    heights = [min(token.kl, top) for token in row]
    colours = [ORANGE if token.flipped else PALE for token in row]
    axes.bar(range(len(row)), heights, width=0.7, color=colours)
    for i, token in enumerate(row):
        if token.kl >= 0.005:
            axes.text(i, heights[i], nats(token.kl), ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(-0.6, PER_ROW - 0.4), ylim=(0, top), ylabel="moved (KL, nats)")
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
        range(len(row)), chosen, s=60, color=INK, marker="_", label="under the method", linewidth=2
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
