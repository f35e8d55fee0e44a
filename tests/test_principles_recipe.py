"""`recipes/principles`: what is learned and asked, a chain that resumes, and its table."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("peft")
ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings(
    # transformers renamed the option; PEFT still uses the old name.
    "ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is:FutureWarning"
)


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from recipes.principles import run

    return run


@pytest.fixture
def cfg():
    return tomllib.loads((ROOT / "recipes/principles/config.toml").read_text())


def test_half_of_the_rows_have_a_principle_and_an_address(recipe, cfg):
    from recipes.principles.questions import bound_rows, measures

    for table in cfg["principle"]:
        rows = bound_rows(table, cfg, 0)
        assert len(rows) == cfg["training"]["responses"]
        taught = [row for row in rows if row["principle"]]
        assert len(taught) == (1 - cfg["training"]["keep"]) * len(rows)
        assert all(row["prompt"].startswith(table["cue"]) for row in taught)
        assert not any(
            row["prompt"].startswith(table["cue"]) for row in rows if not row["principle"]
        )
        trained = {row["prompt"] for row in rows}
        for probes in measures(cfg, 0, "test").values():
            assert len(probes) == cfg["questions"]
            assert not trained & {probe.prompt for probe in probes}, "asked in a known wording"


def test_learned_and_kept_by_hand(recipe):
    # Of "a" .5 at its stage and .25 at the end, of "b" 1 and 1.
    runs = [{"a": {"mean": a}, "b": {"mean": b}} for a, b in ((0.5, 0.0), (0.4, 1.0), (0.25, 1.0))]
    assert recipe.kept(runs, ["a", "b"]) == (0.75, 0.625)
    row = {"trigger refused": {"mean": 0.25}, "facts": {"mean": 0.5}}
    assert recipe.total(row) == (0.75 + 0.5) / 2


def test_a_quick_chain_holds_every_stage_and_is_not_run_again(recipe, tmp_path, capsys):
    words, folder = ["--quick", "--ways", "drift", "--output"], tmp_path
    recipe.main([*words, str(folder)])
    capsys.readouterr()
    last = folder / "drift-0" / "4-over-refusal"
    assert len(list(last.glob("stages/*/adapter_model.safetensors"))) == 4
    assert (last / "adapter_model.safetensors").exists()
    report = json.loads((folder / "results.json").read_text())["results"]
    after = report["ways"]["drift"]["after"]
    assert len(after) == 4
    assert {m: v["n"] for m, v in after[0].items()} == dict.fromkeys(report["before"], 4)
    weights = last / "adapter_model.safetensors"
    made = weights.stat().st_mtime_ns
    recipe.main([*words, str(folder)])
    assert weights.stat().st_mtime_ns == made
    table = capsys.readouterr().out
    for stage in ("captain", "unit 7", "sheriff", "over-refusal"):
        assert f"\n| {stage} | " in table
    assert json.loads((folder / "results.json").read_text())["results"] == report
