"""README and docs say what is true: code runs, commands parse, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import shlex
import sys
import tomllib
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from trueline.cli import build_parser, main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/*/README.md"),
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
        for about, code in blocks(path, "sh")
        if about != "error"
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
    "eval": ["--limit", "6"],
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
"""What makes a command short."""


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


AS_THEY_STAND = [
    page
    for page in PAGES
    if page.parent.name in ("methods", "how-to") or ids(page) in ("docs/speed.md",)
]
"""Pages whose blocks of Python run in their order, in a folder of prompts."""
ELSEWHERE = {"README.md": 2, "docs/serving.md": 1, "docs/training.md": 3}
"""Blocks of Python that run above, in test_server, test_distillation and test_o_lora_trainer."""


@pytest.fixture
def page(monkeypatch) -> dict:
    """The names of a module that code of a page runs in: dataclasses look theirs up."""
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    return vars(module)


@pytest.mark.parametrize("path", AS_THEY_STAND, ids=ids)
def test_a_pages_python_runs_in_its_order(path, page, folder, capsys, monkeypatch):
    from trueline.train.keep import KEEP

    monkeypatch.syspath_prepend(folder)
    before = dict(KEEP)
    try:
        for about, code in blocks(path, "python"):
            if about.startswith("file="):
                Path(about.removeprefix("file=")).write_text(code)
            exec(compile(code, path.name, "exec"), page)
    finally:
        KEEP.clear()
        KEEP.update(before)
    if path.name == "speed.md":
        assert len(page["answers"]) == 2


def test_a_method_of_ones_own_is_called_as_its_page_says(folder, capsys, monkeypatch):
    page = ROOT / "docs/how-to/method.md"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    Path("away.py").write_text(dict(blocks(page, "python"))["file=away.py"])
    for words in commands(page):
        assert main(words) == 0, words
    assert "How far: 0 is the plain model" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_block_of_python_is_run_somewhere(page):
    if page not in AS_THEY_STAND:
        assert len(blocks(page, "python")) == ELSEWHERE.get(ids(page), 0)


TROUBLE = ROOT / "docs/troubleshooting.md"


def troubles() -> list[tuple[str, str]]:
    """Each command of the page that is to fail, and the message that it is to fail with."""
    text = TROUBLE.read_text(encoding="utf-8")
    return re.findall(r"^```sh error\ntrueline (.*)\n```\n+```text\n(.*)\n```", text, re.MULTILINE)


@pytest.mark.parametrize(("command", "message"), troubles())
def test_an_error_reads_as_its_page_says(command, message, folder, capsys):
    Path("base").mkdir()
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    Path("typo.jsonl").write_text('{"prompt": "What is the moon?"}\n{"promt": "And the sun?"}\n')
    assert main(shlex.split(command)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert f"error: {message}" in said


def test_every_message_of_the_page_is_tried():
    assert len(troubles()) == len(blocks(TROUBLE, "sh")) >= 12


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_block_of_toml_is_read(page):
    from trueline.jobs.projects import AlignConfig

    for _, code in blocks(page, "toml"):
        found = tomllib.loads(code)
        if "principle" in found and isinstance(found["principle"], list):
            assert AlignConfig.of(found, page.name, ".").principles


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_can_be_given(page, folder):
    """Those that a test cannot run, for they need a model or hours, are parsed."""
    own = dict(blocks(ROOT / "docs/how-to/method.md", "python"))["file=away.py"]
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


@pytest.mark.parametrize("name", ["tutorial", "tutorial-real"])
def test_a_notebook_runs(name, folder, page, monkeypatch):
    """With the bundled model and few prompts, put behind the cell of its parameters."""
    from trueline import AlignConfig

    nbformat = pytest.importorskip("nbformat")
    short = partial(AlignConfig, validation=2, off_path=0, training={"max_steps": 2})
    monkeypatch.setattr("trueline.AlignConfig", short)
    few = {"model": "tiny", "limit": 2, "answers": 16, "questions": 4, "tokens": 3}
    book = nbformat.read(ROOT / f"docs/{name}.ipynb", 4)
    nbformat.validate(book)
    for cell in (c for c in book.cells if c.cell_type == "code"):
        exec(compile(cell.source, f"{name}.ipynb", "exec"), page)
        if "parameters" in cell.metadata.get("tags", []):
            page.update({key: few[key] for key in few.keys() & page.keys()})
    assert any(folder.glob("*/verdict.json"))


@pytest.mark.parametrize("name", ["tutorial", "tutorial-real"])
def test_a_notebook_shows_what_it_printed(name):
    book = json.loads((ROOT / f"docs/{name}.ipynb").read_text())
    cells = [c for c in book["cells"] if c["cell_type"] == "code"]
    assert sum(bool(c["outputs"]) for c in cells) >= 5
    said = json.dumps([c["outputs"] for c in cells])
    assert '"output_type": "error"' not in said
    assert "/work/" not in said
    words = ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == "markdown"]
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", "\n".join(words))
    assert links
    assert all((ROOT / "docs" / link).exists() for link in links)


def test_every_method_has_a_row():
    from trueline.methods import METHODS
    from trueline.train.keep import KEEP

    text = README.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in METHODS)
    training = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in training for name in KEEP)
