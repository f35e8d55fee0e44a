"""The continual-learning benchmark: a stream of tasks trained by any of the strategies.

    tasks = preset("order-1", "../shared/data/cl_benchmark", leave_out=["yahoo"])
    factory = model_factory("tiny", tasks)
    results = run_stream(tasks, factory, "ewc", output="runs/ewc")
    results.R, results.measures["average_accuracy"]

The folder is that of `trueline.jobs.stacking`, and as safe against a kill.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trueline.continual.strategies import Strategy, make_strategy
from trueline.jobs.stacking import StackResults, open_run, run_stages
from trueline.train.tasks.fresh import Factory
from trueline.train.tasks.stages import TaskStages
from trueline.train.tasks.stream_config import StreamConfig
from trueline.train.tasks.task import PromptForm, Task
from trueline.train.tasks.task_trainer import calm


def run_stream(
    tasks: Sequence[Task],
    factory: Factory,
    strategy: str | Strategy = "o-lora",
    *,
    output: str | Path,
    config: StreamConfig | None = None,
    prompt: PromptForm | None = None,
    texts: Sequence[str] = (),
    overwrite: bool = False,
    **options: Any,
) -> StackResults:
    """Train the tasks in their order by a strategy, and measure all of them after each.

    Args:
        tasks: From `trueline.train.tasks.stream_files`, or made in Python.
        factory: Returns a fresh (model, tokenizer), the same at every call. Weights that it freezes
            stay frozen. A classifier has an output for each label of `union_of_labels(tasks)`.
        strategy: A name of `STRATEGIES`, or one made by `make_strategy` with options.
        output: Folder of the run; an unfinished run in it goes on, a finished one is read.
        config: What all tasks share.
        prompt: Which lines the model is shown.
        texts: Unrelated texts on which the cross-entropy of a causal model is measured.
        overwrite: Remove what a run left in the folder.
        options: Of `run_stages`.

    Raises:
        ConfigError: An option is out of range, or the folder is another run's.
        DataError: A task has no rows to measure.
        ModelError: The model does not fit the tasks.
    """
    if isinstance(strategy, str):
        strategy = make_strategy(strategy)
    with calm():
        stages = TaskStages(
            tasks, factory, strategy.keep, config,
            prompt=prompt, texts=texts, weights=strategy.weights,
        )  # fmt: skip
        with contextlib.closing(
            open_run(stages, strategy.name, output, overwrite=overwrite)
        ) as run:
            results = run_stages(stages, strategy.name, run, **options)
            if not run.finished:
                run.finish(results.as_dict())
    return results
