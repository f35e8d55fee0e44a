"""Every recipe runs, for two steps, and leaves a model that loads."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
from processes import Process

from trueline import generate, load_model

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.slow
def test_tiny(tmp_path):
    arguments = ("--max-steps", 2, "--output", tmp_path / "tiny")
    done = Process(script=RECIPES / "tiny/run.py", arguments=arguments)
    assert done.wait() == 0, done.said
    model = load_model(tmp_path / "tiny")
    assert generate(model, "What is the moon?")[0].token_ids
    report = json.loads((tmp_path / "tiny/results.json").read_text())
    assert 0 <= report["refusals"]["safety prompt"]["unsafe"]["mean"] <= 1
    shipped = Path(__file__).parents[1] / "src/trueline/assets/tiny"
    assert {p.name for p in shipped.iterdir()} - {"README.md"} <= {
        p.name for p in (tmp_path / "tiny").iterdir()
    }


def test_the_bundled_model_is_what_its_card_says():
    folder = Path(__file__).parents[1] / "src/trueline/assets/tiny"
    model = load_model("tiny")
    assert sum(p.numel() for p in model.model.parameters()) <= 5_000_000
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 10_000_000
    assert model.max_positions >= 1024
    assert model.model.dtype.is_floating_point
    assert "system" in model.tokenizer.chat_template


def test_the_prompts_of_align_are_on_one_side_each(tmp_path):
    sys.path.insert(0, str(RECIPES.parent))
    from recipes.align.questions import write_prompts
    from trueline.jobs.project_prompts import Prompts, read_source, shared

    cfg = tomllib.loads((RECIPES / "align/config.toml").read_text())
    cfg["count"] = {"train": 40, "validation": 8, "held_out": 12}
    principles = write_prompts(cfg, 0, tmp_path)
    sets = [Prompts.of(read_source(path)) for path in sorted(tmp_path.glob("*.jsonl"))]
    assert len(sets) == len(principles) + 3
    assert shared(sets) == []
    for found in sets:
        assert len(found.train) >= 40
        assert len(found.validation) >= 8
        assert len(found.held_out) >= 12


@pytest.mark.slow
def test_align(tmp_path):
    words = ("--quick", "--arms", "none", "--seeds", "0", "--output", tmp_path)
    done = Process(script=RECIPES / "align/run.py", arguments=words)
    assert done.wait() == 0, done.said
    assert any(row.startswith("| none | 1 | ") for row in done.said.splitlines())
    assert (tmp_path / "none-0" / "report.html").is_file()
