"""A stream of tasks, trained one after the other and measured on all of them after each.

    tasks = preset("order-1", "../shared/data/cl_benchmark", leave_out=["yahoo"])
    result = run_stream(tasks, "tiny", "o-lora", output="runs/o-lora")
    result.R, result.measures["average_accuracy"]

The folder of a run:

    stream.json       what decides the result, and what it was called with
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
import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trueline.errors import ConfigError, DataError
from trueline.evals.continual import summary, trained
from trueline.evals.runs import plain
from trueline.train.o_lora import OLoraConfig, OLoraTrainer
from trueline.train.runs.folders import last_checkpoint
from trueline.train.runs.records import quiet
from trueline.train.streams.config import StreamConfig
from trueline.train.streams.folder import (
    Log,
    StreamResult,
    hold_folder,
    read_json,
    write_json,
    write_result,
)
from trueline.train.streams.kinds import Factory, Kind, Row, accuracy_of, kind_of, text_loss
from trueline.train.streams.stage_weights import Fresh, StageWeights, model_factory
from trueline.train.streams.strategies import Stage, Strategy, make_strategy
from trueline.train.streams.tasks import (
    Example,
    PromptForm,
    Task,
    TaskSettings,
    draw,
    union_of_labels,
)

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
        tasks: From `trueline.train.streams.files`, or made in Python.
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
    with quiet(), _no_bars(), _fast_collection():
        runner = _Runner(
            tuple(tasks), model, strategy, Path(output), config or StreamConfig(),
            prompt or PromptForm(), tuple(texts), figures, progress, on_stage,
        )  # fmt: skip
        with hold_folder(runner.folder, runner.settings, overwrite):
            return runner.run()


class _TaskTrainer(Trainer):
    """The Trainer with the kind's own loss where it has one."""

    kind: Kind

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the kind's loss over a micro-batch, or the model's."""
        if "offered" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        fed = {k: v for k, v in inputs.items() if k not in ("offered", "labels")}
        outputs = model(**fed)
        loss = self.kind.loss(outputs.logits, inputs)
        return (loss, outputs) if return_outputs else loss


class _AdapterTrainer(OLoraTrainer, _TaskTrainer):
    """The same for one adapter, with the strategy's terms."""


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
        self.folder, self.texts, self.figures = folder, texts, figures
        self.progress, self.on_stage = progress, on_stage
        if figures:
            from trueline.plots import need_matplotlib

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
            chat=self._chat(tokenizer),
        )
        if texts and self.kind.name != "causal":
            raise ConfigError("`texts` need a causal language model.")
        if config.scoring == "generated" and self.kind.name == "classifier":
            raise ConfigError('A classifier writes nothing: `scoring` is "offered" or "union".')
        n = range(len(tasks))
        self.stages = [list(n)] if strategy.joint else [[j] for j in n]
        self.settings = self._settings(prompt)
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
        self._test: dict[int, tuple[list[Row], list[Example]]] = {}

    def _chat(self, tokenizer: Any) -> bool:
        if self.config.chat is not None:
            return self.config.chat
        model = self.fresh.first
        writes = not model.config.is_encoder_decoder and not hasattr(model, "num_labels")
        causal = writes or type(model).__name__.endswith("ForCausalLM")
        return causal and bool(getattr(tokenizer, "chat_template", None))

    def _settings(self, prompt: PromptForm) -> dict[str, Any]:
        """Return all that decides the result, as JSON."""
        found = {
            "strategy": {"name": self.strategy.name, **asdict(self.strategy)},
            "config": asdict(self.config),
            "prompt": asdict(prompt),
            "tasks": [
                {"name": t.name, "data": t.fingerprint(), "settings": asdict(t.settings)}
                for t in self.tasks
            ],
            "model": self.fresh.hash,
            "kind": self.kind.name,
            "texts": hashlib.sha256("\0".join(self.texts).encode()).hexdigest()[:16],
        }
        return json.loads(json.dumps(plain(found)))

    def run(self) -> StreamResult:
        """Do what is not done yet."""
        with self._bar() as bar:
            scores = [self._untouched()]
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
        self.strategy.after(model, stage, self.weights.saved[index])
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
        done = self._measure(model, index, scores)
        done["seconds"] = {
            "training": round(trained_s, 3),
            "all": round(time.perf_counter() - started, 3),
        }
        write_json(path / "done.json", done)
        self.weights.drop(index - 1)
        return done

    def _train_stage(self, index: int, stage: Stage, bar: Any) -> Any:
        """Return the trained model, saved."""
        set_seed(stage.seed)
        model, stack = self.weights.start(index)
        work = self._stage_folder(index) / "checkpoints"
        checkpoint = last_checkpoint(work, remove=True) if work.exists() else None
        self.strategy.before(model, stage)
        rows = self.strategy.training_rows(stage)
        arguments = self._arguments(index, work)
        common: dict[str, Any] = {"train_dataset": rows, "data_collator": self.kind.collate}
        if self.strategy.weights == "all":
            trainer: Any = _TaskTrainer(model, TrainingArguments(**arguments), **common)
        else:
            trainer = _AdapterTrainer(
                model,
                OLoraConfig(**arguments),
                stack=stack,
                regularisers=self.strategy.regularisers(stage),
                **common,
            )
        trainer.kind = self.kind
        if self.kind.name != "causal":
            trainer.model_accepts_loss_kwargs = False
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        names = "+".join(self.tasks[j].name for j in self.stages[index])
        trainer.add_callback(Log(self.folder / "log.jsonl", index, names, bar, checkpoint))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.weights.save(model, index)
        return model

    def _arguments(self, index: int, work: Path) -> dict[str, Any]:
        config, own = self.config, self._task_settings(index)
        return {
            "output_dir": str(work),
            "max_steps": self._steps(index),
            "per_device_train_batch_size": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation,
            "learning_rate": own.learning_rate or config.learning_rate,
            "lr_scheduler_type": config.scheduler,
            "warmup_steps": config.warmup_steps,
            "weight_decay": config.weight_decay,
            "max_grad_norm": config.max_grad_norm,
            "bf16": config.bf16,
            "use_cpu": self.fresh.device.type == "cpu",
            "dataloader_pin_memory": self.fresh.device.type != "cpu",
            "seed": self._seed(index),
            "save_strategy": "steps",
            # A logged mean goes over the steps since the last row: none is cut by a checkpoint.
            "save_steps": -(-config.save_steps // config.logging_steps) * config.logging_steps,
            "save_total_limit": 1,
            "logging_steps": config.logging_steps,
            "remove_unused_columns": False,
            "report_to": "none",
            "disable_tqdm": True,
        }

    # -- rows

    def _view(self, index: int) -> Stage:
        """Return what the strategy may see of a stage."""
        own = [row for j in self.stages[index] for row in self._train_rows(j)]
        replays = self.strategy.name == "replay"
        earlier = [self._train_rows(self.stages[i][0]) for i in range(index if replays else 0)]
        folders = self.weights.saved[:index]
        return Stage(
            index, len(self.stages), own, earlier, folders, self.kind, self._task_settings(index),
            self.config.batch_size, self._seed(index),
        )  # fmt: skip

    def _train_rows(self, j: int) -> list[Row]:
        if j not in self._train:
            self._train[j] = self.kind.encode(self.tasks[j], self._drawn(j))
        return self._train[j]

    def _drawn(self, j: int) -> list[Example]:
        task = self.tasks[j]
        limit = task.settings.limit or self.config.limit
        return draw(task.train, limit, self.config.seed, f"train {task.name}")

    def _test_rows(self, j: int) -> tuple[list[Row], list[Example]]:
        if j not in self._test:
            task, config = self.tasks[j], self.config
            rows = getattr(task, config.evaluate_on)
            examples = draw(rows, config.evaluate_limit, 0, f"{config.evaluate_on} {task.name}")
            self._test[j] = self.kind.encode(task, examples), examples
        return self._test[j]

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

    def _seed(self, index: int) -> int:
        return 1000 * self.config.seed + index + 1

    def _stage_folder(self, index: int) -> Path:
        places = self.stages[index]
        name = self.tasks[places[0]].name if len(places) == 1 else "all"
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        return self.folder / "stages" / f"{index + 1:02d}-{safe}"

    # -- scores

    def _untouched(self) -> dict[str, Any]:
        path = self.folder / "stages" / "untouched.json"
        if not path.exists():
            model = self.fresh().eval()
            scores = {j: self._score(model, j) for j in range(len(self.tasks))}
            write_json(path, {"scores": self._table(scores), **self._text(model)})
        return read_json(path)

    def _measure(self, model: Any, index: int, scores: list[Any]) -> dict[str, Any]:
        """Return the scores of every task by every way of scoring."""
        n = len(self.tasks)
        last = max(self.stages[index])
        if self.strategy.weights != "apart":
            places = range(n if self.config.evaluate == "all" else last + 1)
            table = self._table({j: self._score(model, j) for j in places})
        else:
            # Each task has a model of its own: the others' scores are known.
            table = copy.deepcopy(scores[-1]["scores"])
            for view, value in self._score(model, index).items():
                table[view][index] = value
        return {"scores": table, **self._text(model)}

    def _score(self, model: Any, j: int) -> dict[str, float]:
        rows, examples = self._test_rows(j)
        with self._autocast(model):
            answers = self.kind.predict(
                model, self.tasks[j], rows, self.config.scoring, self.config.evaluate_batch_size
            )
        return {view: accuracy_of(found, examples) for view, found in answers.items()}

    def _table(self, scores: dict[int, dict[str, float]]) -> dict[str, list[float | None]]:
        views = next(iter(scores.values()))
        n = range(len(self.tasks))
        return {view: [scores[j][view] if j in scores else None for j in n] for view in views}

    def _text(self, model: Any) -> dict[str, float]:
        if not self.texts:
            return {}
        with self._autocast(model):
            length = self.config.max_length
            return {"text_loss": text_loss(model, self.fresh.tokenizer, self.texts, length)}

    def _autocast(self, model: Any) -> Any:
        return torch.autocast(model.device.type, torch.bfloat16, enabled=self.config.bf16)

    # -- what is written

    def _result(self, scores: list[Any]) -> StreamResult:
        views = {}
        for view in scores[0]["scores"]:
            rows = [[np.nan if v is None else v for v in s["scores"][view]] for s in scores]
            missing = len(self.stages) + 1 - len(rows)
            rows += [[np.nan] * len(self.tasks)] * missing
            views[view] = {"untouched": np.array(rows[0]), "R": np.array(rows[1:])}
        main = views[self.config.scoring]
        done = len(scores) - 1
        part, before = main["R"], main["untouched"]
        if done < len(self.stages):
            part, before = trained(part), before[:done]
        folders = self.weights.saved[:done]
        kept = {"stack": folders, "one": folders[-1:], "all": [], "apart": []}
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
        config = self.config
        about = {"seed": config.seed, "scoring": config.scoring, "evaluate_on": config.evaluate_on}
        write_result(result, about, final=final, figures=self.figures)

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Any]:
        from tqdm import tqdm

        total = sum(self._steps(i) for i in range(len(self.stages)))
        with tqdm(total=total, unit="step", disable=not self.progress) as bar:
            yield bar


@contextlib.contextmanager
def _fast_collection() -> Iterator[None]:
    """Keep what is there out of the garbage collection that each trainer ends with."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Hold back transformers' own bars over the files that it writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_tasks(tasks: Sequence[Task], config: StreamConfig) -> None:
    if not tasks:
        raise ConfigError("There are no tasks to train.")
    names = [task.name for task in tasks]
    if double := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f'Two tasks are called "{double[0]}". Give each a name of its own.')
    for task in tasks:
        if not getattr(task, config.evaluate_on):
            raise DataError(f'Task "{task.name}" has no {config.evaluate_on} rows to measure.')
