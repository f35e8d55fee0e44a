"""The README says what is true: its code runs, its files exist, every file is named."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from trueline.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [
    line.split("  #")[0]
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("trueline ")
]
FIRST = next(i for i, line in enumerate(SHELL) if line.startswith("trueline distil"))
LAST = next(i for i, line in enumerate(SHELL) if line.startswith("trueline export"))
TRAINING = SHELL[FIRST : LAST + 1]
"""One after the other: each needs what those before it wrote."""


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("line", SHELL[:FIRST] + SHELL[LAST + 1 :])
def test_shell_lines_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = '{"prompt": "What is the moon?"}\n{"prompt": "Hello!", "id": "b"}\n'
    (tmp_path / "prompts.jsonl").write_text(rows)
    if line.startswith("trueline report"):
        assert main(shlex.split(line.replace("report", "eval refusal --limit 2 --output"))[1:]) == 0
    assert main(shlex.split(line)[1:]) == 0
    shown = capsys.readouterr()
    assert shown.out or "2 rows" in shown.err


def test_what_is_trained_is_used_and_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def write(name, rows):
        Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    write("prompts.jsonl", [{"prompt": f"What is the {x}?"} for x in ("moon", "sun", "sea", "sky")])
    stream = ""
    for task, labels in {"colour": ("red", "blue"), "size": ("small", "big")}.items():
        write(f"{task}.jsonl", [{"sentence": f"thing {x}", "label": x} for x in labels])
        stream += f'[tasks.{task}]\ntrain = "{task}.jsonl"\ntest = "{task}.jsonl"\n'
    Path("stream.toml").write_text(stream)
    few = {
        "distil": ["--steps", "1", "--batch-size", "2"],
        "stack": ["--batch-size", "2"],
    }
    for line in TRAINING:
        words = shlex.split(line)[1:]
        assert main(words + few.get(words[0], [])) == 0
    assert (tmp_path / "one" / "adapter_model.safetensors").exists()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_room_is_described():
    table = (ROOT / "docs/architecture.md").read_text()
    for path in (ROOT / "src/trueline").rglob("__init__.py"):
        room = path.parent.relative_to(ROOT / "src/trueline").as_posix()
        if room not in (".", "train"):
            assert f"`{room}/`" in table, f"{room} has no row in docs/architecture.md"
