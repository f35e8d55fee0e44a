"""O-LoRA in the paper's form on SmolLM2: the prompt offers labels, the answer is generated.

Six tasks of CL_Benchmark in three orders by every strategy. Beside the scores: what the model keeps
that no task asks for, before and after: left-out tasks zero-shot, cross-entropy on other text, and
the principles that it follows when prompted. `continual.py` is the tuned comparison on an encoder;
here learning rates and strengths are the ones below, not tuned.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks._real_questions import BY_NAME, block_items
from benchmarks._real_world import Task, World, markdown
from trueline import LanguageModel, Plain, Request, SamplingParams, generate, load_model
from trueline.continual.strategies import make_strategy
from trueline.continual.stream import StreamConfig, run_stream
from trueline.evals.statistics import rate
from trueline.train.adapters.stack import AdapterStack
from trueline.train.tasks.fresh import model_factory
from trueline.train.tasks.stream_files import preset
from trueline.train.tasks.task import PromptForm, same_label

TASKS = ("MNLI", "QQP", "SST-2", "yelp", "dbpedia", "agnews")
ORDERS = {
    "1": TASKS,
    "2": ("dbpedia", "agnews", "yelp", "SST-2", "MNLI", "QQP"),
    "3": ("yelp", "SST-2", "MNLI", "QQP", "dbpedia", "agnews"),
}
LEFT_OUT = ("BoolQA", "COPA", "RTE", "IMDB")
STRATEGIES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "o-lora": ("o-lora", 5e-4, {"lambda_1": 0.5, "normalize": False}),
    "inc-lora": ("inc-lora", 5e-4, {}),
    "drift": ("drift", 1e-3, {"strength": 30.0}),
    "seq-lora": ("seq-lora", 5e-4, {}),
    "replay": ("replay", 5e-4, {}),
    "multi-task": ("multi-task", 5e-4, {}),
    "o-lora, normalised": ("o-lora", 5e-4, {"lambda_1": 0.5, "normalize": True}),
    "inf-lora": ("inf-lora", 1e-3, {"threshold": 0.9, "threshold_end": 0.95}),
    "ella": ("ella", 5e-4, {"strength": 1e5, "normalize": False}),
}
"""Name -> strategy, learning rate, options; "o-lora" has the released sums. Most wanted first."""
ROWS, TEST_ROWS, SEEDS = 320, 50, (0, 1, 2)
FORM = PromptForm(instruction=True, options=True)


def tasks(world: World, models: Sequence[str]) -> Iterator[Task]:
    """Yield a cell for every order, seed and strategy, on the first model."""
    if not (world.shared / "data/cl_benchmark").is_dir():
        return
    for s, seed in enumerate(SEEDS[: 1 if world.quick else None]):
        for o, order in enumerate(list(ORDERS)[: 1 if world.quick else None]):
            for i, name in enumerate(list(STRATEGIES)[: 1 if world.quick else None]):
                file = f"{models[0]}-{name.replace(', ', '-')}-{order}-{seed}"
                yield Task(
                    30 - 3 * s - o - i / 20,
                    f"o-lora, {file}",
                    partial(_is_there, world, file),
                    partial(world.kept, "o-lora", file,
                            make=partial(cell, world, models[0], name, order, seed)),
                )  # fmt: skip


def _is_there(world: World, file: str) -> bool:
    return world.kept("o-lora", file) is not None


def cell(world: World, model: str, name: str, order: str, seed: int) -> dict[str, Any]:
    """Train one strategy on one order; an unfinished run in its folder goes on."""
    strategy, lr, options = STRATEGIES[name]
    stream = preset(list(ORDERS[order][: 2 if world.quick else None]), _data(world))
    folder = world.output / "o-lora" / f"run-{model}-{name.replace(', ', '-')}-{order}-{seed}"
    started = time.process_time()
    result = run_stream(
        stream,
        model_factory(str(world.path(model)), stream),
        make_strategy(strategy, **options),
        output=folder,
        config=StreamConfig(
            learning_rate=lr, dropout=0.0, warmup_steps=10, batch_size=16, max_length=256,
            limit=16 if world.quick else ROWS, evaluate_limit=4 if world.quick else TEST_ROWS,
            scoring="generated", bf16=True, seed=seed, logging_steps=1000, save_steps=10_000,
        ),
        prompt=FORM, texts=_texts(world), figures=False,
    )  # fmt: skip
    row = {
        "model": model, "strategy": name, "learning_rate": lr, "options": options, "order": order,
        "seed": seed, "R": np.round(result.R, 4).tolist(),
        "untouched": np.round(result.untouched, 4).tolist(), "measures": result.measures,
        "text_loss": result.text_loss, "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip
    lm = load_model(world.path(model), packed_weights=False)
    row["kept_before"] = kept(world, lm)
    AdapterStack.load(result.adapters).merge(lm.model)
    row["kept_after"] = kept(world, lm)
    shutil.rmtree(folder, ignore_errors=True)
    return row


def _data(world: World) -> Any:
    return world.shared / "data/cl_benchmark"


def _texts(world: World) -> list[str]:
    path = world.shared / "data/preference/psoups_principles.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:: 40 if world.quick else 12]
    return [json.loads(line)["output"] for line in lines]


def kept(world: World, lm: LanguageModel) -> dict[str, Any]:
    """Return the accuracy on left-out tasks, and adherence to prompted principles."""
    count = 4 if world.quick else 40
    right: list[bool] = []
    for task in preset(list(LEFT_OUT), _data(world)):
        rows = task.test[:count]
        chats = [FORM.text(task, row.sentence) for row in rows]
        done = generate(lm, chats, sampling=SamplingParams(max_new_tokens=8), batch_size=16)
        right += [same_label(c.text, row.label) for c, row in zip(done, rows, strict=True)]
    items = block_items(0)[: 4 if world.quick else None]
    requests = [Request(i.chat, Plain(principle=i.principle)) for i in items]
    answers = generate(lm, requests, sampling=SamplingParams(max_new_tokens=48), batch_size=64)
    follows = [BY_NAME[i.group].follows(c.text, ended=c.finish_reason == "stop")
               for i, c in zip(items, answers, strict=True)]  # fmt: skip
    return {"left_out": vars(rate(right)), "principles": vars(rate(follows))}


def report(world: World, models: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """Return the table of strategies, means over orders and seeds, and the cells behind it."""
    paths = sorted((world.output / "o-lora").glob("*.json"))
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    lines = []
    for name in STRATEGIES:
        own = [c for c in cells if c["strategy"] == name]
        if own:
            lines.append([name, len(own), *(_mean(own, *path) for path in COLUMNS.values())])
    header = ("strategy", "runs", *COLUMNS)
    return (markdown(header, lines) if lines else ""), cells


COLUMNS: dict[str, tuple[Any, ...]] = {
    "average": ("measures", "average_accuracy"),
    "backward transfer": ("measures", "backward_transfer"),
    "learning": ("measures", "learning_accuracy"),
    "left out, before": ("kept_before", "left_out", "value"),
    "left out, after": ("kept_after", "left_out", "value"),
    "principles, before": ("kept_before", "principles", "value"),
    "principles, after": ("kept_after", "principles", "value"),
    "text loss, before": ("text_loss", 0),
    "text loss, after": ("text_loss", -1),
    "CPU s": ("cpu_seconds",),
}


def _mean(cells: Sequence[Any], *path: Any) -> str:
    """Return the mean of a number of each cell, with its standard error where there are several."""
    values = []
    for value in cells:
        for step in path:
            value = value[step]
        values.append(value)
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
    return f"{np.mean(values):.3f}" + ("" if error is None else f" ± {error:.3f}")
