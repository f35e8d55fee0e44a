"""`trueline eval` and `trueline report`: what they write, what they refuse, how they resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import trueline.engine.decoding
from trueline import SamplingParams, SelfCD, generate, load_model
from trueline.cli import main
from trueline.cli.eval import PARTS
from trueline.jobs import judgements

REFUSAL = ("eval", "refusal", "--limit", 6, "--max-new-tokens", 12, "--batch-size", 4)


TEXTS = ["helpful text", '"You are a helpful, respectf…" alone']
"""The system texts beside Self-CD on the bundled model, which has no default text."""


@pytest.fixture(scope="module")
def tiny():
    """The bundled model."""
    return load_model("tiny")


@pytest.fixture(autouse=True)
def one_load(tiny, monkeypatch):
    """Every command works on the one model that the tests hold."""
    monkeypatch.setattr("trueline.models.load.load_model", lambda *args, **options: tiny)


def call(*argv: object) -> int:
    return main([str(a) for a in argv])


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory):
    """A finished run over three alphas, with its plot."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    patch = pytest.MonkeyPatch()
    patch.setattr("trueline.models.load.load_model", lambda *args, **options: tiny)
    assert call(*REFUSAL, "--alpha", "0:2:1", "--output", folder) == 0
    patch.undo()
    return folder


# Refusal


def test_a_sweep_writes_every_point_and_all_that_repeats_it(swept, tiny):
    found = results(swept)
    labels = [p["label"] for p in found["points"]]
    assert labels == ["plain", *TEXTS, "alpha=0", "alpha=1", "alpha=2"]
    for point in found["points"]:
        for name in ("over_refusal", "harmful_refusal"):
            measure = point["measures"][name]
            assert measure["n"] == len(measure["outcomes"]) == 6
            assert 0 <= measure["low"] <= measure["value"] <= measure["high"] <= 1
        assert point["quality"]["perplexity"] >= 1
    settings = found["settings"]
    assert settings["model"]["name"] == "tiny"
    assert len(settings["model"]["hash"]) == 16
    assert {"trueline", "torch", "transformers"} <= set(settings["versions"])
    assert settings["sampling"]["max_new_tokens"] == 12
    assert (settings["seed"], settings["data"]["n"]) == (0, 12)
    assert found["command"].startswith("trueline eval refusal --limit 6")
    assert (swept / "plot.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(x) for x in (swept / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * 12
    own = [r for r in rows if r["point"] == "alpha=2"]
    wanted = generate(
        tiny, [r["prompt"] for r in own], SelfCD(alpha=2.0), SamplingParams(max_new_tokens=12)
    )
    assert [r["token_ids"] for r in own] == [c.token_ids for c in wanted]


def test_alpha_1_is_the_plain_model(swept):
    points = {p["label"]: p for p in results(swept)["points"]}
    assert points["alpha=1"]["measures"] == points["plain"]["measures"]
    assert set(points["alpha=1"]["p_baseline"].values()) == {1.0}


def test_the_same_command_computes_nothing_again(swept, monkeypatch, capsys):
    before = {p.name: p.read_bytes() for p in swept.iterdir() if p.name != "manifest.json"}
    monkeypatch.setattr(trueline.engine.decoding.Decoder, "run", lambda *a, **o: 1 / 0)
    assert call(*REFUSAL, "--alpha", "0:2:1", "--output", swept) == 0
    assert "72 responses are there already" in capsys.readouterr().err
    after = {p.name: p.read_bytes() for p in swept.iterdir() if p.name != "manifest.json"}
    assert {n for n in before if before[n] != after[n]} <= {"plot.png"}


@pytest.mark.parametrize("batches", [0, 2, 5])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, monkeypatch, batches):
    command = (*REFUSAL, "--alpha", "0,2", "--no-plot", "--output", tmp_path / "run")
    assert call(*command) == 0
    names = ("responses.jsonl", "verdicts.jsonl", "results.json", "results.md")
    whole = {name: (tmp_path / "run" / name).read_bytes() for name in names}
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    collect, seen = trueline.engine.decoding.Decoder.complete, []

    def killed(self, prompts, **options):
        seen.append(len(prompts))
        if len(seen) == batches + 1:
            raise KeyboardInterrupt
        return collect(self, prompts, **options)

    monkeypatch.setattr(trueline.engine.decoding.Decoder, "complete", killed)
    assert call(*command) == 130
    assert not (tmp_path / "run" / "results.json").exists()
    with open(tmp_path / "run" / "responses.jsonl", "ab") as file:
        file.write(b'{"key": "half a li')
    seen.clear()
    monkeypatch.setattr(
        trueline.engine.decoding.Decoder,
        "complete",
        lambda *a, **o: seen.append(1) or collect(*a, **o),
    )
    assert call(*command) == 0
    assert len(seen) == 15 - batches
    assert {name: (tmp_path / "run" / name).read_bytes() for name in names} == whole


def test_another_runs_folder_is_refused(swept, capsys):
    assert call(*REFUSAL, "--alpha", "0:2:1", "--seed", 1, "--output", swept) == 2
    error = capsys.readouterr().err
    assert "belongs to another run: seed was 0, now 1" in error
    assert "--overwrite" in error
    assert call(*REFUSAL, "--method", "ada-cd", "--output", swept) == 2
    assert 'method.name was "self-cd", now "ada-cd"' in capsys.readouterr().err


def test_further_values_use_the_responses_that_are_there(swept, tmp_path, monkeypatch, capsys):
    import shutil

    shutil.copytree(swept, tmp_path / "copy")
    collect, seen = trueline.engine.decoding.Decoder.complete, []
    monkeypatch.setattr(
        trueline.engine.decoding.Decoder,
        "complete",
        lambda *a, **o: seen.append(1) or collect(*a, **o),
    )
    options = ("--alpha", "1,1.5", "--no-plot", "--json", "--output", tmp_path / "copy")
    assert call(*REFUSAL, *options) == 0
    assert len(seen) == 3
    shown = json.loads(capsys.readouterr().out)
    labels = [p["label"] for p in shown["points"]]
    assert labels == ["plain", *TEXTS, "alpha=1", "alpha=1.5"]


def test_prompts_from_files_and_a_given_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    safe = write(tmp_path / "safe.jsonl", [{"prompt": "What is the moon?"}])
    assert call("eval", "refusal", "--safe", safe, "--max-new-tokens", 4, "--no-plot") == 0
    out = capsys.readouterr().out
    assert "over refusal" in out
    assert "Recommended" not in out
    folder = Path(out.strip().splitlines()[-1])
    assert folder.parent == Path("runs")
    assert results(folder)["settings"]["data"]["sources"] == [str(safe)]


# Sweeps and adherence


def test_a_grid_of_method_and_sampling(tmp_path):
    grid = ("--grid", "ratio=0,2", "candidates=0.8,1")
    options = ("--limit", 4, "--max-new-tokens", 8, "--output", tmp_path / "s")
    assert call("eval", "sweep", "--metric", "adherence", *grid, *options) == 0
    points = results(tmp_path / "s")["points"]
    assert [p["label"] for p in points][1:] == [
        "ratio=0, candidates=0.8", "ratio=0, candidates=1",
        "ratio=2, candidates=0.8", "ratio=2, candidates=1",
    ]  # fmt: skip
    assert set(points[1]["measures"]) == {"adherence", "fact"}
    assert (tmp_path / "s" / "plot.png").is_file()


def test_adherence_by_a_pattern(tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "What is the moon?"}, {"prompt": "Hello!"}])
    base = ("eval", "preference", "--prompts", prompts, "--principle", "Talk like a pirate.")
    rates = []
    for i, extra in enumerate([("--pattern", "[a-z]"), ("--pattern", "[A-Z]", "--absent")]):
        options = ("--max-new-tokens", 4, "--no-plot", "--output", tmp_path / str(i))
        assert call(*base, *extra, *options) == 0
        rates.append(results(tmp_path / str(i))["points"][1]["measures"]["adherence"]["value"])
    assert rates == [1.0, 0.0]


def test_personal_preference_both_ways(tmp_path):
    rows = [{"question": "A pet?", "answers": ["a cat", "a dog"], "users": ["Ann.", "Bob."]}]
    path = write(tmp_path / "q.jsonl", rows)
    for by in ("letter", "logprob"):
        options = ("--by", by, "--max-new-tokens", 4, "--no-plot", "--output", tmp_path / by)
        assert call("eval", "preference", "--questions", path, *options) == 0
    letter, logprob = results(tmp_path / "letter"), results(tmp_path / "logprob")
    assert letter["points"][1]["measures"]["accuracy"]["n"] == 2
    assert logprob["numbers"]["accuracy"]["n"] == 2


def test_implicit_reward_is_that_of_the_python_call(tmp_path, tiny):
    from trueline import LinearAlignment
    from trueline.evals.datasets import load_pairs
    from trueline.evals.preference import implicit_rewards, reward_accuracy

    rows = [{"prompt": f"Say {x}.", "chosen": x, "rejected": "no"} for x in ("yes", "two", "me")]
    path = write(tmp_path / "pairs.jsonl", rows)
    options = ("--pairs", path, "--principle", "Be kind.", "--output", tmp_path / "r")
    assert call("eval", "preference", *options) == 0
    wanted = implicit_rewards(tiny, LinearAlignment(principle="Be kind."), load_pairs(path))
    found = results(tmp_path / "r")["numbers"]
    accuracy = reward_accuracy(wanted).accuracy.value
    assert found["accuracy"]["value"] == pytest.approx(accuracy)
    assert found["accuracy"]["n"] == 3


def test_win_rate_in_both_orders(tmp_path, monkeypatch):
    class Longer:
        def pairwise(self, prompts, first, second, criterion):
            return ["A" if len(a) > len(b) else "B" for a, b in zip(first, second, strict=True)]

    monkeypatch.setattr(judgements, "make_judge", lambda *a: (Longer(), {"name": "len"}))
    long = write(tmp_path / "a.jsonl", [{"prompt": "p", "response": "long"}] * 3)
    short = write(tmp_path / "b.jsonl", [{"prompt": "p", "response": "s"}] * 3)
    options = ("--judge", "local", "--judge-model", "x", "--output", tmp_path / "w")
    assert call("eval", "preference", "--responses", long, short, *options) == 0
    found = results(tmp_path / "w")["numbers"]
    assert (found["wins"], found["losses"], found["win_rate"]["value"]) == (3, 0, 1.0)


def test_judge_against_labels(tmp_path, capsys):
    rows = [
        {"completion": "I'm sorry, but I can't help with that.", "label": "full"},
        {"completion": "Sure. Open the window and wait.", "label": "complied"},
        {"completion": "Sure. Open the door and wait.", "label": "full"},
    ]
    path = write(tmp_path / "labels.jsonl", rows)
    assert call("eval", "judge", "--labels", path, "--json", "--output", tmp_path / "j") == 0
    found = json.loads(capsys.readouterr().out)["numbers"]
    assert found["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["accuracy"]["low"] < 2 / 3 < found["accuracy"]["high"]
    # p_o = 2/3, p_e = (2/3)(1/3) + (1/3)(2/3) = 4/9; kappa = (2/9) / (5/9)
    assert found["kappa"] == pytest.approx(0.4)
    assert found["confusion"] == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]
    assert (tmp_path / "j" / "plot.png").is_file()


# Reports, errors, weight


def test_a_report_of_two_runs(swept, tmp_path, capsys):
    assert call(*REFUSAL, "--method", "ada-cd", "--no-plot", "--output", tmp_path / "ada") == 0
    assert call("report", swept, tmp_path / "ada", "--output", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| run: alpha=0 |" in text
    assert "Paired tests on the same prompts" in text
    assert "| method.name | self-cd | ada-cd |" in text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "<script" not in page
    assert "http" not in page.replace("data:", "")
    assert call("report", tmp_path) == 2
    assert "results.json: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("refusal", "--alpha", "3:0:1"), "START <= STOP"),
        (("refusal", "--alpha", "x"), "a number, START:STOP:STEP or a,b,c"),
        (("refusal", "--alhpa", "1"), "--alpha"),
        (("refusal", "--ratio", "1"), "has no option `ratio`"),
        (("refusal", "--model", "gpt2"), "needs --safe FILE and --unsafe FILE"),
        (("refusal", "--floor", "97"), "`floor` must be a finite number in [0, 1]"),
        (("refusal", "--n", "2", "--temperature", "1"), "one completion a prompt"),
        (("refusal", "--limit", "0"), "`limit` must be"),
        (("refusal", "--judge", "model"), "--judge-url URL"),
        (("refusal", "--safe", "no.jsonl"), "no.jsonl"),
        (("sweep", "--grid", "alhpa=1"), 'Did you mean "alpha"'),
        (("sweep", "--metric", "personal"), "--questions FILE"),
        (("preference", "--responses", "a.jsonl", "b.jsonl"), "A win rate needs"),
        (
            (
                "preference",
                "--responses",
                "a.jsonl",
                "b.jsonl",
                "--judge",
                "local",
                "--judge-model",
                "tiny",
            ),
            "a.jsonl",
        ),
        (("preference", "--pairs", "x", "--questions", "y"), "one of --pairs and --questions"),
        (("judge", "--labels", "no.jsonl"), "no.jsonl"),
        ((), "required: WHAT"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert call("eval", *argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("part", [*(f"eval {p}" for p in PARTS), "report"])
def test_help_loads_no_torch(part):
    code = (
        "import sys\nfrom trueline.cli import main\n"
        f"try: main({[*part.split(), '--help']})\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_refilled_places_measure_the_same(tmp_path):
    folders = tmp_path / "waiting", tmp_path / "refilled"
    command = (*REFUSAL, "--alpha", "0,2", "--no-plot", "--batch-size", 3)
    assert call(*command, "--output", folders[0]) == 0
    assert call(*command, "--refill", "--output", folders[1]) == 0
    texts = [
        [json.loads(line)["text"] for line in (f / "responses.jsonl").read_text().splitlines()]
        for f in folders
    ]
    assert texts[0] == texts[1]
    assert call(*command, "--output", folders[1]) == 2, "another run: its rows may round otherwise"
