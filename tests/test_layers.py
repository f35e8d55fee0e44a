"""The picture of the architecture, enforced: imports go down only.

cli plots demo            surfaces
train                     trainers: weights that keep what decoding showed
hook trace evals          record and measure; integrations: harnesses of other people
decoding                  the loop
batch cache ...           the only users of transformers, tokenizers and files
methods                   one file a paper: torch and the standard library
types, errors
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "trueline"
LAYERS = [
    {"errors"},
    {"types"},
    {"methods"},
    {"linear", "sampling", "data", "detokenizer"},
    {"modeling", "prompts"},
    {"cache", "scoring"},
    {"batch"},
    {"decoding"},
    {"hook", "trace", "evals", "integrations"},
    {"plots"},
    {"train"},
    {"demo"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.name not in ("__init__.py", "__main__.py")]


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, but for annotations only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for name in imported(path):
        if name.startswith("trueline."):
            other = name.split(".")[1]
            assert other == own or LEVEL[other] < LEVEL[own], f"{own} imports {other}"


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("*.py")), ids=lambda p: p.name)
def test_methods_need_torch_and_the_standard_library_only(path):
    import sys

    roots = {name.split(".")[0] for name in imported(path)}
    assert roots <= {"torch", "trueline"} | sys.stdlib_module_names


def test_every_module_has_a_layer():
    assert {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES} <= set(LEVEL)
