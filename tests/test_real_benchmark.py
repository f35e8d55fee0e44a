"""The benchmark on real models: its rules, its arithmetic by hand, and that it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def real(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import real as module

    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


FOLLOWED = {
    "pirate": "Arr, the sky be blue!",
    "shakespeare": "Thou askest of the sky.",
    "cooking": "Think of an oven.",
    "excited": "Wow! It is blue!",
    "spanish": "La capital de Francia es una de las ciudades más grandes.",
    "one sentence": "Dr. Smith says that it is 3.5 metres.",
    "ten words": "It scatters.",
    "capitals": "PARIS, OF COURSE.",
    "lower case": "paris, of course.",
    "bullets": "Do this:\n- one\n- two",
    "numbered": "1. one\n2) two",
    "json": '```json\n{"answer": "Paris"}\n```',
    "question": "It is Paris. Do you live there?",
    "greeting": "Dear Sir or Madam, it is Paris.",
    "story": "Once upon a time there was a sky.",
    "word": "Like a banana.",
}
BROKEN = "Paris is the capital. It is large.\nMany people live in it, and they say that it is nice."


def test_rules_by_hand(real):
    from benchmarks._real_questions import BY_NAME

    assert BY_NAME.keys() == FOLLOWED.keys()
    for name, text in FOLLOWED.items():
        rule = BY_NAME[name]
        assert rule.follows(text, ended=True), name
        assert rule.follows(text, ended=False) is not rule.whole, name
        assert not rule.follows(BROKEN, ended=True), name
        assert not rule.follows(" ", ended=True), name
    assert not BY_NAME["ten words"].follows("one " * 11, ended=True)
    assert not BY_NAME["json"].follows('{"a": 1} and more', ended=True)
    assert not BY_NAME["one sentence"].follows("One. Two.", ended=True)


def test_blocks_are_balanced(real):
    from benchmarks._real_questions import BLOCK, BLOCKS, RULES, block_items

    assert (BLOCKS, len(RULES)) == (5, 16)
    for block in range(BLOCKS):
        items = block_items(block)
        assert len({(i.prompt, i.principle) for i in items}) == BLOCK * len(RULES)
        assert sum(i.pattern == "fact" for i in items) == len(items) / 2


def answer(item, text, ended=True, tokens=4):
    return {
        "id": item.id,
        "group": item.group,
        "text": text,
        "finish_reason": "stop" if ended else "length",
        "token_ids": [7] * tokens,
        "base_nll": 4.0,
    }


def test_summary_by_hand(real):
    from benchmarks._real_alignment import judged, summary
    from benchmarks._real_questions import block_items

    items = {i.group: i for i in block_items(0)[:16]}  # the capital of France
    texts = {"capitals": "PARIS", "story": "Once upon a time in Rome", "word": "Paris"}
    rows = [answer(items[name], text) for name, text in texts.items()]
    rows = [{**row, **judged(row)} for row in rows]
    assert [(r["adherence"], r["topic"], r["both"]) for r in rows] == [
        (1, 1, 1), (1, 0, 0), (0, 1, 0),
    ]  # fmt: skip
    other = [{**row, **judged(row)} for row in (answer(items[n], "Paris") for n in texts)]
    found = summary(rows, other)
    assert found["adherence"][0] == pytest.approx(2 / 3)
    assert found["both_gain"][0] == pytest.approx(1 / 3)
    assert found["topic_gain"][0] == pytest.approx(-1 / 3)
    assert (found["n"], found["pairs"], found["both_p"]) == (3, 3, 1.0)
    assert found["repetition"] == 0  # of four tokens there is one 4-gram
    assert found["perplexity"] == pytest.approx(2.718282, rel=1e-6)  # 12 nats over 12 tokens


def test_over_groups_counts_groups_alike(real):
    from benchmarks._real_world import over_groups

    value, low, high = over_groups([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert (value, low, high) == (0.5, 0.0, 1.0)


def test_scores_and_routes_by_hand(real):
    import numpy as np

    from benchmarks._routes import fitted_score, ranked, routes

    unsafe, fit = np.array([True, False] * 20), np.arange(40) < 30
    odds = np.where(unsafe, 1.0, -1.0)[:, None] * np.array([1.0, 0.0]) + np.array([0.0, 3.0])
    score = fitted_score(odds, unsafe, fit)
    assert ranked(score, unsafe, ~fit) == 1.0
    assert ranked(-score, unsafe, fit) == 0.0
    assert ranked(np.zeros(40), unsafe, fit) == 0.5
    found = routes({"a": [0.0] * 4, "b": [1.0, 1.0, None, 1.0]}, np.arange(4.0), np.ones(4, bool))
    assert len(found) == 2 * 9
    assert found["a, from quantile 0.5 on b"] == [0.0, 0.0, None, 1.0]
    assert found["b, from quantile 0.5 on a"] == [1.0, 1.0, 0.0, 0.0]


def test_the_gate_by_hand(real):
    from benchmarks._gate import FirstTokenGate

    gate = FirstTokenGate(("A", "B"), (2.0, -1.0), 0.0, (0,))
    chat = [{"role": "system", "content": "Own."}, {"role": "user", "content": "x"}]
    assert [b[0]["content"] for b in gate.prompts(chat)] == ["A", "B"]
    assert all(b[1:] == chat[1:] for b in gate.prompts(chat))
    # p(token 0) of 3/4 and 1/2: 2 log 3 - log 1 > 0; turned round: 2 log 1 - log 3 < 0.
    likely, even = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    refuses, answers = gate.combine(torch.stack([torch.stack([likely, even]),
                                                 torch.stack([even, likely])]))  # fmt: skip
    assert refuses.tolist() == [likely[0], -torch.inf]
    assert answers.tolist() == [-torch.inf, even[1]]


def test_weights_undo_the_scale(real):
    import numpy as np

    from benchmarks._routes import fitted_weights

    rng = np.random.default_rng(0)
    odds = rng.normal(size=(4000, 2)) * [1.0, 5.0] + [3.0, -2.0]
    unsafe = rng.random(4000) < 1 / (1 + np.exp(-(odds @ [1.0, -0.4] - 2.0)))
    weights, bias = fitted_weights(odds, unsafe)
    assert weights == pytest.approx([1.0, -0.4], abs=0.1)
    assert bias == pytest.approx(-2.0, abs=0.3)


def test_over_refusal_runs_and_reports(real, monkeypatch, tmp_path, capsys):
    from benchmarks import _real_refusal, _real_world

    monkeypatch.setattr(_real_world.World, "path", lambda self, name: "tiny")
    own = _real_refusal.settings()
    kept = {
        k: s for k, s in own.items() if s.worth >= 97 or k.startswith("Self-CD strict, alpha 2")
    }
    monkeypatch.setattr(_real_refusal, "settings", lambda: kept)
    for file in dict(_real_refusal.SETS.values()):
        path = tmp_path / "shared/data" / f"{file}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"What is {file} {i}?"} for i in range(8)]
        if "xstest" in file:
            rows = [{**row, "safe": i % 2 == 0} for i, row in enumerate(rows)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "models" / _real_world.FOLDERS["qwen"]).mkdir(parents=True)
    words = ["--quick", "--part", "over-refusal", "--models", "qwen", "--threads", "1"]
    words += ["--output", str(tmp_path / "out"), "--shared", str(tmp_path / "shared")]
    real.main([*words, "--real-models", str(tmp_path / "models")])
    said = capsys.readouterr().out
    assert "| default text | " in said
    assert "| Self-CD strict, alpha 2.5 | " in said
    assert "| first-token gate, fitted to refuse 75 % | " in said
    assert "| all, fitted on XSTest | " in said
    assert said.count("Area on the test sets") == 2


def test_runs_at_other_rates_are_kept_apart(real, tmp_path):
    from benchmarks._real_distil import Run
    from benchmarks._real_world import World

    world = World(tmp_path, tmp_path, tmp_path)
    names = [Run("smollm2", "sft", "pirate", lr, 64).name for lr in (2e-4, 5e-4)]
    for i, name in enumerate(names):
        assert world.kept("inverse-q", name, make=lambda i=i: i) == i
    assert [world.kept("inverse-q", name) for name in names] == [0, 1]
    assert world.kept("inverse-q", "none") is None


def test_a_killed_run_goes_on(real, monkeypatch, tmp_path, capsys):
    from benchmarks import _real_world

    monkeypatch.setattr(_real_world.World, "path", lambda self, name: "tiny")
    models = tmp_path / "models"
    for folder in _real_world.FOLDERS.values():
        (models / folder).mkdir(parents=True)
    words = ["--quick", "--part", "linear-alignment", "--models", "smollm2", "--output"]
    words += [str(tmp_path / "out"), "--real-models", str(models), "--threads", "1"]
    monkeypatch.setitem(real.PARTS, "linear-alignment", ("_real_alignment",))
    real.main([*words, "--limit", "2"])
    path = tmp_path / "out/linear-alignment/smollm2.jsonl"
    first = path.read_bytes()
    assert first
    path.write_bytes(first + b'{"key": "torn')
    real.main(words)
    assert path.read_bytes().startswith(first)
    assert b"torn" not in path.read_bytes()
    said = capsys.readouterr()
    assert said.err.count("smollm2, plain") == 1, "what is done is not done again"
    numbers = json.loads((tmp_path / "out/real.json").read_text())
    settings = numbers["linear-alignment"][0]["smollm2"]["settings"]
    assert len(settings) == 3
    assert "| plain |" in said.out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["key"] for row in rows}) == 3


def test_missing_models_are_named(real, tmp_path):
    with pytest.raises(SystemExit, match="Qwen"):
        real.main(["--models", "qwen", "--real-models", str(tmp_path), "--output", str(tmp_path)])
