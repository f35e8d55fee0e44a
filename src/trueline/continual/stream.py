"""A stream of tasks, trained one after the other and measured on all of them after each.

    tasks = preset("order-1", "../shared/data/cl_benchmark", leave_out=["yahoo"])
    result = run_stream(tasks, "tiny", "o-lora", output="runs/o-lora")
    result.R, result.measures["average_accuracy"]

The folder of a run:

    manifest.json     what decides the result, and what was written
    log.jsonl         the training loss and the penalties, a row for every logged step
    stages/01-NAME/   `adapter/` (PEFT's format) or `weights.pt`, `done.json` with the scores
    R.json, R.csv     the scores of every task after every stage, the measures
    R.png, time.png   the same to look at

A killed run goes on when it is called again with the same settings: at the stage where it stopped,
from its last checkpoint, and with the same result as unbroken (bit-equal on a CPU). For this every
stage starts from files alone: a fresh model, the adapters before it, and a seed of its own.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from trueline.continual.answers import by_length
from trueline.continual.config import StreamConfig
from trueline.continual.families import Row, kind_of
from trueline.continual.folder import (
    Log,
    StreamResult,
    hold_folder,
    write_result,
)
from trueline.continual.metrics import summary, trained
from trueline.continual.scores import Scorer, matrices
from trueline.continual.stage_weights import Factory, Fresh, StageWeights, model_factory
from trueline.continual.stages import Strategy, TaskStage
from trueline.continual.strategies import make_strategy
from trueline.continual.tasks import (
    Example,
    PromptForm,
    Task,
    TaskSettings,
    draw,
    union_of_labels,
)
from trueline.continual.trainers import (
    fast_collection,
    make_trainer,
    training_arguments,
)
from trueline.errors import ConfigError, DataError
from trueline.records.checkpoints import last_checkpoint
from trueline.records.lines import plain
from trueline.records.manifest import read_json, write_json
from trueline.records.run_folder import RunFolder
from trueline.train.keep import Keep
from trueline.train.progress import no_bars, quiet

__all__ = ["StreamConfig", "StreamResult", "model_factory", "run_stream"]


def run_stream(
    tasks: Sequence[Task],
    model: str | Factory,
    strategy: str | Strategy = "o-lora",
    *,
    output: str | Path,
    config: StreamConfig | None = None,
    prompt: PromptForm | None = None,
    texts: Sequence[str] = (),
    overwrite: bool = False,
    figures: bool = True,
    progress: bool = False,
    on_stage: Callable[[StreamResult], object] = lambda result: None,
) -> StreamResult:
    """Train the tasks in their order by a strategy, and measure all of them after each.

    Args:
        tasks: From `trueline.continual.files`, or made in Python.
        model: "tiny", a folder or a hub name; or a function that returns a fresh (model,
            tokenizer), the same at every call. Weights that it freezes stay frozen. A classifier
            has an output for each label of `union_of_labels(tasks)`.
        strategy: A name of `STRATEGIES`, or one made by `make_strategy` with options.
        output: Folder of the run; an unfinished run in it goes on, a finished one is read.
        config: What all tasks share.
        prompt: Which lines the model is shown.
        texts: Unrelated texts on which the cross-entropy of a causal model is measured.
        overwrite: Remove what a run left in the folder.
        figures: Draw after each stage; needs matplotlib.
        progress: Show a bar.
        on_stage: Called after each stage with the result so far (its `measures` are those of the
            tasks trained so far).

    Raises:
        ConfigError: An option is out of range, or the folder is another run's.
        DataError: A task has no rows to measure.
        ModelError: The model does not fit the tasks.
    """
    if isinstance(strategy, str):
        strategy = make_strategy(strategy)
    if isinstance(model, str):
        model = model_factory(model, tasks)
    with quiet(), no_bars(), fast_collection():
        runner = _Runner(
            tuple(tasks), model, strategy, Path(output), config or StreamConfig(),
            prompt or PromptForm(), tuple(texts), figures, progress, on_stage,
        )  # fmt: skip
        with hold_folder(runner.folder, runner.settings, overwrite) as run:
            return runner.run(run)


class _Runner:
    """One run; made of its settings, everything else is in its folder."""

    def __init__(
        self,
        tasks: tuple[Task, ...],
        factory: Factory,
        strategy: Strategy,
        folder: Path,
        config: StreamConfig,
        prompt: PromptForm,
        texts: tuple[str, ...],
        figures: bool,
        progress: bool,
        on_stage: Callable[[StreamResult], object],
    ) -> None:
        _check_tasks(tasks, config)
        self.tasks, self.strategy, self.config = tasks, strategy, config
        self.folder, self.figures = folder, figures
        self.progress, self.on_stage = progress, on_stage
        if figures:
            from trueline.records.style import need_matplotlib

            need_matplotlib()
        self.fresh = Fresh(factory)
        tokenizer = self.fresh.tokenizer
        self.kind = kind_of(
            self.fresh.first,
            tokenizer,
            union=union_of_labels(tasks),
            prompt=prompt,
            max_length=config.max_length,
            train_labels=config.train_labels,
            chat=config.chat,
        )
        if texts and self.kind.name != "causal":
            raise ConfigError("`texts` need a causal language model.")
        if config.scoring == "generated" and self.kind.name == "classifier":
            raise ConfigError('A classifier writes nothing: `scoring` is "offered" or "union".')
        n = range(len(tasks))
        self.stages = [list(n)] if strategy.weights == "joint" else [[j] for j in n]
        self.settings = self._settings(prompt, texts)
        count = range(len(self.stages))
        name = "weights.pt" if strategy.weights == "all" else "adapter"
        ranks = [
            config.rank if strategy.weights == "one" else self._task_settings(i).rank or config.rank
            for i in count
        ]
        self.weights = StageWeights(
            self.fresh, strategy, config, [self._stage_folder(i) / name for i in count], ranks,
            [self._seed(i) for i in count],
        )  # fmt: skip
        self._train: dict[int, list[Row]] = {}
        self.scorer = Scorer(self.kind, tasks, config, tokenizer, texts)

    def _settings(self, prompt: PromptForm, texts: tuple[str, ...]) -> dict[str, Any]:
        """Return all that decides the result, as JSON."""
        found = {
            "strategy": {"name": self.strategy.name, **asdict(self.strategy.keep)},
            "config": asdict(self.config),
            "prompt": asdict(prompt),
            "tasks": [
                {"name": t.name, "data": t.fingerprint(), "settings": asdict(t.settings)}
                for t in self.tasks
            ],
            "model": self.fresh.hash,
            "family": self.kind.name,
            "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16],
        }
        return json.loads(json.dumps(plain(found)))

    def run(self, held: RunFolder) -> StreamResult:
        """Do what is not done yet, in the folder that is held."""
        self.held = held
        with self._bar() as bar:
            scores = [self._untouched(bar)]
            for index in range(len(self.stages)):
                path = self._stage_folder(index)
                if (path / "done.json").exists():
                    scores.append(read_json(path / "done.json"))
                    bar.update(self._steps(index))
                    continue
                scores.append(self._stage(index, scores, bar))
                result = self._result(scores)
                self._write(result, final=False)
                self.on_stage(result)
        result = self._result(scores)
        self._write(result, final=True)
        return result

    # -- one stage

    def _stage(self, index: int, scores: list[Any], bar: Any) -> dict[str, Any]:
        """Train a stage, or take it up where it was left, and measure it."""
        path, started = self._stage_folder(index), time.perf_counter()
        path.mkdir(exist_ok=True)
        stage = self._view(index)
        if self.weights.saved[index].exists():
            model, trained_s = self.weights.again(index), 0.0
            bar.update(self._steps(index))
        else:
            model = self._train_stage(index, stage, bar)
            trained_s = time.perf_counter() - started
        model.eval()
        self._keep(index).end(model, stage, self.weights.saved[index])
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
        bar.set_description(f"{self._name(index)}: measuring")
        done = self._measure(model, index, scores)
        done["seconds"] = {
            "training": round(trained_s, 3),
            "all": round(time.perf_counter() - started, 3),
        }
        write_json(path / "done.json", done)
        self.weights.drop(index - 1)
        return done

    def _train_stage(self, index: int, stage: TaskStage, bar: Any) -> Any:
        """Return the trained model, saved."""
        set_seed(stage.seed)
        model, stack = self.weights.start(index)
        work = self._stage_folder(index) / "checkpoints"
        checkpoint = last_checkpoint(work, remove=True) if work.exists() else None
        keep = self._keep(index)
        keep.begin(model, stage)
        rows = keep.rows(stage)
        steps, on_cpu = self._steps(index), self.fresh.device.type == "cpu"
        arguments = training_arguments(
            self.config, self._task_settings(index), stage.seed, steps, work, on_cpu=on_cpu
        )
        trainer = make_trainer(model, stack, self.strategy, keep, stage, rows, arguments)
        log = Log(self.held.lines("log.jsonl"), index, self._name(index), bar, checkpoint)
        trainer.add_callback(log)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.weights.save(model, index)
        return model

    # -- rows

    def _view(self, index: int) -> TaskStage:
        """Return what the way to keep may see of a stage."""
        own = [row for j in self.stages[index] for row in self._train_rows(j)]
        seed, kind, size = self._seed(index), self.kind, self.config.batch_size

        def batches(model: Any, count: int) -> Iterator[dict[str, Any]]:
            rows = stage.draw(count, key="probe")
            for part in by_length([row["input_ids"] for row in rows], size):
                yield kind.collate([rows[i] for i in part])

        folders = self.weights.saved[:index]
        stage = TaskStage(index, len(self.stages), folders, own, batches, seed, kind)
        return stage

    def _keep(self, index: int) -> Keep:
        """Return the way to keep, with a task's own strengths."""
        keep, own = self.strategy.keep, self._task_settings(index)
        given = {f.name: getattr(own, f.name, None) for f in fields(keep)}
        return replace(keep, **{name: v for name, v in given.items() if v is not None})

    def _train_rows(self, j: int) -> list[Row]:
        if j not in self._train:
            self._train[j] = self.kind.encode(self.tasks[j], self._drawn(j))
        return self._train[j]

    def _drawn(self, j: int) -> list[Example]:
        task = self.tasks[j]
        limit = task.settings.limit or self.config.limit
        return draw(task.train, limit, self.config.seed, f"train {task.name}")

    def _task_settings(self, index: int) -> TaskSettings:
        """Return the settings of a stage's task; joint training has none of its own."""
        places = self.stages[index]
        return self.tasks[places[0]].settings if len(places) == 1 else TaskSettings()

    def _steps(self, index: int) -> int:
        """Return the optimiser steps of a stage: those that the rows of its tasks take."""
        size, steps = self.config.batch_size * self.config.gradient_accumulation, 0
        for j in self.stages[index]:
            epochs = self.tasks[j].settings.epochs or self.config.epochs
            limit = self.tasks[j].settings.limit or self.config.limit
            rows = len(self.tasks[j].train) if limit is None else limit
            steps += max(1, round(epochs * -(-min(rows, len(self.tasks[j].train)) // size)))
        return steps

    def _name(self, index: int) -> str:
        return "+".join(self.tasks[j].name for j in self.stages[index])

    def _seed(self, index: int) -> int:
        return 1000 * self.config.seed + index + 1

    def _stage_folder(self, index: int) -> Path:
        places = self.stages[index]
        name = self.tasks[places[0]].name if len(places) == 1 else "all"
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        return self.folder / "stages" / f"{index + 1:02d}-{safe}"

    # -- scores

    def _untouched(self, bar: Any) -> dict[str, Any]:
        path = self.folder / "stages" / "untouched.json"
        if not path.exists():
            bar.set_description("measuring")
            write_json(path, self.scorer.measure(self.fresh().eval(), range(len(self.tasks))))
        return read_json(path)

    def _measure(self, model: Any, index: int, scores: list[Any]) -> dict[str, Any]:
        """Return the scores of every task by every way of scoring."""
        n = len(self.tasks)
        last = max(self.stages[index])
        if self.strategy.weights != "apart":
            places = range(n if self.config.evaluate == "all" else last + 1)
            return self.scorer.measure(model, places)
        # Each task has a model of its own: the others' scores are known.
        table = copy.deepcopy(scores[-1]["scores"])
        for view, value in self.scorer.accuracy(model, index).items():
            table[view][index] = value
        return {"scores": table, **self.scorer.text(model)}

    # -- what is written

    def _result(self, scores: list[Any]) -> StreamResult:
        views = matrices(scores, len(self.stages))
        main = views[self.config.scoring]
        done = len(scores) - 1
        part, before = main["R"], main["untouched"]
        if done < len(self.stages):
            part, before = trained(part), before[:done]
        folders = self.weights.saved[:done]
        kept = {"stack": folders, "one": folders[-1:], "joint": folders, "all": [], "apart": []}
        return StreamResult(
            tuple(task.name for task in self.tasks),
            self.strategy.name,
            main["R"],
            main["untouched"],
            views,
            summary(part, before) if part.size else {},
            [s["text_loss"] for s in scores if "text_loss" in s],
            self.folder,
            tuple(kept[self.strategy.weights]),
        )

    def _write(self, result: StreamResult, *, final: bool) -> None:
        config, kind = self.config, self.kind
        about = {"kind": kind.name, "chat": kind.chat, "labels": list(kind.union)}
        about |= {name: getattr(config, name) for name in ("seed", "scoring", "evaluate_on")}
        write_result(self.held, result, about, final=final, figures=self.figures)

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Any]:
        from tqdm import tqdm

        total = sum(self._steps(i) for i in range(len(self.stages)))
        # A log file gets a line now and then, a terminal a bar that moves.
        every = 0.2 if sys.stderr.isatty() else 30.0
        with tqdm(total=total, unit="step", disable=not self.progress, mininterval=every,
                  file=sys.stderr, dynamic_ncols=True) as bar:  # fmt: skip
            yield bar


def _check_tasks(tasks: Sequence[Task], config: StreamConfig) -> None:
    if not tasks:
        raise ConfigError("There are no tasks to train.")
    names = [task.name for task in tasks]
    if double := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f'Two tasks are called "{double[0]}". Give each a name of its own.')
    for task in tasks:
        if not getattr(task, config.evaluate_on):
            raise DataError(f'Task "{task.name}" has no {config.evaluate_on} rows to measure.')
