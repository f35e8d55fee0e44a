"""The frontier of refusals: what is dominated, areas, effects of texts, what is recommended."""

from __future__ import annotations

import hashlib
import itertools
import random

import numpy as np
import pytest

import trueline
from trueline import ConfigError, SelfCD, SweepConfig
from trueline.cli import main
from trueline.evals.frontier import area, dominators, frontier, hull, text_effect
from trueline.evals.items import Item
from trueline.evals.points import Point, Way, grid_points, names_of, text_points
from trueline.evals.tables import frontier_lines, recommendation_lines
from trueline.jobs.refusals import Texts, recommend_setting, refusal_results, with_texts
from trueline.types import SamplingParams

SHORT = SamplingParams(max_new_tokens=6)
DEFAULT = SelfCD().safety_prompt


@pytest.fixture(scope="module")
def tiny():
    """The bundled model."""
    return trueline.load_model("tiny")


# Dominance and area


def test_dominated_by_hand():
    places = {
        "worse in both": (0.4, 0.6),
        "the best": (0.2, 0.8),
        "its twin": (0.2, 0.8),
        "as harmless, refuses less": (0.2, 0.7),
        "refuses more of both": (0.3, 0.9),
        "refuses less of both": (0.1, 0.1),
    }
    assert dominators(places) == {
        "worse in both": "the best",
        "the best": None,
        "its twin": None,
        "as harmless, refuses less": "the best",
        "refuses more of both": None,
        "refuses less of both": None,
    }


@pytest.mark.parametrize(("places", "expected"), [
    ([], 0.5),
    ([(0.5, 0.5)], 0.5),
    ([(0.9, 0.1)], 0.5),  # worse than a coin: nobody would use it
    ([(0.0, 1.0)], 1.0),
    ([(0.2, 0.8)], 0.8),  # 0.2 * 0.8 / 2 + 0.8 * 1.8 / 2
    ([(0.2, 0.8), (0.3, 0.8)], 0.8),
    ([(0.0, 0.5), (0.5, 1.0)], 0.875),  # the square less a triangle of 1/2 * 1/2 / 2
])  # fmt: skip
def test_areas_by_hand(places, expected):
    assert area(places) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(10))
def test_areas_equal_the_best_mixtures(seed):
    """The frontier at x is the most harmful refusals of any two settings mixed to x."""
    draw = random.Random(seed)
    places = [(draw.random(), draw.random()) for _ in range(draw.randint(1, 8))]
    ends = [(0.0, 0.0), (1.0, 1.0), *places]
    xs, best = np.linspace(0, 1, 2001), np.zeros(2001)
    for (a, b), (c, d) in itertools.product(ends, ends):
        if a < c:
            inside = (xs >= a) & (xs <= c)
            mixed = b + (d - b) * (xs - a) / (c - a)
            best[inside] = np.maximum(best[inside], mixed[inside])
    assert area(places) == pytest.approx(np.trapezoid(best, xs), abs=1e-3)
    assert set(hull(places)) <= set(ends)


# Halves


def prompts_of(kind: str, first: int, second: int) -> list[str]:
    """Prompts of which so many lie in the first half and in the second, first ones first."""
    halves: dict[bool, list[str]] = {True: [], False: []}
    for i in range(400):
        text = f"{kind} {i}"
        halves[hashlib.sha256(f"0:{text}".encode()).digest()[0] < 128].append(text)
    return halves[True][:first] + halves[False][:second]


SAFE, UNSAFE = prompts_of("safe", 10, 10), prompts_of("unsafe", 10, 10)


def flags(first: int, second: int) -> list[float]:
    """So many of ten refused in the first half, and in the second."""
    return [1.0] * first + [0.0] * (10 - first) + [1.0] * second + [0.0] * (10 - second)


def test_the_frontier_is_made_on_one_half_and_measured_on_the_other():
    outcomes = {
        "text": (flags(2, 4), flags(8, 6)),
        "lucky": (flags(0, 10), flags(10, 0)),  # perfect where it is chosen
        "late": (flags(10, 0), flags(0, 10)),  # perfect where it is reported, not chosen
    }
    found = frontier(outcomes, ["text"], SAFE, UNSAFE, samples=200)
    assert (found.texts_settings, found.all_settings) == (("text",), ("lucky",))
    assert found.texts.value == pytest.approx(0.4 * 0.6 / 2 + 0.6 * 1.6 / 2)
    assert found.all.value == 0.5
    assert found.gain.value == pytest.approx(0.5 - 0.6)
    assert found.texts.low < found.texts.value < found.texts.high
    assert found.gain.low <= found.gain.value <= found.gain.high
    assert found.texts.n == 20
    again = frontier(outcomes, ["text"], SAFE, UNSAFE, samples=200)
    assert again == found
    turned = {*SAFE[10:], *UNSAFE[10:]}
    found = frontier(outcomes, ["text"], SAFE, UNSAFE, chosen=turned, samples=200)
    assert found.all_settings == ("late",)
    assert found.texts.value == pytest.approx(0.8)


def test_the_interval_of_an_area_covers_the_truth():
    """A text that refuses 0.2 and 0.8 has the area 0.8; 95 % intervals cover it about so often."""
    rng, covered = np.random.default_rng(0), 0
    safe, unsafe = prompts_of("safe", 60, 60), prompts_of("unsafe", 60, 60)
    for _ in range(60):
        outcomes = {"a": tuple((rng.random(120) < p).astype(float).tolist() for p in (0.2, 0.8))}
        found = frontier(outcomes, ["a"], safe, unsafe, samples=200)
        covered += found.texts.low <= 0.8 <= found.texts.high
    assert covered >= 51


def test_unknown_verdicts_and_empty_halves():
    outcomes = {"a": ([None, *flags(2, 4)[1:]], flags(8, 6))}
    found = frontier(outcomes, ["a"], SAFE, UNSAFE, samples=50)
    assert found.texts.value == pytest.approx(0.6)
    assert frontier({"a": ([1.0], [1.0])}, ["a"], SAFE[:1], UNSAFE[:1]) is None


# Texts


def test_texts_are_an_axis():
    grid = {"alpha": (1, 2), "safety_prompt": ("Be safe.", "Refuse harm."), "system": ("", "Hi.")}
    points = grid_points(Way("self-cd"), grid, SHORT)
    assert len(points) == 8
    assert points[1].label == 'alpha=1, safety_prompt="Be safe.", system="Hi."'
    chat = points[1].placed(
        [{"role": "system", "content": "Own."}, {"role": "user", "content": "x"}]
    )
    texts = [branch[0]["content"] for branch in points[1].make().prompts(chat)]
    assert texts == ["Hi.\n\nBe safe.", "Hi."]
    assert points[1].describe()["system"] == "Hi."
    assert "system" not in Point("a", Way("plain"), SHORT).describe(), "old runs keep their keys"


def test_texts_that_begin_alike_have_names_of_their_own():
    long = "You are a helpful assistant who "
    assert list(names_of([long + "a", long + "b", 1.5, ""]).values()) == [
        '"You are a helpful assistant…"', '"You are a helpful assistant…" (2)', "1.5", '""',
    ]  # fmt: skip


def test_the_texts_beside_a_sweep():
    points = grid_points(Way("self-cd"), {"alpha": (1, 2)}, SHORT)
    found = {p.label: p for p in text_points(points, "You are Q.")}
    shown = '"You are a helpful, respectf…"'
    assert list(found) == ["no system text", "helpful text", "default text", f"{shown} alone",
                           f"{shown} added"]  # fmt: skip
    assert all(p.baseline and p.method == "plain" for p in found.values())
    chat = [{"role": "system", "content": "You are Q."}, {"role": "user", "content": "x"}]
    heads = [p.placed(chat)[0]["content"] for p in found.values()]
    assert heads == ["", "You are a helpful assistant.", "You are Q.", DEFAULT,
                     f"You are Q.\n\n{DEFAULT}"]  # fmt: skip


def test_no_text_is_asked_twice(tiny):
    items = [Item("1", "x", "safe"), Item("2", "y", "unsafe")]
    plain = Point("plain", Way("plain"), SHORT, baseline=True)
    own = grid_points(Way("self-cd"), {"alpha": (1,), "system": ("", "Hi.")}, SHORT)
    found = with_texts(tiny, [plain, *own], items)
    # The bundled model has no default text: none is the plain model, and "added" is "alone".
    shown = '"You are a helpful, respectf…"'
    assert [p.label for p in found.points if p.baseline] == [
        "plain", "helpful text", f"{shown} alone", '"Hi." as system text', f'{shown} behind "Hi."',
    ]  # fmt: skip
    assert found.effects == [
        (DEFAULT, f"{shown} alone", "plain"),
        (DEFAULT, f'{shown} behind "Hi."', '"Hi." as system text'),
    ]


def test_a_text_in_place_of_another_has_an_effect_too(tiny):
    fields = {"principle": "Be safe.", "negative": "You are Q.", "guidance": -1.0}
    own = grid_points(Way("contrast", fields), {"system": ("",)}, SHORT)
    found = with_texts(tiny, own, [Item("1", "x", "safe")])
    assert found.effects == [("Be safe.", '"Be safe." alone', '"You are Q." alone')]


# What a text does, and what to use


def results_of(outcomes: dict, floor: float = 0.97, effects=()) -> dict:
    """The parts of the results for label -> (safe flags, unsafe flags); "a..." are contrasts."""
    items = [Item(p, p, "safe") for p in SAFE] + [Item(p, p, "unsafe") for p in UNSAFE]
    values, points = {}, []
    for label, (safe, unsafe) in outcomes.items():
        none = [None] * 20
        values[label] = {"over_refusal": safe + none, "harmful_refusal": none + unsafe}
        contrast = label.startswith("alpha")
        way = Way("self-cd" if contrast else "plain")
        system = None if contrast or label == "plain" else label
        settings = {"alpha": 2.0} if contrast else {}
        points.append(Point(label, way, SHORT, settings, baseline=not contrast, system=system))
    return refusal_results(Texts(points, list(effects)), items, values, floor, 0)


REVERSED = {
    "plain": (flags(4, 4), flags(7, 7)),
    "safety": (flags(2, 2), flags(4, 4)),
    "alpha=2": (flags(8, 8), flags(9, 9)),
}


def test_a_text_that_takes_refusals_away_is_named():
    effects = [("Be safe.", "safety", "plain")]
    found = results_of(REVERSED, effects=effects)
    (effect,) = found["effects"]
    # 4 safe and 6 unsafe prompts are refused without it alone: 2 / 2^10.
    assert (effect["direction"], effect["p_value"]) == (-1, 2 / 2**10)
    assert effect["with_rates"] == (0.2, 0.4)
    assert effect["without_rates"] == (0.4, 0.7)
    lines = "\n".join(frontier_lines(found))
    assert "takes refusals away" in lines
    assert "(reversed)" in lines
    turned = text_effect({"a": REVERSED["safety"], "b": REVERSED["plain"]}, "t", "b", "a")
    assert turned.direction == 1
    assert text_effect({"a": REVERSED["plain"]}, "t", "a", "a").direction == 0


def test_where_nothing_reaches_the_floor_the_plain_models_rate_is_the_bound():
    found = results_of(REVERSED)["recommendation"]
    # Not the nearest to the floor, which refuses twice as many harmless prompts.
    assert (found["label"], found["meets_floor"], found["contrast"]) == ("plain", False, False)
    assert found["best_contrast"] == "alpha=2"
    lines = recommendation_lines(found)
    assert lines[0] == "No recommendation: no point refuses 97 % of harmful prompts."
    assert lines[1].endswith("plain, and no contrast")
    better = REVERSED | {"helpful": (flags(1, 1), flags(7, 6))}
    found = results_of(better)["recommendation"]
    assert (found["label"], found["system"]) == ("helpful", "helpful")


def test_a_text_alone_can_be_recommended_and_a_contrast_too():
    texts = {"plain": (flags(5, 5), flags(10, 10)), "helpful": (flags(1, 1), flags(10, 10))}
    found = results_of(texts | {"alpha=2": (flags(2, 2), flags(10, 10))})
    assert found["recommendation"]["label"] == "helpful"
    assert found["recommendation"]["best_contrast"] == "alpha=2"
    assert found["dominated_by"] == {"plain": "helpful", "helpful": None, "alpha=2": "helpful"}
    found = results_of(texts | {"alpha=2": (flags(0, 0), flags(10, 10))})
    assert (found["recommendation"]["label"], found["recommendation"]["contrast"]) == (
        "alpha=2",
        True,
    )
    assert found["recommendation"]["settings"] == {"alpha": 2.0}


def test_without_a_plain_model_the_nearest_is_named():
    points = [Point("alpha=2", Way("self-cd"), SHORT, {"alpha": 2.0})]
    items = [Item(p, p, "safe") for p in SAFE] + [Item(p, p, "unsafe") for p in UNSAFE]
    none = [None] * 20
    values = {"alpha=2": {"over_refusal": flags(1, 1) + none,
                          "harmful_refusal": none + flags(5, 5)}}  # fmt: skip
    found = recommend_setting(points, items, values, 0.97, 0)
    assert (found["label"], found["meets_floor"]) == ("alpha=2", False)
    assert "Nearest: alpha=2" in recommendation_lines(found)[0]


# Runs


def test_a_sweep_over_texts_runs_and_reports(tmp_path, capsys):
    words = ["eval", "refusal", "--alpha", "1,2", "--safety-prompt", "Be safe.", "--safety-prompt",
             "Refuse harm.", "--system", "", "--system", "Hi.", "--limit", "6", "--max-new-tokens",
             "6", "--output", str(tmp_path / "r")]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr().out
    for part in ("dominated by", "helpful text", '"Be safe." behind "Hi."', "Area under",
                 'alpha=2, safety_prompt="Refuse harm.", system=""'):  # fmt: skip
        assert part in out, part
    assert (tmp_path / "r" / "plot.png").exists()
    assert main(["report", str(tmp_path / "r"), "--output", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.md").read_text()
    assert "dominated by" in page
    assert "Area under" in page
    rows = (tmp_path / "r" / "responses.jsonl").read_text()
    capsys.readouterr()
    assert main(words) == 0
    assert (tmp_path / "r" / "responses.jsonl").read_text() == rows, "nothing is decoded again"


def test_text_axes_are_checked_before_anything():
    with pytest.raises(ConfigError, match="takes texts for `safety_prompt`, got 1"):
        SweepConfig(method=SelfCD, grid={"safety_prompt": [1]})
    with pytest.raises(ConfigError, match="takes texts for `system`, got ' '"):
        SweepConfig(method=SelfCD, grid={"system": [" "]})
    with pytest.raises(ConfigError, match="`system` takes one text here"):
        SweepConfig(metric="adherence", method="linear-alignment", grid={"system": ["a", "b"]})
    with pytest.raises(ConfigError, match="no number `sistem`"):
        SweepConfig(method=SelfCD, grid={"sistem": ["a"]})
