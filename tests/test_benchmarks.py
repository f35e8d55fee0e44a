"""The benchmark runs from end to end on a model of two layers, and its checks can fail."""

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from benchmarks import decode

    threads = torch.get_num_threads()
    yield decode
    torch.set_num_threads(threads)


def test_quick_run_writes_the_report(benchmark, monkeypatch, tmp_path, capsys):
    few = {"vocab_size": 2048}
    monkeypatch.setitem(benchmark.SHAPES, "0.5B", benchmark.SHAPES["0.5B"] | few)
    monkeypatch.setattr("benchmarks._refill.LONGEST", 24)
    options = (
        "--models nano --dtypes float32 --batches 1 8 --new-tokens 5 --quick --refill 40 --output"
    )
    benchmark.main([*options.split(), str(tmp_path)])
    report = capsys.readouterr().out
    for heading in (
        "Tokens per second",
        "Self-CD loop",
        "Arithmetic",
        "Equality",
        "Targets",
        "fill up",
    ):
        assert heading in report
    found = json.loads((tmp_path / "decode.json").read_text())
    contenders = {row["contender"] for row in found["decode"] if row["batch"] == 1}
    assert {"generate", "guidance_scale", "LA, packed", "LA mask, torch"} <= contenders
    assert all(row["equal"] for key in ("equal", "prefixes", "self_cd") for row in found[key])
    assert len(found["equal"]) == 8
    greedy = next(row for row in found["decode"] if row["contender"] == "generate")
    assert greedy["ratio"] == greedy["step_ratio"] == 1
    assert [row["same_texts"] for row in found["refill"]] == ["40 of 40"] * 2
    # prompt + 4 steps of a run of 5 tokens
    assert greedy["seconds"] == pytest.approx(greedy["prompt"] + 4 * greedy["step"])


def test_check_sees_a_wrong_token(benchmark):
    tokens = {"generate": [[1, 2]], "plain, torch": [[1, 2]], "plain, packed": [[1, 3]]}
    assert [row["equal"] for row in benchmark.check(tokens)] == [True, False]


def test_copies_share_weights_but_not_packing(benchmark):
    from benchmarks._models import rivals

    models = rivals("nano", torch.float32)
    for copy in (models.torch.model, models.packed.model):
        assert copy is not models.rival
        pairs = zip(copy.parameters(), models.rival.parameters(), strict=True)
        assert all(mine is theirs for mine, theirs in pairs)
    assert models.rival.lm_head.weight is models.rival.model.embed_tokens.weight
    large = rivals("nano", torch.bfloat16)
    packed = [m for m in large.packed.model.modules() if "forward" in vars(m)]
    assert len(packed) == large.packed_modules
    assert not any("forward" in vars(m) for m in large.rival.modules())


def test_sorted_nucleus_by_hand(benchmark):
    from benchmarks._baselines import sorted_nucleus

    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.7, 0.1]]).log()
    # mass before each, likeliest first: 0, .5, .8, .95 and 0, .7, .85, .95
    assert sorted_nucleus(logits, 0.75).tolist() == [
        [True, True, False, False],
        [False, True, True, False],
    ]
    assert sorted_nucleus(logits, 0.01).sum(-1).tolist() == [1, 1]


def test_targets_are_none_where_nothing_ran(benchmark):
    from benchmarks._report import targets

    found = {"decode": [], "self_cd": [], "equal": [], "prefixes": []}
    found |= {"arithmetic": {"vocab": 4, "rows": []}}
    met = [row["met"] for row in targets(found)]
    assert met[:-1] == [None] * (len(met) - 1)
    assert met[-1] is None


def test_help_has_examples(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(["--help"])
    assert "python benchmarks/decode.py --quick" in capsys.readouterr().out
