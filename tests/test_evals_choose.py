"""The recommendation for any metric: bounds, halves and ties, by hand and by a naive search."""

from __future__ import annotations

import hashlib
import json
import math
import random

import pytest

from trueline.cli import main
from trueline.evals.choice import GOALS, Bound, Goal, choose, with_floor
from trueline.evals.statistics import perplexity

GOAL = GOALS["adherence"]


def prompts_of(first: int, second: int) -> list[str]:
    """Prompts of which so many lie in the first half and in the second, first ones first."""
    halves: dict[bool, list[str]] = {True: [], False: []}
    for i in range(200):
        halves[hashlib.sha256(f"0:p{i}".encode()).digest()[0] < 128].append(f"p{i}")
    return halves[True][:first] + halves[False][:second]


def outcome(adherence, fact, loss):
    return {"adherence": adherence, "fact": fact, "perplexity": [(loss * 10, 10)] * len(adherence)}


def test_the_most_adherent_point_within_its_bounds():
    prompts = prompts_of(4, 4)
    outcomes = {
        "plain": outcome([0] * 8, [1] * 8, 1.0),
        "weak": outcome([1, 0, 0, 0] * 2, [1] * 8, 1.0),
        "good": outcome([1, 1, 1, 0, 1, 0, 0, 0], [1] * 8, 1.5),
        "babbles": outcome([1] * 8, [1] * 8, 1.8),  # e^0.8 is more than twice
        "errs": outcome([1] * 8, [1, 1, 1, 0] + [1] * 4, 1.0),  # 3 of 4 facts
    }
    found = choose(GOAL, outcomes, prompts, baseline="plain", default="errs")
    assert (found.label, found.meets_bounds) == ("good", True)
    assert found.chosen_on["adherence"].value == 0.75
    assert found.reported_on["adherence"].value == 0.25
    assert found.chosen_on["perplexity"].value == pytest.approx(math.exp(1.5))
    assert found.baseline_on["perplexity"].value == pytest.approx(math.e)
    # Three discordant prompts, all one way: 2 / 2^3.
    assert found.p_values == {"adherence": 0.25, "fact": 1.0, "perplexity": None}
    row = found.as_dict()
    assert (row["measure"], row["meets_floor"], row["p_adherence"]) == ("adherence", True, 0.25)
    assert json.dumps(row)


def test_the_nearest_where_no_point_keeps_the_bounds():
    prompts = prompts_of(2, 2)
    outcomes = {
        "plain": outcome([0] * 4, [1] * 4, 1.0),
        "far": outcome([1] * 4, [1] * 4, 3.0),
        "near": outcome([0] * 4, [1] * 4, 1.9),
    }
    found = choose(GOAL, outcomes, prompts, baseline="plain")
    assert (found.label, found.meets_bounds) == ("near", False)


def test_measures_that_are_not_there_and_baselines_that_are_missing():
    prompts = prompts_of(2, 2)
    outcomes = {k: outcome([1] * 4, [1] * 4, 1.0) for k in ("plain", "a")}
    for own in outcomes.values():
        del own["fact"]
    found = choose(GOAL, outcomes, prompts, baseline="plain")
    assert [b.measure for b in found.goal.bounds] == ["perplexity"]
    assert choose(GOAL, {"a": outcomes["a"]}, prompts) is None
    assert choose(GOAL, outcomes, ["p"] * 4, baseline="plain") is None, "one half is empty"
    assert with_floor("refusal", 0.5).bounds[0].limit == 0.5
    assert with_floor("adherence", 0.5) == GOAL, "relative bounds stay"


@pytest.mark.parametrize("seed", range(20))
def test_equals_a_naive_search(seed):
    """Scores by hand over random outcomes, goals that look for least and for most."""
    draw = random.Random(seed)
    prompts = prompts_of(6, 6)
    outcomes = {
        str(k): {n: [draw.randint(0, 1) for _ in prompts] for n in ("x", "y")} for k in range(8)
    }
    most, at_least = draw.random() < 0.5, draw.random() < 0.5
    limit = draw.choice([0.2, 0.5, 0.8])
    found = choose(Goal("x", most, (Bound("y", limit, at_least),)), outcomes, prompts)
    share = {k: {n: sum(v[:6]) / 6 for n, v in own.items()} for k, own in outcomes.items()}
    keeps = [k for k, s in share.items() if (s["y"] >= limit if at_least else s["y"] <= limit)]
    assert found.meets_bounds == bool(keeps)
    if keeps:
        best = (max if most else min)(share[k]["x"] for k in keeps)
        assert found.label in keeps
        assert share[found.label]["x"] == best
    else:
        assert share[found.label]["y"] == (max if at_least else min)(s["y"] for s in share.values())


def test_perplexity_weighs_tokens_and_bootstraps_texts():
    pairs = [(2.0, 1), (1.0, 9), (0.0, 0)]
    found = perplexity(pairs)
    assert (found.value, found.n) == (pytest.approx(math.exp(3 / 10)), 2)
    assert found.low == pytest.approx(math.exp(1 / 9))
    assert found.high == pytest.approx(math.exp(2))


def test_eval_sweep_recommends_for_adherence(tmp_path, capsys):
    argv = ["eval", "sweep", "--metric", "adherence", "--grid", "ratio=1,2", "--limit", "12",
            "--max-new-tokens", "8", "--no-plot", "--output", str(tmp_path / "run")]  # fmt: skip
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "on the other half:  adherence" in shown
    assert "the baseline there: adherence" in shown
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    best = found["recommendation"]
    assert best["label"] in ("ratio=1", "ratio=2")
    assert {b["measure"] for b in best["bounds"]} == {"fact", "perplexity"}
    n = sum(best[half]["adherence"]["n"] for half in ("chosen_on", "reported_on"))
    assert n == found["settings"]["data"]["n"]
