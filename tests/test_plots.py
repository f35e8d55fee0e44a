"""The page escapes, needs nothing from outside and says what the numbers say; the figures draw."""

from __future__ import annotations

import html
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from trueline import ConfigError
from trueline.engine import trace_page
from trueline.engine.trace import Alternative, BranchTrace, Comparison, Recording, TokenTrace
from trueline.engine.trace_page import draw_trace, render_page
from trueline.evals.statistics import rate
from trueline.jobs import demo_figure
from trueline.jobs.demo_counts import Adherence, Refusal
from trueline.records import style

EVIL = "<script>alert('x')</script>\"& $x$ {{ 7 * 7 }}"
CHOICES = (Alternative(1, EVIL, 0.75), Alternative(2, " b", 0.0001))


def token(position: int, text: str = " a", kl: float = 0.3, flipped: bool = False) -> TokenTrace:
    branches = tuple(BranchTrace(k, -0.5, kl + k, 0.2, CHOICES) for k in range(2))
    return TokenTrace(0, 0, position, 1, text, text, -0.1, 0.4, flipped, CHOICES, branches)


def recording(*tokens: TokenTrace) -> Recording:
    comparisons = [
        Comparison(0, EVIL, True, "one", "stop", EVIL),
        Comparison(1, None, False, "two", "length"),
    ]
    return Recording(list(tokens), "".join(t.text for t in tokens), "stop", comparisons)


class Elements(HTMLParser):
    """What a browser would see: elements with attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_nothing_that_a_model_or_user_writes_becomes_markup():
    page = render_page(recording(token(0, EVIL)), EVIL, [(EVIL, EVIL)])
    seen = Elements(page)
    tags = {tag for tag, _ in seen.elements}
    assert "script" not in tags
    assert not [a for _, attrs in seen.elements for a in attrs if a.startswith("on")]
    assert EVIL in seen.text
    assert "49" not in seen.text
    assert html.escape("<script>", quote=False) in page


def test_the_page_needs_nothing_from_outside():
    page = render_page(recording(token(0)), "Why?", [])
    assert not re.search(r"https?:|url\(|@import|src=|href=", page)
    assert "default-src 'none'" in page


def test_every_token_can_be_focused_and_names_its_details():
    page = render_page(recording(*(token(i) for i in range(3))), "Why?", [])
    spans = [a for _, a in Elements(page).elements if "aria-describedby" in a]
    assert [a["tabindex"] for a in spans] == ["0"] * 3
    ids = [a["id"] for _, a in Elements(page).elements if a.get("role") == "tooltip"]
    assert [a["aria-describedby"] for a in spans] == ids


def test_flipped_tokens_are_marked_and_coloured_by_kl():
    page = render_page(recording(token(0, kl=10, flipped=True), token(1, kl=0)), "Why?", [])
    first, second = (a for _, a in Elements(page).elements if "aria-describedby" in a)
    assert first["class"].split() == ["t", "flip"]
    assert second["class"].split() == ["t"]
    assert first["style"] == "--c0:1.0;--c1:1.0;"
    assert second["style"] == f"--c0:0.0;--c1:{trace_page.heat(1):.3f};"
    assert "The method changed 1 of 2 tokens, and moved a token by 5.00 nats in the mean" in page


def test_the_answer_reads_as_it_was_written():
    parts = ["Hello", " wor", "ld,\n\n", "  two"]
    page = render_page(recording(*(token(i, t) for i, t in enumerate(parts))), "Why?", [])
    spans = re.findall(r'<span class="t"[^>]*>(.*?)</span>', page, re.DOTALL)
    assert spans == ["Hello", " wor", "ld,⏎\n⏎\n", "  two"]
    flow = re.sub(r'<div class="d".*?</div></div></div>', "", page, flags=re.DOTALL)
    assert "</span><span" in flow


def test_a_branch_that_no_longer_runs_is_left_out():
    last = replace(token(1), branches=token(1).branches[1:])
    page = render_page(recording(token(0), last), "Why?", [])
    assert 'style="--c0:0;--c1:' in page
    details = page.split('role="tooltip"')[2]
    details = details.split("</div></div></div>")[0]
    assert "plain prompt, adapter off, alone" in details
    assert "with “" not in details


def test_no_word_needs_the_paper_to_be_read():
    """What a reader cannot know: indices of branches, "flipped", the formula."""
    seen = Elements(render_page(recording(token(0, flipped=True), token(1)), "Why?", [])).text
    for word in ("flipped", "KL(", "‖", "combined", "Branch 0", "branch 0", "Branch 1"):
        assert word not in seen, word
    assert "moved" in seen


def test_a_template_that_has_its_own_system_text_is_not_without_one():
    plain = Comparison(0, "Be kind.", True, "one", "stop", "Be kind.")
    filled = Comparison(1, "You are Qwen.", True, "two", "stop", None, True)
    page = render_page(replace(recording(token(0)), comparisons=[plain, filled]), "Why?", [])
    assert "the chat template's own system text" in Elements(page).text
    assert "no system text" not in page


def test_infinite_and_tiny_numbers_are_readable():
    infinite = replace(token(0), branches=(BranchTrace(0, -float("inf"), float("inf"), 1, ()),) * 2)
    page = render_page(recording(token(0), infinite), "Why?", [])
    assert "moved by ∞ nats" in page
    assert "&lt; 0.1 %" in page
    assert style.share(0) == "0.0 %"


def test_the_scale_is_monotone_and_ends_at_its_last_tick():
    places = [trace_page.heat(kl) for kl in trace_page.TICKS]
    assert places == sorted(places)
    assert (places[0], places[-1]) == (0, 1)
    assert trace_page.heat(float("inf")) == 1


def test_trace_figure_wraps_rows_and_draws_any_text():
    signs = [r"$\frac{$", "_", "漢字", "\n", " ", "a" * 40, "$", "%"]
    tokens = [token(i, signs[i % len(signs)], kl=0.1 * i, flipped=i == 2) for i in range(60)]
    tokens[5] = replace(tokens[5], branches=tokens[5].branches[1:])
    tokens[6] = replace(tokens[6], branches=(BranchTrace(0, -9.0, float("inf"), 1, ()),))
    figure = draw_trace(tokens, "Why\n$\\frac{$ 漢?", ["branch 0: $\\frac{$", "branch 1: 漢"])
    figure.savefig(io.BytesIO())
    kl, shares = figure.axes[0::2], figure.axes[1::2]
    assert [len(axes.patches) for axes in kl] == [16, 16, 16, 12]
    assert [patch.get_height() for patch in kl[0].patches[:4]] == pytest.approx([0, 0.1, 0.2, 0.3])
    labels = [label.get_text() for label in shares[0].get_xticklabels()]
    assert labels[:6] == [r"$\frac{$", "_", "□□", "⏎", "␣", "aaaaaaaaa…"]
    assert [label.get_weight() for label in shares[0].get_xticklabels()[1:4]].count("bold") == 1


def ways() -> tuple[list[Adherence], list[Refusal]]:
    half, most = rate([True, False] * 5), rate([True] * 9 + [False])

    def adherence(name, ratio, top_p):
        return Adherence(name, ratio, top_p, most, half, half, {"pirate": half}, [])

    return (
        [
            adherence("none", None, None),
            adherence("prompt", 0.0, None),
            adherence("two", 2.0, 0.8),
            adherence("bare", 2.0, 1.0),
        ],
        [
            Refusal("no system prompt", None, half, most, [], []),
            *(Refusal(f"Self-CD {a}", a, half, most, [], []) for a in (0.0, 1.0, 2.0)),
            Refusal("AdaCD", None, half, most, [], []),
        ],
    )


def test_demo_figure_draws_every_number():
    figure = demo_figure.draw_demo(*ways())
    figure.savefig(io.BytesIO())
    left, right = figure.axes
    followed, facts, *bare = left.lines
    assert followed.get_xydata().tolist() == [[-1, 90], [0, 90], [2, 90]]
    assert facts.get_ydata().tolist() == [50, 50, 50]
    assert [line.get_ydata().tolist() for line in bare] == [[90], [50]]
    harmful, harmless, *ada = right.lines
    assert harmful.get_xydata().tolist() == [[0, 90], [1, 90], [2, 90]]
    assert harmless.get_ydata().tolist() == [50, 50, 50]
    assert [line.get_ydata().tolist() for line in ada] == [[90], [50]]


def test_missing_matplotlib_names_its_command(monkeypatch):
    monkeypatch.setattr(style, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'trueline\[plots\]'"):
        demo_figure.draw_demo(*ways())
