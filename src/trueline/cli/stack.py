"""`trueline train o-lora`: a stream of tasks, each in its own orthogonal low-rank subspace."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.cli.folders import command
from trueline.cli.setting_options import add_setting, read_layers
from trueline.errors import ConfigError, suggestion
from trueline.jobs.stack_cards import run_card
from trueline.records.disk import replace_file

if TYPE_CHECKING:
    from trueline.continual.stream import StreamResult

EXAMPLES = """examples:
  trueline train o-lora --tasks stream.toml --output stacked
  trueline train o-lora --tasks stream.toml --output stacked --resume
  trueline train o-lora --tasks stream.toml --model DIR --output t5 --set scoring=generated
  trueline train o-lora --tasks stream.toml --output compared --strategy replay --set buffer=64
  trueline train o-lora --strategy drift --list-settings
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
  [tasks.mine]                         # JSONL rows {"sentence": ..., "label": ...}
  train = "train.jsonl"
  test = "test.jsonl"
  instruction = "Which colour?"

After each task every task is measured. The folder of a run holds R.json, R.csv, R.png and time.png
(the scores), log.jsonl, config.toml, which makes the same run again, README.md, a model card, and
stages/ with the adapters. Every setting can stand in a TOML file (--config) or behind --set
NAME=VALUE; the command line goes before the file. --resume goes on where a killed run stopped.
"""


@dataclass
class StreamJob:
    """Which tasks are trained into which model, and how they are kept apart."""

    tasks: str | None = None
    """TOML file of the stream; see `trueline.continual.files`."""
    data: str | None = None
    """Folder of the tasks' data, instead of the file's `data`."""
    model: str = "tiny"
    """Folder or hub name of a causal, encoder-decoder or classification model, or "tiny"."""
    strategy: str = "o-lora"
    """o-lora, or one to compare with: inc-lora, seq-lora, replay ..."""
    threads: int | None = None
    """CPU threads; none is torch's choice, 1 for "tiny"."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that most streams need; each is a setting."""
    group = parser.add_argument_group("what is trained")
    add_setting(group, "--tasks", "tasks", metavar="FILE", help="TOML file of the stream")
    add_setting(group, "--data", "data", metavar="DIR", help="folder of the tasks' data, instead "
                "of the file's")  # fmt: skip
    add_setting(group, "--model", "model", help='folder, hub name, or "tiny", bundled (default)')
    add_setting(group, "--strategy", "strategy", help="o-lora (default), inc-lora, inf-lora, "
                "drift, ewc, replay, seq-lora, seq-ft, per-task, multi-task")  # fmt: skip
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


def run(args: argparse.Namespace) -> None:
    """Check settings and tasks, train the stream, and say what it gave."""
    from trueline.settings.reader import build, check, explain, merge, resolved, write_toml

    layers = read_layers(args)
    found: dict[str, Any] = {name: value for values, _ in layers for name, value in values.items()}
    if not args.list_settings:
        early_checks(args, found)
        from trueline.continual.files import read_stream

        stream = read_stream(found["tasks"], data=found.get("data"))
    from trueline.train.progress import quiet

    with quiet():
        from trueline.continual.strategies import STRATEGIES, make_strategy
        from trueline.continual.stream import StreamConfig, run_stream

    name = str(found.get("strategy", StreamJob.strategy))
    if name not in STRATEGIES:
        raise ConfigError(f'Unknown strategy "{name}".{suggestion(name, STRATEGIES)}')
    way = STRATEGIES[name][0]
    classes = [StreamJob, StreamConfig, way]
    if args.list_settings:
        for setting, default, text in explain(classes):
            print(f"{setting} = {default}\n    {text}")
        return
    values = merge(*(check(given, classes, source) for given, source in layers))
    job, config = build(StreamJob, values), build(StreamConfig, values)
    options = {k: v for k, v in values.items() if k in way.__dataclass_fields__}
    strategy = make_strategy(name, **options)
    set_threads(job)
    folder = Path(args.output)
    whole = write_toml(resolved(values, classes))
    before = {} if args.overwrite else summary_of(folder)
    try:
        result = run_stream(
            stream.tasks,
            job.model,
            strategy,
            output=folder,
            config=config,
            prompt=stream.prompt,
            overwrite=args.overwrite,
            progress=True,
            on_stage=lambda _: replace_file(folder / "config.toml", whole),
        )
    except KeyboardInterrupt:
        if (folder / "manifest.json").exists():
            print(f"--resume goes on where {folder} stopped", file=sys.stderr)
        raise
    # What a finished run says of itself stays as it was.
    if not before.get("finished") or not (folder / "README.md").exists():
        replace_file(
            folder / "README.md", run_card(command(args), stream, job.model, whole, result)
        )
    show_stream(args, result)


def early_checks(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Raise `ConfigError` for what needs no model and no data to be seen."""
    if args.output is None:
        raise ConfigError("`--output DIR` is missing: the folder for the adapters.")
    if not isinstance(found.get("tasks"), str):
        raise ConfigError("`--tasks FILE` is missing: a TOML file that names the tasks.")
    if args.resume and args.overwrite:
        raise ConfigError("Give --resume or --overwrite, not both.")
    if "report_to" in found:
        raise ConfigError("A stream writes its own log.jsonl; it has no `report_to`.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("A stream is trained by one process. Start it without a launcher.")
    folder = Path(args.output)
    if args.resume or args.overwrite or not (folder / "manifest.json").exists():
        return
    if not summary_of(folder).get("finished"):
        raise ConfigError(
            f'Folder "{folder}" holds an unfinished run. Give --resume to go on, or --overwrite '
            "to start again."
        )


def summary_of(folder: Path) -> dict[str, Any]:
    """Return what a stream wrote of its scores; empty before its first stage has ended."""
    try:
        found: dict[str, Any] = json.loads((folder / "R.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def set_threads(job: StreamJob) -> None:
    """Set the number of CPU threads."""
    import torch

    from trueline.errors import check_number
    from trueline.models.places import BUNDLED

    if job.threads is not None:
        check_number("threads", job.threads, low=1, whole=True)
        torch.set_num_threads(job.threads)
    elif job.model in BUNDLED:
        torch.set_num_threads(1)


def show_stream(args: argparse.Namespace, result: StreamResult) -> None:
    """Print the scores after each task, the measures, and how to export."""
    if args.json:
        shown = {"folder": str(result.folder), **summary_of(result.folder)}
        print(json.dumps(shown, ensure_ascii=False))
        return
    width = max(map(len, (*result.tasks, "untouched"))) + 2
    print(" " * width + "".join(f"{name:>{width}}" for name in result.tasks))
    names = result.tasks if len(result.R) == len(result.tasks) else ["all"] * len(result.R)
    for name, row in [("untouched", result.untouched), *zip(names, result.R, strict=True)]:
        print(f"{name:<{width}}" + "".join(f"{value:>{width}.3f}" for value in row))
    print()
    for name, value in result.measures.items():
        print(f"{name:<24} {value:.4g}")
    print(f"\n{result.folder}")
    if result.adapters:
        print(f"one plain LoRA: trueline export --adapters {result.folder} --to DIR")
