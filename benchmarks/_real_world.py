"""What the parts of `real.py` share: the models, the rows that grow, and how a table is written."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trueline import LanguageModel, load_model
from trueline.records.lines import Rows

FOLDERS = {
    "smollm2": "smollm2-135m-instruct",
    "qwen": "qwen2.5-coder-0.5b-instruct",
    "gemma": "gemma-3-270m",
}
NAMES = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B", "gemma": "Gemma 3 270M, base"}
START = time.perf_counter()


@dataclass(frozen=True)
class Task:
    """A piece of a part: made once, cheap to ask whether it is there."""

    worth: float
    """Tasks of more worth come first."""
    name: str
    done: Callable[[], bool]
    run: Callable[[], object]


class World:
    """Where results are kept, and the models, loaded when first asked for."""

    def __init__(self, output: Path, models: Path, shared: Path, *, quick: bool = False) -> None:
        self.output, self.folder, self.shared, self.quick = output, models, shared, quick
        self._rows: dict[Path, Rows] = {}
        self._models: dict[str, LanguageModel] = {}

    def model(self, name: str) -> LanguageModel:
        """Return a model in its checkpoint's own precision (bfloat16), with packed weights."""
        if name not in self._models:
            self._models[name] = load_model(self.path(name))
        return self._models[name]

    def path(self, name: str) -> Path:
        """Return a model's folder."""
        return self.folder / FOLDERS[name]

    def rows(self, *names: str) -> Rows:
        """Return the growing file of these names under the output folder, opened once."""
        path = self._path(names, ".jsonl")
        if path not in self._rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._rows[path] = Rows(path)
        return self._rows[path]

    def _path(self, names: Sequence[str], suffix: str) -> Path:
        """Return a file under the output folder; a dot in a name, as of a rate, is none of it."""
        *folders, last = names
        return self.output.joinpath(*folders, last + suffix)

    def close(self) -> None:
        """Close the growing files."""
        for rows in self._rows.values():
            rows.close()
        self._rows.clear()

    def kept(self, *names: str, make: Callable[[], Any] | None = None) -> Any:
        """Return what is in a JSON file under the output folder, made where it is missing."""
        path = self._path(names, ".json")
        if not path.exists():
            if make is None:
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            part.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)
        return json.loads(path.read_text(encoding="utf-8"))


def say(text: str) -> None:
    """Tell the progress on stderr, with the minutes since the start."""
    print(f"{(time.perf_counter() - START) / 60:6.1f} min  {text}", file=sys.stderr, flush=True)


def over_groups(
    values: Sequence[float], groups: Sequence[str], *, samples: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of groups' means and its 95 % interval, groups drawn again with replacement.

    The interval speaks of other groups (principles) like these, not only of other questions.
    """
    by: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        by.setdefault(group, []).append(value)
    means = np.array([np.mean(own) for own in by.values()])
    draws = np.random.default_rng(seed).integers(len(means), size=(samples, len(means)))
    low, high = np.quantile(means[draws].mean(1), [0.025, 0.975])
    return float(means.mean()), float(low), float(high)


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def spanned(estimate: Mapping[str, Any] | tuple[float, float, float], digits: int = 2) -> str:
    """Return a value with its interval: "0.31 [0.25, 0.37]"."""
    value, low, high = (
        estimate
        if isinstance(estimate, tuple)
        else (estimate["value"], estimate["low"], estimate["high"])
    )
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
