"""The picture of the architecture, enforced: imports go down only, and never in a circle.

cli  server  integrations  continual      surfaces
jobs                                      one function a job
train                                     trainers: weights that keep what decoding showed
evals                                     items, metrics, judges, statistics
engine                                    requests in, tokens out
models                                    checkpoints, tokenizers, templates
methods                                   one file a paper: torch and the standard library
records  settings                         what is written; what is configured
types  errors
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "trueline"
LAYERS = [
    {"errors"},
    {"types"},
    {"records"},
    {"settings"},
    {"methods"},
    {"models"},
    {"engine"},
    {"evals"},
    {"train"},
    {"jobs"},
    {"integrations", "continual", "server"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.name not in ("__init__.py", "__main__.py")]


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, inside functions too, but for annotations."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {
        f"{n.module}.{a.name}"
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.module
        for a in n.names
    }
    return names


def module(path: Path) -> str:
    """The dotted name of a file."""
    return ".".join(("trueline", *path.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imported(path):
        if name.startswith("trueline.") and (other := name.split(".")[1]) in LEVEL:
            assert other == own or LEVEL[other] < LEVEL[own], f"{own} imports {other}"


KNOWN_CIRCLES: set[str] = set()


def test_no_circles_inside_packages():
    graph = {module(p): imported(p) for p in FILES}
    graph = {name: {n for n in names if n in graph} for name, names in graph.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = path[path.index(name) :]
            assert KNOWN_CIRCLES.issuperset(circle), " -> ".join((*circle, name))
            return
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("*.py")), ids=lambda p: p.name)
def test_methods_need_torch_and_the_standard_library_only(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots <= {"torch", "trueline"} | sys.stdlib_module_names


LONGEST_FILE, LONGEST_FUNCTION = 400, 60


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{node.name} has {lines} lines"


def test_every_module_has_a_layer():
    assert {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES} <= set(LEVEL)
