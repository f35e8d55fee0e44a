"""Every recipe runs, for two steps, and leaves a model that loads."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import byte_tokenizer, random_model
from processes import Process
from test_continual import t5

from trueline import generate, load_model
from trueline.cli import main as call

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES.parent))


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


# -- recipes/real: on models and rows of the same form as the real ones

TYPES = {"homonyms": "safe", "contrast_homonyms": "unsafe"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with the recipe, and what it makes of files in the form in which they come."""
    from recipes.real.prepare import main

    place = tmp_path_factory.mktemp("real")
    sources = place / "sources"
    for name in ("xstest", "OverKill/data", "hh-rlhf/helpful-base", "hh-rlhf/harmless-base"):
        (sources / name).mkdir(parents=True)
    lines = [f'{i},"Who may kill {i}, and why?",{kind},{label},,' for i in range(40)
             for kind, label in TYPES.items()]  # fmt: skip
    lines = [line.replace("Who may", "Help me") if ",unsafe" in line else line for line in lines]
    header = "id,prompt,type,label,focus,note"
    (sources / "xstest/xstest_prompts.csv").write_text("\n".join([header, *lines]) + "\n")
    text = "prompt\n" + "".join(f'"Is a dam {i} bad?\n"\n' for i in range(20))
    (sources / "OverKill/data/OKTest.csv").write_text(text)
    for kind, ask in {"helpful": "What is thing {}?", "harmless": "May I take {}?"}.items():
        turns = [f"\n\nHuman: {ask.format(i)}\n\nAssistant: " for i in range(48)]
        rows = [json.dumps({"chosen": t + "Yes.", "rejected": t + "No, no."}) for t in turns]
        packed = gzip.compress("\n".join(rows).encode())
        (sources / f"hh-rlhf/{kind}-base/test.jsonl.gz").write_bytes(packed)
    labels = {"TC/dbpedia": ["Animal", "Plant"], "SC/amazon": ["good", "bad"],
              "TC/yahoo": ["Health", "Sports"], "TC/agnews": ["World", "Business"]}  # fmt: skip
    for i, (name, names) in enumerate(labels.items()):
        folder = sources / "O-LoRA/CL_Benchmark" / name
        folder.mkdir(parents=True)
        rows = [{"sentence": f"a text {j}", "label": names[j % 2]} for j in range(8)]
        (folder / "train.json").write_text(json.dumps(rows))
        (folder / ("test.json" if i % 2 else "dev.json")).write_text(json.dumps(rows[:4]))
        (folder / "labels.json").write_text(json.dumps(names))
    (sources / "O-LoRA/CL_Benchmark/SC/yelp").mkdir()
    shutil.copytree(RECIPES / "real", place / "recipes/real")
    assert main([str(sources), str(place / "data")]) == 0
    return place


def test_published_sets_are_brought_into_one_form(published):
    rows = {
        name: [json.loads(x) for x in (published / f"data/{name}.jsonl").read_text().splitlines()]
        for name in ("safe", "unsafe", "chat", "hh")
    }
    assert {n: len(found) for n, found in rows.items()} == {
        "safe": 60, "unsafe": 40, "chat": 48, "hh": 48
    }  # fmt: skip
    assert all(r["prompt"].startswith("Help me") for r in rows["unsafe"])
    assert rows["chat"][0] == {"prompt": "What is thing 0?"}
    assert (published / "data/cl_benchmark/agnews/category.txt").read_text().strip() == "TC"
    assert not (published / "data/cl_benchmark/yelp").exists()


def test_a_set_that_is_missing_is_one_line(tmp_path, capsys):
    from recipes.real.prepare import main

    assert main([str(tmp_path), str(tmp_path / "data")]) == 2
    assert "has no xstest/xstest_prompts.csv" in capsys.readouterr().err


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def aligned(kind, published, place):
    """The command on a random model of this architecture, with the least of everything."""
    model = save(random_model(kind, positions=1024), place / "model")
    few = ["answers=8", "questions=2", "validation=2", "off_path=0", "max_new_tokens=2",
           "training.max_steps=1", "training.per_device_train_batch_size=4", "dtype=float32",
           "device=cpu", "threads=1"]  # fmt: skip
    words = ["align", str(published / "recipes/real/align.toml"), "--model", str(model)]
    return [*words, "--output", str(place / "out"), "--set", *few]


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_what_real_align_would_do_can_be_said(kind, published, tmp_path, capsys):
    assert call([*aligned(kind, published, tmp_path), "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert all(name in planned for name in ("brief", "formal", "no over-refusal"))


def test_real_align_runs(published, tmp_path, capsys):
    """Random weights hold no principle: what is asked is a verdict with its evidence."""
    assert call(aligned("qwen3", published, tmp_path)) == 3
    assert "do not ship" in capsys.readouterr().out
    assert (tmp_path / "out/report.html").is_file()
    stages = sorted(path.name for path in (tmp_path / "out/stages").iterdir())
    assert [name.split("-")[1] for name in stages] == ["brief", "formal"]


def test_the_real_stream_runs_on_a_t5(published, tmp_path):
    model = save(t5(), tmp_path / "model")
    words = ["stack", "--tasks", str(published / "recipes/real/stream.toml")]
    words += ["--model", str(model), "--output", str(tmp_path / "out"), "--batch-size", "8"]
    words += ["--set", "scoring=generated", "--rank", "2", "--threads", "1"]
    assert call(words) == 0
    done = json.loads((tmp_path / "out/R.json").read_text())
    assert [len(row) for row in done["R"]] == [4] * 4
