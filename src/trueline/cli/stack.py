"""`trueline stack`: tasks one after the other, each on top of those before, nothing forgotten."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.cli.folders import command
from trueline.cli.setting_options import add_run_options, add_setting, need_packages, read_layers
from trueline.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from trueline.jobs.stacking import StackConfig, StackResults

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that most streams need; each is a setting."""
    group = parser.add_argument_group("what is trained")
    add_setting(group, "--tasks", "tasks", metavar="FILE", help="TOML file of the stream")
    add_setting(group, "--data", "data", metavar="DIR", help="folder of the tasks' data, instead "
                "of the file's")  # fmt: skip
    add_setting(group, "--model", "model", help='folder, hub name, or "tiny", bundled (default)')
    add_setting(group, "--keep", "keep", metavar="WAY", help="how earlier tasks are kept: o-lora "
                "(default), inf-lora, drift, ella, replay, none")  # fmt: skip
    add_setting(group, "--trust-remote-code", "trust_remote_code", action="store_true",
                help="run code that comes with the model")  # fmt: skip
    group = parser.add_argument_group("training, for tasks that say nothing else")
    for flag, setting, kind, text in (
        ("--lambda-1", "lambda_1", float, "o-lora: strength of the orthogonality penalty (0.5)"),
        ("--lambda-2", "lambda_2", float, "o-lora: strength of the norm penalty (0)"),
        ("--rank", "rank", int, "rank of each task's LoRA (8)"),
        ("--learning-rate", "learning_rate", float, "constant, of AdamW (1e-3)"),
        ("--epochs", "epochs", float, "passes over a task's rows (1)"),
        ("--batch-size", "batch_size", int, "rows a step (32)"),
        ("--limit", "limit", int, "at most N training rows of a task"),
        ("--evaluate-limit", "evaluate_limit", int, "at most N rows of a task are measured"),
        ("--save-steps", "save_steps", int, "steps between checkpoints (100)"),
    ):
        letter = "X" if kind is float else "N"
        add_setting(group, flag, setting, type=kind, metavar=letter, help=text)
    add_setting(group, "--target-modules", "target_modules", nargs="+", metavar="NAME",
                help="modules that get a LoRA (query and value)")  # fmt: skip
    add_run_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check the settings, train the stream, and say what it gave."""
    need_packages(("peft", "datasets"))
    from trueline.cli.bars import bar
    from trueline.jobs.stacking import StackConfig, stack
    from trueline.settings.reader import explain
    from trueline.train.keep import KEEP

    layers = read_layers(args)
    given = {name: value for values, _ in layers for name, value in values.items()}
    way = str(given.get("keep", StackConfig.keep))
    if way not in KEEP:
        raise ConfigError(f'Unknown way to keep "{way}".{suggestion(way, KEEP)}')
    if args.list_settings:
        for setting, default, text in explain([StackConfig, KEEP[way]]):
            if setting != "options":
                print(f"{setting} = {default}\n    {text}")
        return
    config = config_of(layers, KEEP[way])
    if args.output is None:
        raise ConfigError("`--output DIR` is missing: the folder for the adapters.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("A stream is trained by one process. Start it without a launcher.")
    folder = Path(args.output)
    try:
        with bar("step") as progress:
            results = stack(
                config, folder, resume=args.resume, overwrite=args.overwrite,
                command=command(args), progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        if (folder / "manifest.json").exists():
            print(f"--resume goes on where {folder} stopped", file=sys.stderr)
        raise
    for name in results.broken:
        print(f"{folder}: {name} is broken; went on from before it.", file=sys.stderr)
    show(args, results)


def config_of(layers: list[tuple[dict[str, Any], str]], way: type) -> StackConfig:
    """Return the job's settings; those of the way to keep become its options."""
    from trueline.jobs.stacking import StackConfig
    from trueline.settings.reader import build, check, merge

    values = merge(*(check(given, [StackConfig, way], source) for given, source in layers))
    own = {f.name: values[f.name] for f in fields(way) if f.name in values}
    return build(StackConfig, {**values, "options": own})


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
