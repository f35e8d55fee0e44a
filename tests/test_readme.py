"""README and docs say what is true: code runs, commands parse, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest

from trueline.cli import build_parser, main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/*/README.md"),
                 ROOT / "benchmarks" / "README.md"]
    if path.is_file()
)  # fmt: skip
WORDS = 1200
"""The longest that a README may be."""


def blocks(path: Path, language: str) -> list[tuple[str, str]]:
    """What stands behind the language of each block of code, and the block."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(about.strip(), code) for name, about, code in found if name == language]


def commands(path: Path) -> list[list[str]]:
    """The words of each call of `trueline` in the page's blocks of shell."""
    lines = [
        line.split("  #")[0]
        for _, code in blocks(path, "sh")
        for line in code.replace("\\\n", " ").splitlines()
    ]
    return [shlex.split(line)[1:] for line in lines if line.startswith("trueline ")]


def ids(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with the files that the pages speak of."""
    monkeypatch.chdir(tmp_path)

    def write(name, rows):
        Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    write("prompts.jsonl", [{"prompt": f"What is the {x}?"} for x in ("moon", "sun", "sea", "sky")])
    stream = ""
    for task, labels in {"colour": ("red", "blue"), "size": ("small", "big")}.items():
        write(f"{task}.jsonl", [{"sentence": f"thing {x}", "label": x} for x in labels])
        stream += f'[tasks.{task}]\ntrain = "{task}.jsonl"\ntest = "{task}.jsonl"\n'
    Path("stream.toml").write_text(stream)
    return tmp_path


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= WORDS


FEW = {
    "distil": ["--steps", "1", "--batch-size", "2"],
    "stack": ["--batch-size", "2"],
    "align": [
        "--set",
        "answers=4",
        "questions=2",
        "validation=2",
        "off_path=0",
        "max_new_tokens=3",
        "training.max_steps=1",
        "training.per_device_train_batch_size=4",
        *(
            f"thresholds.{name}=none"
            for name in (
                "adherence",
                "gain",
                "kept",
                "facts",
                "over_refusal_rise",
                "harmful_refusal_loss",
                "format_loss",
            )
        ),
    ],
}
"""What makes training short."""


def test_the_readmes_commands_run_in_their_order(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for words in commands(README):
        assert main(words + FEW.get(words[0], [])) == 0, words
    assert (folder / "one" / "adapter_model.safetensors").exists()
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 4
    assert (folder / "runs" / "report").is_dir()


def test_the_readmes_python_runs_in_its_order(folder, capsys, monkeypatch):
    from trueline import DistilConfig

    whole = DistilConfig.of
    few = {"max_steps": 1, "per_device_train_batch_size": 2}
    monkeypatch.setattr(DistilConfig, "of", staticmethod(lambda **given: whole(**few | given)))
    for _, code in blocks(README, "python"):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert (folder / "adapters" / "one" / "adapter_model.safetensors").exists()


def test_a_method_of_ones_own_runs_as_its_page_says(folder, capsys, monkeypatch):
    page = ROOT / "docs" / "methods.md"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for about, code in blocks(page, "python"):
        if about.startswith("file="):
            Path(about.removeprefix("file=")).write_text(code)
        exec(compile(code, "methods.md", "exec"), {"__name__": "__main__"})
    for words in commands(page):
        assert main(words) == 0, words
    assert "How far: 0 is the plain model" in capsys.readouterr().out


RUN = {
    "README.md": 2,
    "docs/methods.md": 2,
    "docs/serving.md": 1,
    "docs/speed.md": 2,
    "docs/training.md": 3,
}
"""Blocks of Python that are run: here, in test_distillation, test_o_lora_trainer, test_server."""


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_block_of_python_is_run_somewhere(page):
    assert len(blocks(page, "python")) == RUN.get(ids(page), 0)


def test_decoding_in_python_runs_as_its_page_says(capsys):
    for _, code in blocks(ROOT / "docs" / "speed.md", "python"):
        told: dict = {}
        exec(compile(code, "speed.md", "exec"), told)
    assert capsys.readouterr().out.strip()
    assert len(told["answers"]) == 2


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_can_be_given(page, folder):
    """Those that a test cannot run, for they need a model or hours, are parsed."""
    own = dict(blocks(ROOT / "docs/methods.md", "python"))["file=away.py"]
    (folder / "away.py").write_text(own)
    for words in commands(page):
        args = build_parser(words).parse_args(words)
        assert callable(args.run), words


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_name_that_python_imports_is_there(page):
    for _, code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trueline"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module}.{name.name}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_room_is_described():
    table = (ROOT / "docs/architecture.md").read_text()
    for path in (ROOT / "src/trueline").rglob("__init__.py"):
        room = path.parent.relative_to(ROOT / "src/trueline").as_posix()
        if room not in (".", "train"):
            assert f"`{room}/`" in table, f"{room} has no row in docs/architecture.md"


def test_every_method_has_a_row():
    from trueline.methods import METHODS
    from trueline.train.keep import KEEP

    text = README.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in METHODS)
    training = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in training for name in KEEP)
