"""Stages in a row, each from files alone: one function trains a stage, one measures after it.

    def train(link):                   # trains, or makes the model again from what it wrote
        ...                            # into link.folder, whole or not at all
        return model

    def measure(link, model, before):  # what JSON can hold
        return {"scores": ...}

    found = chain(["colours", "sizes"], "run/stages", train, measure)

A stage that is done is read. A killed chain goes on at the stage where it stopped; how far into it
is up to `train`, which has `link.checkpoints` for that.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trueline.records.disk import make_folder, saving
from trueline.records.manifest import read_json, write_json

Scores = dict[str, Any]


@dataclass(frozen=True)
class Link:
    """A stage and where it lies."""

    index: int
    """From 0."""
    total: int
    name: str
    folder: Path
    earlier: tuple[Path, ...]
    """Folders of the stages before it, oldest first."""
    seed: int
    """Of this stage alone."""

    @property
    def checkpoints(self) -> Path:
        """What a killed training of this stage goes on from; gone when the stage is done."""
        return self.folder / "checkpoints"


def links(names: Sequence[str], folder: str | Path, seed: int = 0) -> list[Link]:
    """Return the stages of these names, each in its own folder: 01-NAME, 02-NAME ..."""
    folders = [Path(folder) / f"{i:02d}-{_safe(name)}" for i, name in enumerate(names, 1)]
    return [
        Link(i, len(names), name, folders[i], tuple(folders[:i]), 1000 * seed + i + 1)
        for i, name in enumerate(names)
    ]


def chain(
    names: Sequence[str],
    folder: str | Path,
    train: Callable[[Link], Any],
    measure: Callable[[Link | None, Any, Sequence[Scores]], Scores],
    *,
    seed: int = 0,
    after: Callable[[list[Scores]], object] = lambda found: None,
) -> list[Scores]:
    """Train the stages that are not done, and return what was measured before and after each.

    Args:
        names: Of the stages.
        folder: For a folder of each stage.
        train: Returns the trained model of a stage.
        measure: (link, model, what was measured before) -> scores; before any training with
            (None, None, ()).
        seed: Of the chain; each stage has one of its own.
        after: Called after each stage that was trained here, with all scores so far.
    """
    untouched = Path(folder) / "untouched.json"
    make_folder(untouched.parent)
    found = [_read(untouched) or _written(untouched, measure(None, None, ()))]
    for link in links(names, folder, seed):
        done = link.folder / "done.json"
        if (scores := _read(done)) is not None:
            found.append(scores)
            continue
        link.folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with saving(link.folder):
            model = train(link)
        trained = time.perf_counter() - started
        shutil.rmtree(link.checkpoints, ignore_errors=True)
        scores = measure(link, model, found)
        seconds = {"training": round(trained, 3), "all": round(time.perf_counter() - started, 3)}
        found.append(_written(done, {**scores, "seconds": seconds}))
        after(found)
    return found


def _written(path: Path, scores: Scores) -> Scores:
    """Write scores whole, and return them as they will be read."""
    write_json(path, scores)
    found = _read(path)
    assert found is not None
    return found


def _read(path: Path) -> Scores | None:
    return read_json(path) if path.exists() else None


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
