"""`trueline distil`: a decoding method's policy into an adapter or the weights."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trueline.cli.setting_options import add_run_options, add_setting, need_packages, read_layers
from trueline.errors import ConfigError
from trueline.train.teaching_rows import read_rows

EXAMPLES = """examples:
  trueline distil --principle "Talk like a pirate." --prompts prompts.jsonl --output pirate
  trueline distil --principle "Be formal." --prompts others.jsonl --after pirate --output both
  trueline distil --config pirate/config.toml --output again --steps 200 --set floor=0.01
  trueline distil --teacher self-cd --alpha 2.5 --prompts requests.jsonl --output frank
  trueline distil --model DIR --full --dtype bfloat16 --prompts p.jsonl --output out ...
  trueline generate "What is the moon?" --adapter pirate

Every setting can stand in a TOML file (--config) or behind --set NAME=VALUE; --list-settings shows
them all. The command line goes before the file. The folder of a run keeps config.toml, which makes
the same run again, manifest.json, results.json, log.jsonl, curves.png, README.md and the weights,
which load in transformers and PEFT with no Trueline. --resume goes on where a killed run stopped.
"""
NEEDED = ("peft", "datasets", "accelerate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that most runs need; each is a setting."""
    group = parser.add_argument_group("what is trained")
    add_setting(group, "--model", "model", help='folder, hub name, or "tiny", bundled (default)')
    add_setting(group, "--prompts", "prompts", metavar="FILE", help='JSONL; a row has "prompt" '
                'or "messages", and may have "system" and a "principle" of its own, "" for a row '
                "on which the model is to stay as it is")  # fmt: skip
    add_setting(group, "--limit", "limit", type=int, metavar="N", help="at most N rows")
    add_setting(group, "--rank", "lora.rank", type=int, metavar="N", help="rank of the LoRA (16)")
    add_setting(group, "--target-modules", "lora.target_modules", nargs="+", metavar="NAME",
                help="modules that get a LoRA (all linear ones)")  # fmt: skip
    add_setting(group, "--full", "full", action="store_true", help="train all weights, no LoRA")
    add_setting(group, "--merge", "merge", action="store_true", help="write the merged model")
    add_setting(group, "--dtype", "dtype", help="auto (default), float32, bfloat16, float16")
    add_setting(group, "--device", "device", help="auto (default), cpu, cuda, mps")
    add_setting(group, "--trust-remote-code", "trust_remote_code", action="store_true",
                help="run code that comes with the model")  # fmt: skip
    add_setting(group, "--quantize", "quantize", choices=("4bit", "8bit"),
                help="needs bitsandbytes")  # fmt: skip
    add_setting(group, "--raw", "raw", action="store_true", help="no chat template: base models")
    add_setting(group, "--no-default-system", "default_system", action="store_false",
                help="an empty system message where a chat has none, instead of the template's own "
                "text")  # fmt: skip

    group = parser.add_argument_group("on top of earlier adapters")
    add_setting(group, "--after", "after", metavar="DIR", help="adapters that are there already, "
                "as an earlier distillation leaves them; the result holds all of them")  # fmt: skip
    add_setting(group, "--keep", "keep", metavar="WAY", help="how the new one is held out of their "
                "way, and later ones out of its: o-lora (default with --after), ella, inf-lora, "
                "drift, replay, none")  # fmt: skip

    group = parser.add_argument_group("the policy to learn")
    add_setting(group, "--principle", "principle", metavar="TEXT", help="what to follow, for rows "
                "that name none")  # fmt: skip
    add_setting(group, "--teacher", "teacher", metavar="NAME", help="linear-alignment (default), "
                "principle (its prompt alone), checkpoints, or a decoding method")  # fmt: skip
    add_setting(group, "--ratio", "ratio", type=float, metavar="X", help="the teacher's ratio")
    add_setting(
        group, "--candidates", "candidates", type=float, metavar="X", help="its candidates mask"
    )
    add_setting(group, "--gate", "teacher_options.gate", type=float, metavar="X",
                help="confidence of the prompt above which it teaches alone (1)")  # fmt: skip
    add_setting(group, "--damping", "teacher_options.damping", type=float, metavar="X",
                help="soft gate: power of 1 - confidence in the ratio (0, none)")  # fmt: skip
    add_setting(group, "--alpha", "teacher_options.alpha", type=float, metavar="X",
                help="alpha of --teacher self-cd")  # fmt: skip
    add_setting(group, "--tuned", "teacher_options.tuned", metavar="DIR",
                help="the tuned model of --teacher checkpoints")  # fmt: skip
    add_setting(group, "--loss", "loss", metavar="NAME", help="imitation (the paper's), advantage "
                "or kl (the whole vocabulary)")  # fmt: skip

    group = parser.add_argument_group("training")
    for flag, setting, kind, text in (
        ("--steps", "max_steps", int, "updates; without it --epochs counts"),
        ("--epochs", "num_train_epochs", float, "passes over the prompts (3)"),
        ("--batch-size", "per_device_train_batch_size", int, "prompts an update (16)"),
        ("--learning-rate", "learning_rate", float, "default by the model's size, see the docs"),
        ("--max-new-tokens", "max_completion_length", int, "tokens of a sampled response"),
        ("--guided", "guided", float, "share of responses that the teacher draws (0.25)"),
        ("--reuse", "reuse", int, "updates made with each batch of samples (1)"),
        ("--kl-budget", "kl_budget", float, "stop beyond this KL to the start, nats a token"),
        ("--save-steps", "save_steps", int, "updates between checkpoints (50)"),
    ):
        letter = "X" if kind is float else "N"
        add_setting(group, flag, setting, type=kind, metavar=letter, help=text)
    add_setting(group, "--report-to", "report_to", nargs="+", metavar="NAME",
                help="wandb, tensorboard, trackio ... (none)")  # fmt: skip

    group = parser.add_argument_group("evaluation while training")
    add_setting(group, "--evaluate", "evaluate", metavar="FILE", help="held-out prompts; rows with "
                'a "pattern" say what a response that follows matches')  # fmt: skip
    add_setting(group, "--eval-steps", "eval_steps", type=float, metavar="N",
                help="updates between evaluations (only before and after)")  # fmt: skip
    add_setting(group, "--judge", "judge", metavar="NAME", help="instead of patterns: keywords "
                "(refusals; rows with \"safe\": false should be), local, model")  # fmt: skip
    add_setting(group, "--judge-model", "judge_model", metavar="NAME", help="a model as the judge")
    add_setting(group, "--judge-url", "judge_url", metavar="URL", help="endpoint of --judge model")
    add_run_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check settings and data, train, and say what the run found."""
    need_packages(NEEDED)
    if args.list_settings:
        list_settings()
        return
    layers = early_checks(args)
    from trueline.cli.bars import bar
    from trueline.cli.folders import command
    from trueline.jobs.distillation import DistilConfig, distil

    config = DistilConfig.of(**settings_of(layers))
    try:
        with bar("step") as progress:
            results = distil(
                config,
                args.output,
                progress=progress,
                resume=args.resume,
                overwrite=args.overwrite,
                command=command(args),
            )
    except KeyboardInterrupt:
        if any(Path(args.output, "checkpoints").glob("checkpoint-*")):
            print(f"--resume goes on from the last checkpoint in {args.output}", file=sys.stderr)
        raise
    for name in results.broken:
        print(f"{args.output}: {name} is broken; went on from before it.", file=sys.stderr)
    if args.json:
        print(json.dumps(results.as_dict(), ensure_ascii=False))
        return
    from trueline.records.style import brief

    for name, value in results.numbers.items():
        print(f"{name:<52} {brief(value)}")
    print(f"\n{results.folder}")
    if results.note:
        print(results.note)


def early_checks(args: argparse.Namespace) -> list[tuple[dict[str, Any], str]]:
    """Return the settings and where they were said; refuse what needs nothing heavy to be seen."""
    if args.output is None:
        raise ConfigError("`--output DIR` is missing: the folder for the trained weights.")
    if args.resume and args.overwrite:
        raise ConfigError("Give --resume or --overwrite, not both.")
    layers = read_layers(args)
    found = {name: value for values, _ in layers for name, value in values.items()}
    read_rows(found.get("prompts"), found.get("limit"))
    return layers


def settings_of(layers: list[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    """Return the settings of the file, of --set and of the options, the later winning."""
    from trueline.jobs.distillation import DistilConfig
    from trueline.settings.reader import check, merge
    from trueline.train.distil.config import InverseQConfig

    classes = [DistilConfig, InverseQConfig]
    return merge(*(check(given, classes, source) for given, source in layers))


def list_settings() -> None:
    """Print every setting with its default and what it is."""
    from trueline.jobs.distillation import DistilConfig
    from trueline.settings.reader import explain
    from trueline.train.base import FIXED
    from trueline.train.distil.config import InverseQConfig

    for name, default, text in explain([DistilConfig, InverseQConfig]):
        if name not in ("output_dir", "training"):
            print(f"{name} = {FIXED.get(name, default)}\n    {text}")
