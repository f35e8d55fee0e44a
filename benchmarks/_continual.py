"""Cells of the continual benchmark: one strategy on one order with one seed, and its numbers."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._continual_model import States, upper_model
from trueline.continual.strategies import make_strategy
from trueline.continual.stream import StreamConfig, run_stream
from trueline.evals.statistics import Estimate
from trueline.evals.transfer import over_seeds, summary
from trueline.jobs.stacking import StackResults
from trueline.records.disk import replace_file
from trueline.train.tasks.stream_files import preset
from trueline.train.tasks.task import PromptForm, Task, union_of_labels

TASKS = ["MNLI", "CB", "WiC", "QQP", "IMDB", "yelp", "amazon", "SST-2", "dbpedia", "agnews"]
"""Of the 14 at hand those on which this model learns something; WiC stands for those on which it
does not."""
ORDERS = {
    "order-4": TASKS,
    "order-5": ["WiC", "MNLI", "CB", "QQP", "IMDB", "SST-2", "dbpedia", "agnews", "yelp", "amazon"],
    "order-6": ["yelp", "amazon", "MNLI", "CB", "QQP", "IMDB", "SST-2", "dbpedia", "agnews", "WiC"],
}
"""The paper's long orders, without the tasks left out above."""
PROTOCOLS = ("union", "offered")
MEASURES = (
    "average_accuracy",
    "backward_transfer",
    "learning_accuracy",
    "forward_transfer",
    "forgetting",
)
STACKED, BATCH = ("query", "value"), 16
PROMPT = PromptForm(instruction=False, options=False)
TUNE_ORDERS, TUNE_SEED, FINALISTS = ("order-4", "order-6"), 0, 3
"""Settings are tried on the first order; the best of them, so many, on the second too."""


@dataclass(frozen=True)
class Choice:
    """What is tuned: a learning rate and a strategy's own options."""

    learning_rate: float
    options: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Return it as it stands in tables."""
        return ", ".join([f"lr {self.learning_rate:g}", *(f"{k} {v}" for k, v in
                                                          self.options.items())])  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    rows: int = 600
    test_rows: int = 100
    validation_rows: int = 60
    tasks: int = 10

    def order(self, name: str) -> list[str]:
        """Return the first tasks of an order."""
        return ORDERS[name][: self.tasks]


class Bench:
    """Runs cells, each once: what is in the file of results is not run again.

    Args:
        data: Folder in CL_Benchmark's layout.
        work: For states, checkpoints and unfinished runs.
        size: How much is trained and measured.
    """

    def __init__(self, data: Path, work: Path, size: Size) -> None:
        self.data, self.work, self.size = data, work, size
        work.mkdir(parents=True, exist_ok=True)
        self.states = States(work / "states.pt")

    def tasks(self, order: str) -> list[Task]:
        """Return the tasks of an order."""
        return list(preset(self.size.order(order), self.data))

    def factory(self, tasks: Sequence[Task]) -> Callable[[], tuple[Any, Any]]:
        """Return what makes the untouched model; its head is in the stream's own order."""
        return lambda: (upper_model(self.states, union_of_labels(tasks)), self.states)

    def cell(
        self, protocol: str, strategy: str, order: str, seed: int, choice: Choice, *, tuning: bool
    ) -> dict[str, Any]:
        """Run one cell and return its row of results."""
        folder = self.work / ("tuning" if tuning else "runs")
        folder /= "-".join([protocol, strategy, order, str(seed), choice.text()]).replace(" ", "")
        start = time.process_time()
        result = self.train(protocol, strategy, order, seed, choice, folder, tuning=tuning)
        seconds = time.process_time() - start
        other = next(name for name in PROTOCOLS if name != protocol)
        row = {
            "strategy": strategy,
            "order": order,
            "seed": seed,
            "learning_rate": choice.learning_rate,
            "options": choice.options,
            "R": rounded(result.R),
            "untouched": rounded(result.untouched),
            f"R_{other}": rounded(result.views[other]["R"]),
            "cpu_seconds": round(seconds, 1),
        }
        shutil.rmtree(folder, ignore_errors=True)
        return row

    def train(
        self,
        protocol: str,
        strategy: str,
        order: str,
        seed: int,
        choice: Choice,
        folder: Path,
        *,
        tuning: bool,
    ) -> StackResults:
        """Train a strategy on an order and measure it, on validation rows if `tuning`."""
        tasks = self.tasks(order)
        return run_stream(
            tasks,
            self.factory(tasks),
            make_strategy(strategy, **choice.options),
            output=folder,
            config=StreamConfig(
                dropout=0.0,
                target_modules=STACKED,
                learning_rate=choice.learning_rate,
                warmup_steps=10,
                batch_size=BATCH,
                limit=self.size.rows,
                train_labels=protocol,
                scoring=protocol,
                evaluate="seen" if tuning else "all",
                evaluate_on="validation" if tuning else "test",
                evaluate_limit=self.size.validation_rows if tuning else self.size.test_rows,
                seed=seed,
                save_steps=10_000,
                logging_steps=1000,
            ),
            prompt=PROMPT,
            figures=False,
        )


class Results:
    """Rows in a JSON file, by strategy, order, seed and what was tuned."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))

    def find(self, **fields: Any) -> list[dict[str, Any]]:
        """Return the rows with these values."""
        return [r for r in self.rows if all(r.get(k) == v for k, v in fields.items())]

    def of(self, strategy: str, order: str, choice: Choice) -> list[dict[str, Any]]:
        """Return the rows of a strategy with a setting on an order."""
        return self.find(strategy=strategy, order=order, learning_rate=choice.learning_rate,
                         options=choice.options)  # fmt: skip

    def drop(self, **fields: Any) -> None:
        """Forget the rows with these values, from here on and, with the next `add`, in the file."""
        gone = self.find(**fields)
        self.rows = [row for row in self.rows if row not in gone]

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(r) for r in self.rows)
        replace_file(self.path, f"[\n{lines}\n]\n")


def rounded(values: Any) -> Any:
    """Return numbers with four digits as lists; what was not measured is None."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [rounded(row) for row in array]
    return [None if np.isnan(v) else round(float(v), 4) for v in array]


def matrix(R: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Return R with nan where nothing was measured."""
    return np.array(R, dtype=np.float64)


def measures(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the measures of a run."""
    R = matrix(row["R"])
    whole = np.isfinite(R).all()
    return summary(R, matrix([row["untouched"]])[0] if whole else None)


def estimates(rows: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Return each measure over runs, with its standard error and 95 % interval."""
    found = [measures(row) for row in rows]
    return {n: over_seeds([f[n] for f in found]) for n in MEASURES if n in found[0]}


def best(
    rows: Sequence[Mapping[str, Any]], strategy: str, settings: Sequence[Choice],
    orders: Sequence[str],
) -> list[Choice]:  # fmt: skip
    """Return the settings that ran on all these orders, highest average accuracy first."""

    def score(choice: Choice) -> float:
        own = {
            row["order"]: measures(row)["average_accuracy"] for row in rows
            if (row["strategy"], row["learning_rate"], row["options"])
            == (strategy, choice.learning_rate, choice.options)
        }  # fmt: skip
        return float(np.mean([own.get(order, np.nan) for order in orders]))

    return sorted((c for c in settings if not np.isnan(score(c))), key=score, reverse=True)
