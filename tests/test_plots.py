"""The page escapes, needs nothing from outside and says what the numbers say; the figures draw."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace

import pytest

from trueline import ConfigError
from trueline.engine.trace import Alternative, BranchTrace, Comparison, Recording, TokenTrace
from trueline.engine.trace_figure import draw_trace
from trueline.evals.statistics import rate
from trueline.jobs import demo_figure
from trueline.jobs.demo_counts import Adherence, Refusal
from trueline.jobs.inspection import page_data
from trueline.records import style
from trueline.records.web_page import standalone

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


def test_nothing_that_a_model_or_user_writes_becomes_markup():
    said = recording(token(0, EVIL), token(1, "\u2028</script>"))
    page = standalone(page_data(said, EVIL, [(EVIL, EVIL)]), EVIL)
    assert page.count("<script") == page.count("</script>") == 2
    assert "<title>&lt;script>alert('x')&lt;/script>\"&amp; $x$" in page
    held = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert held["question"] == held["settings"][0][1] == held["tokens"][0]["token"] == EVIL
    assert [own["name"] for own in held["alone"]] == [c.name for c in said.comparisons]
    assert held["tokens"][1]["token"] == "\u2028</script>"


def test_the_page_needs_nothing_from_outside_and_runs_its_own_script_alone():
    page = standalone(page_data(recording(token(0)), "Why?", []), "Why?")
    links = set(re.findall(r"""(?:https?:|url\(|@import|src=|href=)[^\s"'`]*""", page))
    assert links <= {"http://www.w3.org/2000/svg", "href=", "src="}
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for tag in ("style", 'script type="module"'):
        text = re.search(rf"<{tag}>(.*?)</{tag.split()[0]}>", page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_numbers_that_are_not_finite_are_words():
    infinite = replace(token(0), branches=(BranchTrace(0, -float("inf"), float("inf"), 1, ()),))
    held = page_data(recording(infinite), "Why?", [])
    assert held["tokens"][0]["branches"][0]["kl"] == "inf"
    assert standalone(held, "")


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
