"""`trueline inspect` and `trueline demo`: files, printed paths and errors."""

from __future__ import annotations

import itertools
import json
import re
from importlib import resources

import pytest
import torch

from trueline import LinearAlignment, SamplingParams, generate, load_model
from trueline.cli import main
from trueline.engine.trace import read_jsonl
from trueline.evals.refusal import classify
from trueline.jobs.demo_counts import ANY_MODEL, load_held_out
from trueline.jobs.demonstration import DemoConfig, demonstrate
from trueline.records import style

QUESTION = "What is the capital of France?"
PIRATE = "Talk like a pirate."


@pytest.fixture(scope="module")
def tiny():
    """The bundled model."""
    return load_model("tiny")


@pytest.fixture(autouse=True)
def one_load(tiny, monkeypatch):
    """Every command works on the one model that the tests hold, on one thread."""
    monkeypatch.setattr("trueline.models.load.load_model", lambda *args, **options: tiny)
    yield
    assert torch.get_num_threads() == 1


def inspect(folder, *argv: str) -> int:
    return main(["inspect", QUESTION, "--output", str(folder), *argv])


def test_inspect_writes_page_figure_and_trace(tmp_path, capsys, tiny):
    assert inspect(tmp_path / "new" / "out", "--principle", PIRATE, "--max-new-tokens", "20") == 0
    folder = tmp_path / "new" / "out"
    sampling = SamplingParams(max_new_tokens=20)
    wanted = generate(tiny, QUESTION, LinearAlignment(principle=PIRATE), sampling)[0]
    tokens = read_jsonl(folder / "trace.jsonl")
    assert [t.token_id for t in tokens] == wanted.token_ids
    assert (folder / "trace.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (folder / "index.html").read_text(encoding="utf-8")
    for text in (QUESTION, PIRATE, "linear-alignment", "max_new_tokens"):
        assert text in page
    printed = capsys.readouterr().out
    assert wanted.text in printed
    for name in ("index.html", "trace.png", "trace.jsonl"):
        assert str(folder / name) in printed
    files = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    assert files == {"index.html", "trace.jsonl", "trace.png", "manifest.json", "results.json"}
    assert json.loads((folder / "results.json").read_text())["text"] == wanted.text


def test_inspect_replaces_no_other_run_and_no_other_file(tmp_path, capsys):
    short = ("--max-new-tokens", "3")
    assert inspect(tmp_path / "a", *short) == 0
    first = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert inspect(tmp_path / "a", *short) == 0  # the same again gives the same
    assert (tmp_path / "a" / "trace.jsonl").read_bytes() == first["trace.jsonl"]
    assert inspect(tmp_path / "a", *short, "--method", "self-cd") == 2
    assert "belongs to another run" in capsys.readouterr().err
    assert (tmp_path / "a" / "index.html").read_bytes() == first["index.html"]
    assert inspect(tmp_path / "a", *short, "--method", "self-cd", "--overwrite") == 0
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("a page of mine")
    for more in ((), ("--overwrite",)):
        assert inspect(site, *short, *more) == 2
    assert [p.name for p in site.iterdir()] == ["index.html"]
    assert (site / "index.html").read_text() == "a page of mine"


def test_inspect_names_its_folder_by_what_was_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for question in (QUESTION, "Why?"):
        assert main(["inspect", question, "--max-new-tokens", "2"]) == 0
    assert len(list((tmp_path / "runs").glob("inspect-*"))) == 2


def test_inspect_takes_a_system_message_and_top(tmp_path):
    assert inspect(tmp_path, "--method", "self-cd", "--system", "Be kind.", "--top", "2") == 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "Be kind.\\n\\nYou are a helpful" in page
    assert {len(t.branches[0].alternatives) for t in read_jsonl(tmp_path / "trace.jsonl")} == {2}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n", "2", "--temperature", "1"], "got `n` 2"),
        (["--top", "0"], "`top`"),
        (["--seed", str(2**63)], "`seed`"),
        (["--system", " "], "`--system` is only white space"),
        (["--method", "self"], 'Unknown method "self"'),
    ],
)
def test_inspect_names_what_is_wrong(tmp_path, capsys, argv, message):
    assert inspect(tmp_path, *argv) == 2
    assert message in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert inspect(tmp_path / "taken") == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inspect", QUESTION], ["demo", "--limit", "1"]])
def test_another_site_is_not_replaced(tmp_path, capsys, command):
    names = ("index.html", "report.md", "results.json")
    for name in names:
        (tmp_path / name).write_text("mine")
    assert main([*command, "--output", str(tmp_path)]) == 2
    assert "holds no run but index.html" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(names, "mine")


@pytest.mark.parametrize("command", [["inspect", QUESTION], ["demo"]])
def test_missing_matplotlib_stops_before_any_work(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr(style, "find_spec", lambda name: None)
    monkeypatch.setattr("trueline.models.load.load_model", pytest.fail)
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "pip install 'trueline[plots]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_demo_writes_report_results_and_figure(tmp_path, capsys):
    assert main(["demo", "--limit", "3", "--seed", "4", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in results["adherence"]][:2] == ["no principle", "principle prompt"]
    assert len(results["pairs"]) == len(results["unsafe"]) == 3
    assert {len(row["answers"]) for row in results["adherence"]} == {3}
    assert results["settings"]["seed"] == 4
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "trueline demo --limit 3 --seed 4" in report
    for name in (
        "AdaCD",
        "Self-CD, alpha 2.5",
        "no principle",
        "Linear Alignment, ratio 5, no mask",
    ):
        assert name in report
        assert name in printed
    tables = [line for line in report.splitlines() if line.startswith("|")]
    for head, rule in itertools.pairwise(tables):
        if rule.startswith("|---"):
            assert head.count("|") == rule.count("|")
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    for name in ("report.md", "demo.png", "results.json"):
        assert str(tmp_path / name) in printed


def test_demo_on_another_model_has_rules_that_do_not_know_it(tmp_path, monkeypatch):
    """The bundled model from its folder is a model like any other."""
    folder = str(resources.files("trueline") / "assets/tiny")
    assert DemoConfig(model=folder).limit == 24
    found = demonstrate(DemoConfig(limit=3, model=folder), tmp_path)
    assert {p["text"] for p in found.written["pairs"]} <= set(ANY_MODEL)
    refusals = {row.name: row for row in found.refusal}
    answers = refusals["safety prompt"].answers_safe
    assert refusals["safety prompt"].over_refusal.value == pytest.approx(
        sum(classify(text).refused for text in answers) / 3
    )
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"--model {folder}" in report
    assert "made by others" in report
    assert "2.2 million" not in report


@pytest.mark.parametrize("principle", ANY_MODEL)
def test_the_demos_rules_tell_what_follows(principle):
    follows = {
        "Talk like a pirate.": "Arrr, the moon be far!",
        "Give your answer as a list.": "Sure:\n\n- one\n- two",
        "Start your answer with a greeting.": "Hello! The moon is far.",
        "Sound very excited and use exclamation marks.": "Wow! It is far!",
        'Use the word "banana" in your answer.': "It is as far as many BANANAS.",
    }
    held_out = load_held_out(resources.files("trueline") / "assets/tiny/held_out.json")
    pattern = next(p.pattern for p in held_out.for_any_model().principles if p.text == principle)
    assert re.search(pattern, follows[principle])
    assert not re.search(pattern, "The moon is far away from us! It is not near.")


def test_demo_refuses_a_limit_below_one(tmp_path, capsys):
    assert main(["demo", "--limit", "0", "--output", str(tmp_path)]) == 2
    assert "`limit`" in capsys.readouterr().err
