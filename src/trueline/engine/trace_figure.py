"""The trace figure: what a method changed at every token, to look at; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trueline.engine.trace import TokenTrace

PER_ROW = 16
"""Tokens in one row of the figure."""


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
