"""Tasks of a continual stream: what they hold, what the model is shown, the paper's six orders.

Paper: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", EMNLP
Findings 2023, arXiv 2310.14152. A task is a classification with its own labels, put as a question
in words: an instruction, the labels to choose from, the sentence.

    Task:TC                                    only with `task_lines`: they give the task away
    Dataset:agnews                             only with `task_lines`
    What is the topic of this text? ...        the instruction of the task's category
    Option: World, Sports, Business            only with `options`
    Title: Adelaide win Grand Final ...
    Answer:

Differs from the paper: the instructions say the same in our own words; the authors' prompt has the
two lines that name task and dataset, here they are off unless asked for [code].
`trueline.train.tasks.stream_files` reads tasks from files.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from trueline.errors import ConfigError, DataError, check_number, suggestion
from trueline.records.hashes import digest

T = TypeVar("T")
CHOOSE = "Choose one of the options."
INSTRUCTIONS = {
    "SC": f"What is the sentiment of this text? {CHOOSE}",
    "TC": f"What is the topic of this text? {CHOOSE}",
    "NLI": f"How does sentence 2 follow from sentence 1? {CHOOSE}",
    "QQP": f"Do the first sentence and the second sentence mean the same? {CHOOSE}",
    "BoolQA": f"Is the answer to the question yes (True) by the passage, or no (False)? {CHOOSE}",
    "MultiRC": f"By the paragraph, is the candidate answer to the question right? {CHOOSE}",
    "WiC": f"Does the word have the same meaning in both sentences? {CHOOSE}",
    "COPA": f"Which of the two sentences is the cause or effect asked for? {CHOOSE}",
}
"""An instruction for each category of the paper's tasks."""
ORDERS = {
    "order-1": "dbpedia amazon yahoo agnews",
    "order-2": "dbpedia amazon agnews yahoo",
    "order-3": "yahoo amazon agnews dbpedia",
    "order-4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC "
    "yahoo",
    "order-5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon "
    "yahoo",
    "order-6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA "
    "WiC",
}
"""The paper's six orders of tasks."""
_STRIP = str.maketrans("", "", string.punctuation)


def _check(name: str, value: Any, **bounds: Any) -> None:
    if value is not None:
        check_number(name, value, **bounds)


@dataclass(frozen=True)
class Example:
    """A sentence and the label it should get."""

    sentence: str
    label: str


@dataclass(frozen=True)
class TaskSettings:
    """What a task has of its own; None takes what the run has."""

    lambda_1: float | None = None
    """Strength of the orthogonality penalty, at least 0."""
    lambda_2: float | None = None
    """Strength of the norm penalty, at least 0."""
    rank: int | None = None
    """Rank of the task's LoRA, at least 1."""
    learning_rate: float | None = None
    """Above 0."""
    epochs: float | None = None
    """Passes over the training rows, above 0."""
    limit: int | None = None
    """At most so many training rows, drawn by the run's seed; at least 1."""

    def __post_init__(self) -> None:
        for name in ("lambda_1", "lambda_2"):
            _check(name, getattr(self, name), low=0)
        for name in ("learning_rate", "epochs"):
            _check(name, getattr(self, name), low=0, low_open=True)
        for name in ("rank", "limit"):
            _check(name, getattr(self, name), low=1, whole=True)

    def over(self, defaults: TaskSettings) -> TaskSettings:
        """Return these settings, with `defaults` where they say nothing."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(defaults, **{k: v for k, v in own.items() if v is not None})


@dataclass(frozen=True)
class PromptForm:
    """Which lines the model is shown around a sentence; the "Answer:" line is always there."""

    instruction: bool = True
    """The task's instruction. Off, nothing but options and sentence tell what is asked."""
    options: bool = True
    """The labels to choose from."""
    task_lines: bool = False
    """The authors' lines with the names of task and dataset: they give the task away."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if not isinstance(value := getattr(self, f.name), bool):
                raise ConfigError(f"`{f.name}` of the prompt must be true or false, got {value!r}.")

    def around(self, task: Task) -> tuple[str, str]:
        """Return what stands before and after a sentence of this task."""
        lines = [f"Task:{task.category}", f"Dataset:{task.name}"] if self.task_lines else []
        lines += [task.instruction] if self.instruction and task.instruction else []
        lines += [f"Option: {', '.join(task.labels)}"] if self.options else []
        return "".join(line + "\n" for line in lines), "\nAnswer:"

    def text(self, task: Task, sentence: str) -> str:
        """Return the prompt for a sentence of this task."""
        before, after = self.around(task)
        return f"{before}{sentence.strip()}{after}"


@dataclass(frozen=True)
class Task:
    """A task of a stream: rows for training, choosing settings and testing, and its labels.

    Raises `DataError` if a label of a row is not among `labels`, or two labels are the same after
    `normalise`.
    """

    name: str
    train: tuple[Example, ...] = field(repr=False)
    validation: tuple[Example, ...] = field(repr=False)
    """For choosing settings; may be empty."""
    test: tuple[Example, ...] = field(repr=False)
    labels: tuple[str, ...]
    instruction: str = ""
    category: str = ""
    """Key of `INSTRUCTIONS`, or any word for tasks that ask the same."""
    settings: TaskSettings = TaskSettings()

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test", "labels"):
            object.__setattr__(self, split, tuple(getattr(self, split)))
        if not self.train:
            raise DataError(f'Task "{self.name}" has no training rows.')
        if len(self.labels) < 2:
            raise DataError(f'Task "{self.name}" needs two labels or more, got {self.labels}.')
        seen: dict[str, str] = {}
        for label in self.labels:
            if not normalise(label):
                raise DataError(f'Task "{self.name}" has a label without a letter: "{label}".')
            if (other := seen.setdefault(normalise(label), label)) != label:
                raise DataError(f'Task "{self.name}" has one label twice: "{other}", "{label}".')
        if len(seen) < len(self.labels):
            raise DataError(f'Task "{self.name}" has one label twice in {list(self.labels)}.')
        for split in ("train", "validation", "test"):
            for row, example in enumerate(getattr(self, split), 1):
                if example.label not in self.labels:
                    raise DataError(
                        f'Task "{self.name}", {split} row {row}: label "{example.label}" is not '
                        f"one of {', '.join(self.labels)}."
                    )

    def fingerprint(self) -> str:
        """Return a short hash of all that the task holds but its settings."""
        rows = [
            [[e.sentence, e.label] for e in part]
            for part in (self.train, self.validation, self.test)
        ]
        return digest([self.name, rows, self.labels, self.instruction, self.category])


def normalise(text: str) -> str:
    """Return a label as it is compared: lower-case, no punctuation, single spaces."""
    return " ".join(text.lower().translate(_STRIP).split())


def same_label(answer: str, label: str) -> bool:
    """Return whether a generated answer is this label, after `normalise`."""
    return normalise(answer) == normalise(label)


def union_of_labels(tasks: Iterable[Task]) -> tuple[str, ...]:
    """Return all labels of all tasks in the order of their first use, equal ones once.

    Labels that are equal after `normalise` are one: "True" of two tasks has one place.
    """
    seen: dict[str, str] = {}
    for task in tasks:
        for label in task.labels:
            seen.setdefault(normalise(label), label)
    return tuple(seen.values())


def draw(rows: Sequence[T], limit: int | None, seed: int, key: str = "") -> list[T]:
    """Return `limit` of the rows, or all if there are fewer, drawn by seed and key, in their order.

    The same call returns the same rows, and a larger limit holds the rows of a smaller one.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    order = list(range(len(rows)))
    random.Random(f"{seed} {key}").shuffle(order)
    return [rows[i] for i in sorted(order[:limit])]


def order_names(order: str | Sequence[str]) -> list[str]:
    """Return the task names of a preset (`order-1` to `order-6`), or of a list as it is."""
    if not isinstance(order, str):
        return list(order)
    if order not in ORDERS:
        raise ConfigError(f'Unknown order "{order}".{suggestion(order, ORDERS)}')
    return ORDERS[order].split()
