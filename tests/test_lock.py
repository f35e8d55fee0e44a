"""What is installed is written down twice, for pip and for uv: both say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def locked() -> list[dict]:
    return tomllib.loads((ROOT / "uv.lock").read_text())["package"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_has_the_versions_of_the_constraints(locked):
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    pinned = {canonical(name): version for name, version in pinned.items()}
    found = [(p["name"], p["version"]) for p in locked if p["name"] in pinned]
    assert sorted(found) == sorted(pinned.items())


def test_the_lock_has_what_pyproject_asks_for(locked):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = [(text, "") for text in project["dependencies"]]
    extras = project["optional-dependencies"]
    rows += [(text, f"extra == '{extra}'") for extra, texts in extras.items() for text in texts]
    asked = set()
    for text, extra in rows:
        name, _, versions = re.fullmatch(r"([\w.-]+)(\[\w+\])?(.*)", text).groups()
        asked.add((canonical(name), frozenset(versions.split(",")), extra))
    own = next(p for p in locked if p["name"] == "trueline")
    written = {
        (row["name"], frozenset(row.get("specifier", "").split(",")), row.get("marker", ""))
        for row in own["metadata"]["requires-dist"]
    }
    assert written == asked
    assert own["version"] == project["version"]
