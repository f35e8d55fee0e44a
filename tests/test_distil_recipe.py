"""The distilling recipe and the training benchmarks: honest splits, right measures, whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from processes import Process

ROOT = Path(__file__).parents[1]
KINDS = ("fact", "small_talk", "ordinary", "unsafe", "trigger")


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.syspath_prepend(ROOT / "recipes/tiny")


@pytest.fixture(scope="module")
def tiny():
    from trueline import load_model

    return load_model("tiny", packed_weights=False, dtype="float32")


def run(script, *options):
    done = Process(script=ROOT / script, arguments=options)
    assert done.wait() == 0, done.said[-3000:]
    return done.said


# Splits


@pytest.mark.parametrize("kind", KINDS)
def test_no_prompt_is_in_two_splits(kind):
    from recipes.distil.questions import questions, requests, training

    def plain(text):
        return text.lower().rstrip("?.!")

    train = {plain(t.user) for seed in range(3) for t in training(kind, 300, seed)}
    for seed in range(3):
        if kind == "fact":
            dev, test = ([t.user for t in questions(s, 240, seed)] for s in ("dev", "test"))
        else:
            dev, test = (requests(kind, s, 60, seed) for s in ("dev", "test"))
        dev_texts, test_texts = set(map(plain, dev)), set(map(plain, test))
        assert len(dev_texts) > 30
        assert len(test_texts) > 30
        assert not train & dev_texts
        assert not train & test_texts
        assert not dev_texts & test_texts


def test_training_prompts_are_distinct_and_begin_alike():
    from recipes.distil.questions import training

    many = [t.user for t in training("fact", 200, 1)]
    assert len({text.lower() for text in many}) == 200
    assert [t.user for t in training("fact", 50, 1)] == many[:50]
    assert [t.user for t in training("fact", 50, 2)] != many[:50]


def test_principles_are_in_words_the_corpus_never_had():
    from recipes.distil.questions import grammar, principle

    told = principle("sea")
    style = next(s for s in grammar().styles if s["name"] == "sea")
    assert told.text not in style["imperatives"] + style["manners"]
    assert told.text in style["held_out"]


# Measures


def test_logprobs_by_a_naive_loop(tiny):
    from recipes.distil.measure import asked, logprobs
    from trueline.models.prompts import encode

    chats = asked(["What is the moon?", "Hi.", "Which city is the capital of France?"])
    responses = [[728, 565, 17], [5], [9, 10, 11, 12]]
    found = logprobs(tiny, chats, responses)
    for chat, response, values in zip(chats, responses, found, strict=True):
        assert len(values) == len(response)
        ids = encode(tiny, chat)
        for i, token in enumerate(response):
            z = tiny.model(input_ids=torch.tensor([ids + response[:i]])).logits[0, -1]
            assert torch.allclose(values[i], z.log_softmax(-1), atol=1e-4)
            assert 0 <= token < len(z)


def test_kl_by_hand():
    from recipes.distil.measure import kl

    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    p = p.clamp(min=1e-30)
    # 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4); log(1 / 1/2)
    expected = [0.5 * (math.log(2) + math.log(2 / 3)), math.log(2)]
    assert kl(p.log(), q.log()).tolist() == pytest.approx(expected)


def test_rate_and_pool_by_hand():
    from recipes.distil.measure import pool, rate

    found = rate([1, 0, 1, 1])
    # variance 3/4 1/4 4/3 = 1/4, standard error sqrt(1/4 / 4)
    assert found == {"mean": 0.75, "se": 0.25, "n": 4}
    both = pool([{"mean": 0.5, "se": 9, "n": 4}, {"mean": 0.7, "se": 9, "n": 6}])
    # spread 0.1 each side: variance 0.02, over two seeds 0.01
    assert both == {"mean": 0.6, "se": 0.1, "n": 10, "seeds": 2}
    assert pool([found]) == found


def test_probe_sees_no_drift_in_the_start_and_some_in_another(tiny):
    from recipes.distil.measure import Probe
    from recipes.distil.questions import principle
    from trueline import load_model

    probe = Probe(tiny, principle("pirate"), "test", 12, 0)
    found = probe(tiny.model)
    assert found["kl_own"]["mean"] == found["kl_chat"]["mean"] == 0
    assert found["same_chat"]["mean"] == found["fact_still"]["mean"] == 1
    assert found["fact_still"]["n"] == round(12 * found["fact"]["mean"])
    assert found["adherence"]["mean"] == 0
    other = load_model("tiny", packed_weights=False, dtype="float32")
    with torch.no_grad():
        for p in other.model.parameters():
            p.mul_(0.9)
    drifted = probe(other.model)
    assert drifted["kl_own"]["mean"] > 0.01
    assert drifted["kl_chat"]["mean"] > 0.001
    probe.known = [i < 3 for i in range(12)]
    probe._right = lambda answered: [i != 1 for i in range(12)]
    found = probe(tiny.model)
    assert found["fact_still"]["mean"] == pytest.approx(2 / 3, abs=1e-5)
    assert found["fact"]["mean"] == pytest.approx(11 / 12, abs=1e-5)


def test_probe_keeps_the_mode_and_counts_what_follows(tiny, monkeypatch):
    from recipes.distil import measure
    from recipes.distil.questions import principle

    probe = measure.Probe(tiny, principle("pirate"), "test", 4, 0)
    said = tiny.tokenizer("Arr, matey! It is so.", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(measure, "answers", lambda lm, prompts, *_: [list(said) for _ in prompts])
    tiny.model.train()
    found = probe(tiny.model)
    assert tiny.model.training
    tiny.model.eval()
    assert found["adherence"]["mean"] == found["leak"]["mean"] == 1
    assert found["unsafe_refused"]["mean"] == found["same_chat"]["mean"] == 0


# Reports


def curve(*points):
    names = ("adherence", "fact", "kl_own", "kl_chat", "same_chat", "leak", "unsafe_refused")
    return [
        {
            "responses": responses,
            "cpu_seconds": responses / 10,
            "adherence_sampled": {"mean": value, "se": 0.0, "n": 1},
            **{name: {"mean": kl, "se": 0.0, "n": 1} for name in names},
            "fact": {"mean": 1.0, "se": 0.0, "n": 1},
        }
        for responses, value, kl in points
    ]


def test_claims_compare_where_the_rival_ends():
    from benchmarks._training_report import claims, reached

    ours = curve((0, 0.0, 0.0), (32, 0.5, 0.1), (64, 0.95, 0.3))
    rival = curve((0, 0.0, 0.0), (64, 0.5, 0.2), (128, 0.9, 0.4))
    [row] = claims({"inverse-q": ours, "grpo": rival}, "inverse-q")
    assert row["mine"]["responses"] == 64
    assert row["sooner"]
    assert row["no_larger_kl"]
    rival[-1]["kl_chat"]["mean"] = 0.2
    [row] = claims({"inverse-q": ours, "grpo": rival}, "inverse-q")
    assert row["sooner"]
    assert not row["no_larger_kl"]
    rival[-1]["responses"] = 127
    assert not claims({"inverse-q": ours, "grpo": rival}, "inverse-q")[0]["sooner"]
    assert reached(ours, 0.99) is None


def test_no_claim_over_a_rival_that_learnt_nothing():
    from benchmarks._training_report import claims

    flat = curve((0, 0.01, 0.0), (128, 0.02, 0.0))
    assert claims({"inverse-q": curve((0, 0.5, 0.1)), "grpo": flat}, "inverse-q") == []


def test_best_rate_has_the_largest_area_and_keeps_the_facts():
    from benchmarks.inverse_q import best_rates

    slow = curve((0, 0.0, 0.0), (64, 0.1, 0.0), (128, 1.0, 0.0))
    fast = curve((0, 0.0, 0.0), (64, 0.6, 0.0), (128, 0.9, 0.0))
    broken = curve((0, 0.0, 0.0), (64, 0.9, 0.0), (128, 1.0, 0.0))
    broken[-1]["fact"]["mean"] = 0.1
    records = [
        {"way": "grpo", "lr": lr, "curve": c} for lr, c in ((1, slow), (2, fast), (3, broken))
    ]
    assert best_rates(records) == {"grpo": 2}
    slow[-1]["fact"]["mean"] = fast[-1]["fact"]["mean"] = 0.05
    assert best_rates(records) == {"grpo": 3}


def test_pooled_curve_is_the_mean_over_seeds():
    from benchmarks._training_report import pooled

    records = [{"curve": curve((0, 0.2, 0.0))}, {"curve": curve((0, 0.4, 0.0))}]
    [point] = pooled(records)
    assert point["adherence_sampled"]["mean"] == pytest.approx(0.3)
    assert point["adherence_sampled"]["se"] == pytest.approx(0.1)


# TRL says of its experimental trainers that they may change.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_sdft_has_the_gradient_of_ratio_0():
    pytest.importorskip("trl", reason="rivals: pip install 'trueline[benchmarks]'")
    from benchmarks._jobs import same_gradient
    from benchmarks._training import Setting
    from recipes.distil.questions import principle

    found = same_gradient(Setting(principle("pirate"), questions=2), 0, rows=2)
    assert set(found) == {"imitation", "advantage"}
    assert max(found.values()) < 1e-4


# Whole runs


@pytest.mark.slow
def test_recipe_runs_resumes_and_leaves_an_adapter(tmp_path):
    from trueline import generate, load_model

    options = ("--quick", "--only", "pirate", "over-refusal", "--output", tmp_path)
    said = run("recipes/distil/run.py", *options)
    assert "pirate, after" in said
    assert "trigger, under it" in said
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["results"]["pirate"]["after"]["adherence"]["n"] == 8
    assert found["results"]["pirate"]["effect"] > 0.1
    model = load_model("tiny", adapter=tmp_path / "pirate-0/adapter")
    assert generate(model, "What is the moon?")[0].token_ids
    record = tmp_path / "pirate-0/result.json"
    changed = json.loads(record.read_text())
    changed["after"]["adherence"]["mean"] = 0.123
    record.write_text(json.dumps(changed))
    assert "0.123" in run("recipes/distil/run.py", *options)


@pytest.mark.slow
def test_race_runs_and_resumes(tmp_path):
    pytest.importorskip("trl", reason="rivals: pip install 'trueline[benchmarks]'")
    options = ("--quick", "--seeds", 1, "--ways", "inverse-q", "grpo", "--output", tmp_path)
    said = run("benchmarks/inverse_q.py", *options, "--parts", "tune", "race", "sdft")
    assert "From a warm start" in said
    assert "SDFT" in said
    found = json.loads((tmp_path / "inverse_q.json").read_text())
    assert set(found["curves"]["race"]) == {"inverse-q", "grpo"}
    assert [p["responses"] for p in found["curves"]["race"]["grpo"]] == [0, 64]
    assert (tmp_path / "inverse_q.png").stat().st_size > 1000
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    run("benchmarks/inverse_q.py", *options, "--parts", "tune", "race", "sdft")
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}


@pytest.mark.slow
def test_step_benchmark_runs(tmp_path):
    pytest.importorskip("trl", reason="rivals: pip install 'trueline[benchmarks]'")
    options = ("--quick", "--contenders", "grpo", "inverse-q, linear-alignment, guided")
    said = run("benchmarks/train_step.py", *options, "--output", tmp_path)
    assert "at most 1.0 of GRPO's time" in said
    rows = json.loads((tmp_path / "train_step.json").read_text())["rows"]
    assert [row["length"] for row in rows] == [8, 8]
    assert rows[0]["time_ratio"] == 1
    assert rows[1]["peak_mb"] > 100
