"""Replay: some rows of each earlier stage are kept in its adapter's folder and mixed in."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trueline.errors import DataError, check_number
from trueline.records.disk import replace_file
from trueline.records.lines import dump
from trueline.train.keep.stage import Keep, Row, Stage

FILE = "replay.jsonl"


@dataclass(frozen=True)
class Replay(Keep):
    """Rows of earlier stages take the places of new ones."""

    name: ClassVar[str] = "replay"

    buffer: int = 32
    """Rows kept of each earlier stage, at least 1."""
    share: float = 0.5
    """Share of the training rows that is drawn from the buffer, in (0, 1)."""

    def __post_init__(self) -> None:
        check_number("buffer", self.buffer, low=1, whole=True)
        check_number("share", self.share, low=0, high=1, low_open=True, high_open=True)

    def rows(self, stage: Stage) -> list[Row]:
        """Return as many rows as the stage has, part of them from the buffer, with repeats."""
        kept = [row for folder in stage.folders for row in _read(folder)]
        if not kept:
            return list(stage.rows)
        old = max(1, round(self.share * len(stage.rows)))
        rng = random.Random(f"{stage.seed} replay")
        # Each row of the buffer as often as any other, up to one.
        order = [kept[i] for _ in range(-(-old // len(kept)))
                 for i in rng.sample(range(len(kept)), len(kept))]  # fmt: skip
        return stage.draw(len(stage.rows) - old, key="new") + order[:old]

    def end(self, model: Any, stage: Stage, folder: Path) -> None:
        """Keep rows of the stage."""
        rows = stage.draw(self.buffer, key="buffer")
        replace_file(folder / FILE, "".join(dump(row) + "\n" for row in rows))


def _read(folder: Path) -> list[Row]:
    path = folder / FILE
    if not path.exists():
        raise DataError(f"{path}: there is none. Replay needs rows of every earlier stage.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
