"""The stages of a stream of tasks: what each trains, and what is measured after it.

    stages = TaskStages(tasks, factory, make_keep("drift"))
    chain(stages.names, folder, stages.train, stages.measure, seed=stages.config.seed)

Every stage starts from files alone: a fresh model, the adapters before it, and a seed of its own. A
stage that was stopped goes on from its last checkpoint, with the same result as unbroken (bit-equal
on a CPU).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from transformers import TrainerCallback, set_seed

from trueline.errors import ConfigError, DataError
from trueline.models.adapter import check_targets
from trueline.records.checkpoints import broken_checkpoints, last_checkpoint, step_of
from trueline.records.lines import LineFile, plain
from trueline.train.chain import Link, Scores
from trueline.train.keep import Keep
from trueline.train.keep.stage import Stage
from trueline.train.tasks.answers import by_length
from trueline.train.tasks.families import Family, Row, family_of
from trueline.train.tasks.fresh import Factory, Fresh
from trueline.train.tasks.scores import Scorer
from trueline.train.tasks.stacked import Stacked
from trueline.train.tasks.stream_config import StreamConfig
from trueline.train.tasks.task import PromptForm, Task, TaskSettings, draw, union_of_labels
from trueline.train.tasks.task_trainer import training_arguments
from trueline.types import Progress


@dataclass(frozen=True)
class TaskStage(Stage):
    """What a way to keep may see of the task being trained."""

    family: Family


class TaskStages:
    """What the stages of a stream train, and what is measured after each.

    Args:
        tasks: In the order in which they are trained.
        factory: Returns a fresh model and its tokenizer, the same at every call.
        keep: The way to keep what came before.
        config: What all tasks share.
        prompt: Which lines the model is shown.
        texts: Unrelated texts on which the cross-entropy of a causal model is measured.
        weights: How weights go on.
        progress: Told of each step.

    Raises:
        ConfigError: An option does not fit the model, or two tasks have one name.
        DataError: A task has no rows to measure.
        ModelError: The model does not fit the tasks.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        factory: Factory,
        keep: Keep,
        config: StreamConfig | None = None,
        *,
        prompt: PromptForm | None = None,
        texts: Sequence[str] = (),
        weights: type[Stacked] = Stacked,
        progress: Progress | None = None,
    ) -> None:
        self.tasks, self.keep, self.config = tuple(tasks), keep, config or StreamConfig()
        self.prompt, self.texts, self.progress = prompt or PromptForm(), tuple(texts), progress
        self.log: LineFile | None = None
        """Where rows of the training log go."""
        _check_tasks(self.tasks, self.config)
        self.fresh = Fresh(factory)
        check_targets(self.fresh.first, self.config.target_modules)
        self.family = family_of(
            self.fresh.first,
            self.fresh.tokenizer,
            union=union_of_labels(self.tasks),
            prompt=self.prompt,
            max_length=self.config.max_length,
            train_labels=self.config.train_labels,
            chat=self.config.chat,
        )
        if self.texts and self.family.name != "causal":
            raise ConfigError("`texts` need a causal language model.")
        if self.config.scoring == "generated" and self.family.name == "classifier":
            raise ConfigError('A classifier writes nothing: `scoring` is "offered" or "union".')
        self.weights = weights(self.fresh, self.config)
        self.groups = self.weights.groups(len(self.tasks))
        self.scorer = Scorer(self.family, self.tasks, self.config, self.fresh.tokenizer, self.texts)
        self._rows: dict[int, list[Row]] = {}
        self._done = 0
        self.broken: list[str] = []
        """Checkpoints that could not be gone on from: "01-colours/checkpoint-50/optimizer.pt"."""

    @property
    def names(self) -> list[str]:
        """Names of the stages."""
        return [self.tasks[g[0]].name if len(g) == 1 else "all" for g in self.groups]

    def settings(self) -> dict[str, Any]:
        """Return all that decides the result, as JSON."""
        found = {
            "config": asdict(self.config),
            "prompt": asdict(self.prompt),
            "tasks": [
                {"name": t.name, "data": t.fingerprint(), "settings": asdict(t.settings)}
                for t in self.tasks
            ],
            "model": self.fresh.hash,
            "family": self.family.name,
            "texts": hashlib.sha256("\0".join(self.texts).encode()).hexdigest()[:16],
        }
        return json.loads(json.dumps(plain(found)))

    # -- the two functions of the chain

    def train(self, link: Link) -> Any:
        """Return the trained model of a stage, its weights saved; taken up where it was left."""
        self._done = sum(self._steps(i) for i in range(link.index))
        stage, keep, rank = self._view(link), self._keep(link.index), self._rank(link.index)
        saved = link.folder / self.weights.file
        if saved.exists():
            model = self.weights.again(link, rank)
        else:
            model = self._train(link, stage, keep, rank)
            self.weights.save(model, link)
        model.eval()
        keep.end(model, stage, saved)
        return model

    def measure(self, link: Link | None, model: Any, before: Sequence[Scores]) -> Scores:
        """Return the scores of every task by every way of scoring."""
        n = len(self.tasks)
        if link is None:
            self._tell("measuring", 0)
            return self.scorer.measure(self.fresh().eval(), range(n))
        self._done = sum(self._steps(i) for i in range(link.index + 1))
        self._tell(f"{self._title(link.index)}: measuring", 0)
        places = self.weights.measured(link, max(self.groups[link.index]), n)
        found = self.scorer.measure(model, places)
        for view, row in found["scores"].items():
            for j in self.weights.carried(link, n):
                row[j] = before[-1]["scores"][view][j]
        self.weights.drop(link)
        return found

    def _train(self, link: Link, stage: TaskStage, keep: Keep, rank: int) -> Any:
        set_seed(link.seed)
        model, stack = self.weights.start(link, rank)
        work = link.checkpoints
        self.broken += [f"{link.folder.name}/{name}" for name in broken_checkpoints(work)]
        checkpoint = last_checkpoint(work, remove=True)
        keep.begin(model, stage)
        arguments = training_arguments(
            self.config, self._settings(link.index), link.seed, self._steps(link.index), work,
            on_cpu=self.fresh.device.type == "cpu",
        )  # fmt: skip
        trainer = self.weights.trainer(
            model, stack, keep.terms(stage), keep.rows(stage), arguments, family=self.family
        )
        trainer.add_callback(Log(self, link, 0 if checkpoint is None else step_of(checkpoint)))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return model

    # -- what a stage is made of

    def _view(self, link: Link) -> TaskStage:
        """Return what the way to keep may see of a stage."""
        own = [row for j in self.groups[link.index] for row in self._train_rows(j)]

        def batches(model: Any, count: int) -> Iterator[dict[str, Any]]:
            rows = stage.draw(count, key="probe")
            for part in by_length([row["input_ids"] for row in rows], self.config.batch_size):
                yield self.family.collate([rows[i] for i in part])

        folders = [folder / self.weights.file for folder in link.earlier]
        stage = TaskStage(link.index, link.total, folders, own, batches, link.seed, self.family)
        return stage

    def _keep(self, index: int) -> Keep:
        """Return the way to keep, with a task's own strengths."""
        own = self._settings(index)
        given = {f.name: getattr(own, f.name, None) for f in fields(self.keep)}
        return replace(self.keep, **{name: v for name, v in given.items() if v is not None})

    def _rank(self, index: int) -> int:
        return self._settings(index).rank or self.config.rank

    def _settings(self, index: int) -> TaskSettings:
        """Return the settings of a stage's task; several at once have none of their own."""
        places = self.groups[index]
        return self.tasks[places[0]].settings if len(places) == 1 else TaskSettings()

    def _train_rows(self, j: int) -> list[Row]:
        if j not in self._rows:
            task, config = self.tasks[j], self.config
            limit = task.settings.limit or config.limit
            chosen = draw(task.train, limit, config.seed, f"train {task.name}")
            self._rows[j] = self.family.encode(task, chosen)
        return self._rows[j]

    def _steps(self, index: int) -> int:
        """Return the optimiser steps of a stage: those that the rows of its tasks take."""
        size, steps = self.config.batch_size * self.config.gradient_accumulation, 0
        for task in (self.tasks[j] for j in self.groups[index]):
            epochs = task.settings.epochs or self.config.epochs
            limit = task.settings.limit or self.config.limit
            rows = len(task.train) if limit is None else min(limit, len(task.train))
            steps += max(1, round(epochs * -(-rows // size)))
        return steps

    def _title(self, index: int) -> str:
        return "+".join(self.tasks[j].name for j in self.groups[index])

    def _tell(self, what: str, step: int) -> None:
        if self.progress is not None:
            total = sum(self._steps(i) for i in range(len(self.groups)))
            self.progress(what, self._done + step, total)


class Log(TrainerCallback):
    """Writes the trainer's logs as rows and tells how far it is."""

    def __init__(self, stages: TaskStages, link: Link, seen: int) -> None:
        self.stages, self.stage = stages, link.index
        self.title = self.shown = stages._title(link.index)
        if stages.log is not None:
            _cut(stages.log, (link.index, seen))
        stages._tell(self.shown, seen)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of the step."""
        self.stages._tell(self.shown, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a row."""
        if not logs or "loss" not in logs:
            return
        self.shown = f"{self.title}: loss={float(logs['loss']):.3g}"
        kept = {k: v for k, v in logs.items() if k == "loss" or k.startswith("penalty/")}
        row = {"stage": self.stage, "task": self.title, "step": state.global_step, **kept}
        if self.stages.log is not None:
            self.stages.log.append([plain(row)], sync=False)


def places(log: LineFile) -> list[tuple[tuple[int, int], int]]:
    """Return ((stage, step), offset of its end) of each row; `DataError` for one of another run."""
    found = []
    for line, end, row in log.rows():
        try:
            found.append(((int(row["stage"]), int(row["step"])), end))
        except (KeyError, TypeError, ValueError):
            raise log.foreign(line) from None
    return found


def _cut(log: LineFile, last: tuple[int, int]) -> None:
    """Drop the rows after (stage, step), which a resumed run makes again."""
    log.cut(max((end for place, end in places(log) if place <= last), default=0))


def _check_tasks(tasks: Sequence[Task], config: StreamConfig) -> None:
    if not tasks:
        raise ConfigError("There are no tasks to train.")
    names = [task.name for task in tasks]
    if double := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f'Two tasks are called "{double[0]}". Give each a name of its own.')
    for task in tasks:
        if not getattr(task, config.evaluate_on):
            raise DataError(f'Task "{task.name}" has no {config.evaluate_on} rows to measure.')
