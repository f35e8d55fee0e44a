"""`trueline generate`: what it prints and writes is what the Python calls give."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import sys
import time
from pathlib import Path

import pytest
from processes import Process

from trueline import (
    Completion,
    Contrast,
    LanguageModel,
    LinearAlignment,
    Plain,
    Request,
    SamplingParams,
    SelfCD,
    generate,
    load_model,
)
from trueline.cli import main
from trueline.cli.compare import columns, layout
from trueline.methods.self_cd import SAFETY_PROMPT

QUESTION = "What is the capital of France?"
PIRATE = "Talk like a pirate."
METHOD = LinearAlignment(principle=PIRATE)
SHORT = SamplingParams(max_new_tokens=16)


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    """The bundled model."""
    return load_model("tiny")


@pytest.fixture(autouse=True)
def one_load(tiny, monkeypatch):
    """Every command works on the one model that the tests hold."""
    monkeypatch.setattr("trueline.models.load.load_model", lambda *args, **options: tiny)


def call(*argv: object) -> int:
    return main(["generate", *map(str, argv), "--max-new-tokens", "16"])


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# One question


def test_the_text_is_that_of_the_python_call(tiny, capsys):
    assert call(QUESTION, "--principle", PIRATE, "--ratio", 2) == 0
    assert capsys.readouterr() == (generate(tiny, QUESTION, METHOD, SHORT)[0].text + "\n", "")


def test_the_text_comes_in_pieces(tiny, monkeypatch):
    pieces: list[str] = []

    class Terminal(io.StringIO):
        def flush(self):
            pieces.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    call(QUESTION)
    whole = generate(tiny, QUESTION, None, SHORT)[0]
    assert len(set(pieces)) > 4
    assert all(f"{whole.text}\n".startswith(piece) for piece in pieces)


def test_system_is_the_callers_own_message(tiny, capsys):
    call(QUESTION, "--system", "Answer in one word.", "--json")
    chat = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": QUESTION},
    ]
    shown = json.loads(capsys.readouterr().out)
    assert shown["token_ids"] == ids(generate(tiny, [chat], None, SHORT))


def ids(completions: list[Completion]) -> list[int]:
    return completions[0].token_ids


def test_a_question_from_stdin(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    assert call("-") == 0
    assert capsys.readouterr().out == generate(tiny, QUESTION, None, SHORT)[0].text + "\n"


def test_json_has_what_the_completion_has(tiny, capsys):
    options = ("--n", 2, "--temperature", 1.5, "--seed", 3, "--logprobs")
    call(QUESTION, "--principle", PIRATE, "--norm", "inf", *options, "--json")
    params = dataclasses.replace(SHORT, n=2, temperature=1.5, logprobs=True)
    method = LinearAlignment(principle=PIRATE, norm=float("inf"))
    wanted = generate(tiny, [Request(QUESTION, method, params, 3)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["seed"] for row in rows] == [3, 4]
    assert rows[0]["method"] == {
        "name": "linear-alignment",
        "principle": PIRATE,
        "ratio": 2.0,
        "candidates": 0.8,
        "epsilon": None,
        "norm": "inf",
        "gate": 1.0,
        "damping": 0.0,
        "mask_temperature": None,
    }
    for row, completion in zip(rows, wanted, strict=True):
        for name in ("text", "token_ids", "finish_reason", "logprobs", "branch_logprobs"):
            assert row[name] == pytest.approx(getattr(completion, name), abs=1e-4), name
        assert row["prompt_tokens"] == list(completion.prompt_tokens)
        assert row["model"] == "tiny"
        assert 0 < row["timings"]["prefill"] <= row["timings"]["seconds"]


def test_several_samples_are_labelled(tiny, capsys):
    call(QUESTION, "--n", 2, "--temperature", 2, "--seed", 5)
    params = dataclasses.replace(SHORT, n=2, temperature=2)
    first, second = generate(tiny, [Request(QUESTION, None, params, 5)])
    assert capsys.readouterr().out == (
        f"--- sample 1 of 2, seed 5 ---\n{first.text}\n"
        f"--- sample 2 of 2, seed 6 ---\n{second.text}\n"
    )


@pytest.mark.parametrize(
    ("options", "prompted", "method"),
    [
        (["--principle", PIRATE], Plain(principle=PIRATE), METHOD),
        (["--method", "self-cd"], Plain(principle=SAFETY_PROMPT), SelfCD()),
    ],
    ids=["linear-alignment", "self-cd"],
)
def test_compare_gives_the_three_answers(tiny, capsys, options, prompted, method):
    sampling = ("--temperature", 1.5, "--seed", 3)
    call(QUESTION, *options, *sampling, "--compare", "--json")
    params = dataclasses.replace(SHORT, temperature=1.5)
    row = json.loads(capsys.readouterr().out)
    wanted = {"plain": Plain(), "prompted": prompted, "aligned": method}
    assert row.keys() == {"question", *wanted}
    for key, each in wanted.items():
        alone = generate(tiny, [Request(QUESTION, each, params, 3)])
        assert row[key]["token_ids"] == ids(alone)
    call(QUESTION, *options, "--compare")
    shown = capsys.readouterr().out
    assert all(title in shown for title in ("plain", " prompt", method.name))


def test_columns_of_the_other_methods():
    from trueline import AdaCD, Blend

    def keys(method):
        return [(c.key, c.title) for c in columns(method)]

    assert keys(AdaCD())[1] == ("prompted", "refusing prompt")
    assert keys(Contrast(negative="Ramble."))[1] == ("prompted", "negative prompt")
    assert keys(Contrast(base=True)) == [("plain", "plain"), ("aligned", "contrast")]
    assert keys(Plain(principle="Rhyme.")) == [("plain", "plain"), ("prompted", "principle prompt")]
    blend = columns(Blend(principles=(("A.", 1), ("B.", -1), ("C.", 2))))
    assert blend[1].method == Plain(principle="A.\nC.")


def test_columns_fit_the_terminal_and_keep_every_word():
    answers = [("plain", "one two three " * 9), ("aligned", "four\n\nfive " + "x" * 50)]
    shown = layout(answers, width=61).splitlines()
    assert max(map(len, shown)) <= 61
    cells = [[part.strip() for part in line.split("|")] for line in shown if "|" in line]
    left = " ".join(cell[0] for cell in cells[2:])
    assert left.split() == ["one", "two", "three"] * 9
    right = "".join(cell[1] for cell in cells[2:])
    assert right.replace(" ", "") == "fourfive" + "x" * 50


@pytest.mark.parametrize(("text", "width"), [("short", 40), ("日本語", 200)])
def test_narrow_terminals_and_wide_characters_are_stacked(text, width):
    shown = layout([("plain", text), ("aligned", text)], width)
    assert shown == f"--- plain ---\n{text}\n\n--- aligned ---\n{text}"


# Files


@pytest.fixture
def prompts(tmp_path) -> Path:
    """Rows of every kind: own principle, own system message, a chat, own seed, unknown fields."""
    rows: list[dict] = []
    for i in range(11):
        rows.append({"prompt": QUESTION + " Really?" * (i % 3), "tag": {"deep": [i]}})
    rows[2]["principle"] = "Answer as a poet."
    rows[3]["system"] = "You are short."
    rows[4]["seed"] = 40
    rows[5]["id"] = "five"
    chat = [("user", "Hi"), ("assistant", "Hello!"), ("user", "What is the moon?")]
    rows[6] = {"messages": [{"role": role, "content": text} for role, text in chat]}
    return write(tmp_path / "in.jsonl", rows)


SAMPLED = ("--principle", PIRATE, "--temperature", 1.2, "--seed", 100, "--batch-size", 4)


def test_every_row_is_what_it_would_be_alone(tiny, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    assert call("--input", prompts, "--output", out, *SAMPLED) == 0
    given, rows = read(prompts), read(out)
    assert len(rows) == len(given)
    params = dataclasses.replace(SHORT, temperature=1.2)
    for i, (before, after) in enumerate(zip(given, rows, strict=True)):
        chat = before.get("messages") or [{"role": "user", "content": before["prompt"]}]
        if i == 3:
            chat = [{"role": "system", "content": "You are short."}, *chat]
        method = LinearAlignment(principle="Answer as a poet.") if i == 2 else METHOD
        seed = 40 if i == 4 else 100 + i
        alone = generate(tiny, [Request(chat, method, params, seed)])[0]
        assert after == {"id": i + 1} | before | {
            "seed": seed,
            "prompt_tokens": list(alone.prompt_tokens),
            "text": alone.text,
            "finish_reason": alone.finish_reason,
            "token_ids": alone.token_ids,
        }


def test_the_runs_system_message_gives_way_to_the_rows_own(tiny, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    call("--input", prompts, "--output", out, "--system", "Talk.", "--method", "plain")
    given, rows = read(prompts), read(out)
    for i, system in ((0, "Talk."), (2, "Talk.\n\nAnswer as a poet."), (3, "You are short.")):
        user = {"role": "user", "content": given[i]["prompt"]}
        alone = generate(tiny, [[{"role": "system", "content": system}, user]], None, SHORT)
        assert rows[i]["prompt_tokens"] == list(alone[0].prompt_tokens)
        assert rows[i]["token_ids"] == ids(alone)


def test_several_samples_of_a_row(tiny, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    call("--input", prompts, "--output", out, *SAMPLED, "--n", 3, "--logprobs")
    rows = read(out)
    params = dataclasses.replace(SHORT, temperature=1.2, n=3)
    alone = generate(tiny, [Request(read(prompts)[1]["prompt"], METHOD, params, 103)])
    assert rows[1]["seed"] == 103
    assert [s["token_ids"] for s in rows[1]["samples"]] == [c.token_ids for c in alone]
    assert [len(s["logprobs"]) for s in rows[1]["samples"]] == [len(c.token_ids) for c in alone]


def test_principles_from_the_rows_alone(tiny, tmp_path):
    rows = [{"prompt": "Hi", "principle": principle} for principle in (PIRATE, "Rhyme.")]
    path = write(tmp_path / "a.jsonl", rows)
    out = tmp_path / "out.jsonl"
    assert call("--input", path, "--output", out, "--ratio", 3) == 0
    for row, principle in zip(read(out), (PIRATE, "Rhyme."), strict=True):
        method = LinearAlignment(principle=principle, ratio=3)
        assert row["token_ids"] == ids(generate(tiny, "Hi", method, SHORT))


def test_summary_and_timings(prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    call("--input", prompts, "--output", out, "--json", "--method", "plain")
    summary = json.loads(capsys.readouterr().out)
    tokens = sum(len(row["token_ids"]) for row in read(out))
    assert (summary["rows"], summary["total"], summary["tokens"]) == (11, 11, tokens)
    session = json.loads(Path(f"{out}.run.json").read_text())["sessions"][0]
    assert session == {k: summary[k] for k in ("rows", "tokens", "seconds", "tokens_per_second")}


def test_bad_rows_stop_the_run_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trueline.models.load.load_model", None)
    rows = [{"prompt": "Hi"}, {"prompt": ""}, {"prompt": "Hi"}, {"promt": "Hi"}]
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl"
    assert call("--input", path, "--output", out) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"{path}:2", f"{path}:4"]
    assert not out.exists()


def test_rows_that_do_not_fit_stop_the_run_before_any_compute(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(type(tiny.model), "forward", None)
    rows = [{"prompt": text} for text in ("Hi", "a " * 1500, "Hi", "a " * 3000)]
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl"
    assert call("--input", path, "--output", out) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"{path}:2", f"{path}:4"]
    assert all("1024 positions" in line for line in lines)
    assert not out.exists()


def test_many_bad_rows_are_counted(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"prompt": ""}] * 50)
    assert call("--input", path, "--output", tmp_path / "out.jsonl") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert "30 more bad rows" in lines[-1]


def test_skip_bad_runs_the_others(tiny, tmp_path, capsys):
    rows = [{"prompt": "Hi"}, {"prompt": ""}, {"prompt": "a " * 3000}, {"prompt": "Hello"}]
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl"
    for _ in range(2):
        assert call("--input", path, "--output", out, "--skip-bad") == 0
        assert [(row["id"], row["seed"]) for row in read(out)] == [(1, 0), (4, 3)]
        bad = read(Path(f"{out}.bad.jsonl"))
        assert [b["line"] for b in bad] == [2, 3]
        reason = 'field "prompt" is empty. Give it some text.'
        assert bad[0] == {"line": 2, "error": reason, "row": {"prompt": ""}}
        out.write_bytes(out.read_bytes()[:-1])
    assert call("--input", path, "--output", out, "--skip-bad") == 0
    assert call("--input", path, "--output", out, "--skip-bad") == 0
    assert "All 2 rows are in" in capsys.readouterr().err


def test_a_finished_run_loads_no_model(prompts, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    call("--input", prompts, "--output", out, *SAMPLED)
    monkeypatch.setattr("trueline.models.load.load_model", None)
    whole = out.read_bytes()
    assert call("--input", prompts, "--output", out, *SAMPLED) == 0
    assert "All 11 rows are in" in capsys.readouterr().err
    assert out.read_bytes() == whole


def test_a_resumed_run_gives_the_same_bytes(prompts, tmp_path):
    """With log-probabilities in the output, so that the last bit of every logit shows."""
    rows = [{**row, "id": 20 * i + k} for i in range(3) for k, row in enumerate(read(prompts))]
    # Systems that many rows share, then systems of one row that begin like those: what a store
    # filled by earlier rows would hand them, a resumed run has not.
    for i, row in enumerate(rows):
        if "messages" not in row:
            number = i % 2 if i < 16 else i
            row["system"] = f"You are a helpful and kind assistant with the number {number}."
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out.jsonl"
    argv = ("--input", path, "--output", out, *SAMPLED, "--logprobs")
    assert call(*argv) == 0
    whole = out.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for row in (3, 11, 18, 26, 32):
        out.write_bytes(whole[: ends[row] - 5])
        assert call(*argv) == 0
        assert out.read_bytes() == whole


def test_refilled_places_give_the_same_rows(prompts, tmp_path):
    """Rows that end apart, and more of them than places; the order is the input's."""
    rows = [{**row, "id": 20 * i + k} for i in range(2) for k, row in enumerate(read(prompts))]
    path, whole, out = (tmp_path / name for name in ("a.jsonl", "whole.jsonl", "out.jsonl"))
    write(path, rows)
    argv = ("--input", path, *SAMPLED, "--batch-size", 4)
    assert call(*argv, "--output", whole) == 0
    assert call(*argv, "--output", out, "--refill") == 0
    assert read(out) == read(whole)
    assert call(*argv, "--output", out) == 2, "another run: its rows may round otherwise"


def test_a_run_killed_again_and_again_gives_the_same_bytes(prompts, tmp_path):
    rows = [{**row, "id": 20 * i + k} for i in range(3) for k, row in enumerate(read(prompts))]
    path, out, whole = (tmp_path / name for name in ("a.jsonl", "out.jsonl", "whole.jsonl"))
    write(path, rows)
    argv = ("--input", path, *SAMPLED, "--logprobs")
    assert call(*argv, "--output", whole) == 0
    command = ("generate", *argv, "--max-new-tokens", 16, "--output", out)
    size = lambda: out.stat().st_size if out.exists() else 0  # noqa: E731
    killed = 0
    for attempt in range(4):
        before = size()
        run = Process(*command)
        while run.poll() is None and size() == before:
            time.sleep(0.001)
        time.sleep(0.013 * attempt)
        run.kill()
        killed += run.wait() == -signal.SIGKILL
        assert run.returncode in (0, -signal.SIGKILL), run.said[-2000:]
    assert killed >= 2
    done = Process(*command)
    assert done.wait() == 0, done.said[-2000:]
    assert out.read_bytes() == whole.read_bytes()


def test_ctrl_c_keeps_what_is_done(prompts, tmp_path, capsys, monkeypatch):
    from trueline.records.output_file import OutputFile

    out = tmp_path / "out.jsonl"
    append = OutputFile.append

    def interrupted(self, rows):
        append(self, rows)
        if self.done == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(OutputFile, "append", interrupted)
    assert call("--input", prompts, "--output", out, *SAMPLED) == 130
    assert "8 of 11 rows are in" in capsys.readouterr().err
    assert call("--input", prompts, "--output", out, *SAMPLED) == 0
    assert [row["id"] for row in read(out)] == [1, 2, 3, 4, 5, "five", *range(7, 12)]
