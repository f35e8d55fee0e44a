"""`trueline stack`: tasks one after the other, each on top of those before, nothing forgotten."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from trueline.cli.setting_options import (
    Row,
    add_run_options,
    add_settings,
    need_packages,
    print_settings,
    read_layers,
    running,
    say_broken,
)
from trueline.errors import ConfigError

if TYPE_CHECKING:
    from trueline.jobs.stacking import StackResults

EXAMPLES = """examples:
  trueline stack --tasks stream.toml --output stacked
  trueline stack --tasks stream.toml --output stacked --resume
  trueline stack --tasks stream.toml --output drift --keep drift --set strength=100
  trueline stack --tasks stream.toml --model DIR --output t5 --set scoring=generated
  trueline stack --keep drift --list-settings
  trueline export --adapters stacked --to one

stream.toml names the tasks; each can have a lambda_1, lambda_2, rank, learning_rate, epochs, limit,
an instruction and labels of its own:

  data = "cl_benchmark"                # a folder a task: train.jsonl, test.jsonl, labels.json
  order = ["agnews", "moods", "mine"]  # or a preset, "order-1" to "order-6"
  [tasks.agnews]
  lambda_1 = 0.1
  [tasks.moods]                        # a Hugging Face data set: a local folder or a hub name
  dataset = "dair-ai/emotion"
  text = "text"
  [tasks.mine]                         # JSONL rows {"prompt": ..., "answer": ...}
  train = "train.jsonl"
  test = "test.jsonl"
  instruction = "Which colour?"

docs/streams.md has the whole format. After each task every task is measured. The folder of a run
holds R.json, R.csv, R.png and time.png (the scores), log.jsonl, config.toml, which makes the same
run again, README.md, a model card, and stages/ with the adapters. Every setting can stand in a TOML
file (--config) or behind --set NAME=VALUE; the command line goes before the file. --resume goes on
where a killed run stopped.
"""


OPTIONS: dict[str, tuple[Row, ...]] = {
    "what is trained": (
        ("--tasks", "tasks", "FILE", "TOML file of the stream"),
        ("--data", "data", "DIR", "folder of the tasks' data, instead of the file's"),
        ("--model", "model", "NAME", 'folder, hub name, or "tiny", bundled (default)'),
        ("--keep", "keep", "WAY", "how earlier tasks are kept: o-lora (default), inf-lora, drift, "
         "ella, replay, none"),
        ("--trust-remote-code", "trust_remote_code", True, "run code that comes with the model"),
    ),
    "training, for tasks that say nothing else": (
        ("--lambda-1", "lambda_1", float, "o-lora: strength of the orthogonality penalty (0.5)"),
        ("--lambda-2", "lambda_2", float, "o-lora: strength of the norm penalty (0)"),
        ("--rank", "rank", int, "rank of each task's LoRA (8)"),
        ("--learning-rate", "learning_rate", float, "constant, of AdamW (1e-3)"),
        ("--epochs", "epochs", float, "passes over a task's rows (1)"),
        ("--batch-size", "batch_size", int, "rows a step (32)"),
        ("--limit", "limit", int, "at most N training rows of a task"),
        ("--evaluate-limit", "evaluate_limit", int, "at most N rows of a task are measured"),
        ("--save-steps", "save_steps", int, "steps between checkpoints (100)"),
        ("--target-modules", "target_modules", ["NAME"], "modules that get a LoRA (query and "
         "value)"),
    ),
}  # fmt: skip
"""The options that most streams need; each is a setting."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    for title, rows in OPTIONS.items():
        add_settings(parser.add_argument_group(title), rows)
    add_run_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check the settings, train the stream, and say what it gave."""
    need_packages(("peft", "datasets"))
    from trueline.jobs.stacking import StackConfig, stack

    layers = read_layers(args)
    if args.list_settings:
        print_settings(StackConfig.explained(layers))
        return
    config = StackConfig.layered(layers)
    if args.output is None:
        raise ConfigError("`--output DIR` is missing: the folder for the adapters.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("A stream is trained by one process. Start it without a launcher.")
    with running(args) as call:
        results = stack(config, args.output, **call)
    say_broken(results)
    show(args, results)


def show(args: argparse.Namespace, results: StackResults) -> None:
    """Print the scores after each task, the measures, and how to export."""
    if args.json:
        shown = {"folder": str(results.folder), **results.as_dict()}
        print(json.dumps(shown, ensure_ascii=False))
        return
    width = max(map(len, (*results.tasks, "untouched"))) + 2
    print(" " * width + "".join(f"{name:>{width}}" for name in results.tasks))
    for name, row in results.rows():
        print(f"{name:<{width}}" + "".join(f"{value:>{width}.3f}" for value in row))
    print()
    for name, value in results.measures.items():
        print(f"{name:<24} {value:.4g}")
    print(f"\n{results.folder}")
    print(f"one plain LoRA: trueline export --adapters {results.folder} --to DIR")
