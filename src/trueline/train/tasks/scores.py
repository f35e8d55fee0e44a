"""Scores of a stream: a model measured on every task, in every way that its family has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trueline.train.tasks.answers import text_loss
from trueline.train.tasks.families import Family, Row
from trueline.train.tasks.stream_config import StreamConfig
from trueline.train.tasks.task import Example, Task, draw, same_label


@dataclass
class Scorer:
    """Measures models on the tasks of a stream."""

    family: Family
    tasks: Sequence[Task]
    config: StreamConfig
    tokenizer: Any
    texts: Sequence[str] = ()
    """Unrelated texts, whose cross-entropy is measured too."""
    _rows: dict[int, tuple[list[Row], list[Example]]] = field(default_factory=dict)

    def measure(self, model: Any, places: Iterable[int]) -> dict[str, Any]:
        """Return the scores of the tasks at these places, None for the others, and the text loss.

        {"scores": {"offered": [0.9, None], "union": [0.4, None]}, "text_loss": 3.1}
        """
        found = {j: self.accuracy(model, j) for j in places}
        n = range(len(self.tasks))
        views = next(iter(found.values()))
        table = {view: [found[j][view] if j in found else None for j in n] for view in views}
        return {"scores": table, **self.text(model)}

    def accuracy(self, model: Any, j: int) -> dict[str, float]:
        """Return the share of right answers on a task, by the way of scoring."""
        rows, examples = self._test_rows(j)
        with self._autocast(model):
            answers = self.family.predict(
                model, self.tasks[j], rows, self.config.scoring, self.config.evaluate_batch_size
            )
        return {view: accuracy_of(found, examples) for view, found in answers.items()}

    def text(self, model: Any) -> dict[str, float]:
        """Return {"text_loss": nats a token}; empty where there are no texts."""
        if not self.texts:
            return {}
        with self._autocast(model):
            length = self.config.max_length
            return {"text_loss": text_loss(model, self.tokenizer, self.texts, length)}

    def _test_rows(self, j: int) -> tuple[list[Row], list[Example]]:
        if j not in self._rows:
            task, config = self.tasks[j], self.config
            rows = getattr(task, config.evaluate_on)
            examples = draw(rows, config.evaluate_limit, 0, f"{config.evaluate_on} {task.name}")
            self._rows[j] = self.family.encode(task, examples), examples
        return self._rows[j]

    def _autocast(self, model: Any) -> Any:
        return torch.autocast(model.device.type, torch.bfloat16, enabled=self.config.bf16)


def accuracy_of(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Return the share of answers that are the label of their example."""
    right = [same_label(a, e.label) for a, e in zip(answers, examples, strict=True)]
    return sum(right) / len(right)


def matrices(
    scores: Sequence[Mapping[str, Any]], stages: int
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Return `untouched` and `R` by the way of scoring, nan where nothing is measured (yet).

    Args:
        scores: What `Scorer.measure` gave of the untouched model and after each stage so far.
        stages: Rows of R.
    """
    views = {}
    for view, first in scores[0]["scores"].items():
        rows = [[np.nan if v is None else v for v in s["scores"][view]] for s in scores]
        rows += [[np.nan] * len(first)] * (stages + 1 - len(rows))
        views[view] = {"untouched": np.array(rows[0]), "R": np.array(rows[1:])}
    return views
