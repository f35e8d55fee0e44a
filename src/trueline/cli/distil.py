"""`trueline distil`: a decoding method's policy into an adapter or the weights."""

from __future__ import annotations

import argparse
import json

from trueline.cli.setting_options import (
    Layer,
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
from trueline.records.style import brief
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


OPTIONS: dict[str, tuple[Row, ...]] = {
    "what is trained": (
        ("--model", "model", "NAME", 'folder, hub name, or "tiny", bundled (default)'),
        ("--prompts", "prompts", "FILE", 'JSONL; a row has "prompt" or "messages", and may have '
         '"system" and a "principle" of its own, "" for a row on which the model is to stay as it '
         "is"),
        ("--limit", "limit", int, "at most N rows"),
        ("--rank", "lora.rank", int, "rank of the LoRA (16)"),
        ("--target-modules", "lora.target_modules", ["NAME"], "modules that get a LoRA (all linear "
         "ones)"),
        ("--full", "full", True, "train all weights, no LoRA"),
        ("--merge", "merge", True, "write the merged model"),
        ("--dtype", "dtype", "NAME", "auto (default), float32, bfloat16, float16"),
        ("--device", "device", "NAME", "auto (default), cpu, cuda, mps"),
        ("--trust-remote-code", "trust_remote_code", True, "run code that comes with the model"),
        ("--quantize", "quantize", ("4bit", "8bit"), "needs bitsandbytes"),
        ("--raw", "raw", True, "no chat template: base models"),
        ("--no-default-system", "default_system", False, "an empty system message where a chat has "
         "none, instead of the template's own text"),
    ),
    "on top of earlier adapters": (
        ("--after", "after", "DIR", "adapters that are there already, as an earlier distillation "
         "leaves them; the result holds all of them"),
        ("--keep", "keep", "WAY", "how the new one is held out of their way, and later ones out of "
         "its: o-lora (default with --after), ella, inf-lora, drift, replay, none"),
    ),
    "the policy to learn": (
        ("--principle", "principle", "TEXT", "what to follow, for rows that name none"),
        ("--teacher", "teacher", "NAME", "linear-alignment (default), principle (its prompt "
         "alone), checkpoints, or a decoding method, one of your own as FILE.py:Class"),
        ("--ratio", "ratio", float, "the teacher's ratio"),
        ("--candidates", "candidates", float, "its candidates mask"),
        ("--gate", "teacher_options.gate", float, "confidence of the prompt above which it teaches "
         "alone (1)"),
        ("--damping", "teacher_options.damping", float, "soft gate: power of 1 - confidence in the "
         "ratio (0, none)"),
        ("--alpha", "teacher_options.alpha", float, "alpha of --teacher self-cd"),
        ("--tuned", "teacher_options.tuned", "DIR", "the tuned model of --teacher checkpoints"),
        ("--loss", "loss", "NAME", "imitation (the paper's), advantage or kl (the whole "
         "vocabulary)"),
    ),
    "training": (
        ("--steps", "max_steps", int, "updates; without it --epochs counts"),
        ("--epochs", "num_train_epochs", float, "passes over the prompts (3)"),
        ("--batch-size", "per_device_train_batch_size", int, "prompts an update (16)"),
        ("--learning-rate", "learning_rate", float, "default by the model's size, see the docs"),
        ("--max-new-tokens", "max_completion_length", int, "tokens of a sampled response"),
        ("--guided", "guided", float, "share of responses that the teacher draws (0.25)"),
        ("--reuse", "reuse", int, "updates made with each batch of samples (1)"),
        ("--kl-budget", "kl_budget", float, "stop beyond this KL to the start, nats a token"),
        ("--save-steps", "save_steps", int, "updates between checkpoints (50)"),
        ("--report-to", "report_to", ["NAME"], "wandb, tensorboard, trackio ... (none)"),
    ),
    "evaluation while training": (
        ("--evaluate", "evaluate", "FILE", 'held-out prompts; rows with a "pattern" say what a '
         "response that follows matches"),
        ("--eval-steps", "eval_steps", float, "updates between evaluations (only before and "
         "after)"),
        ("--judge", "judge", "NAME", 'instead of patterns: keywords (refusals; rows with "safe": '
         "false should be), local, model"),
        ("--judge-model", "judge_model", "NAME", "a model as the judge"),
        ("--judge-url", "judge_url", "URL", "endpoint of --judge model"),
    ),
}  # fmt: skip
"""The options that most runs need; each is a setting."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    for title, rows in OPTIONS.items():
        add_settings(parser.add_argument_group(title), rows)
    add_run_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check settings and data, train, and say what the run found."""
    need_packages(NEEDED)
    layers = [] if args.list_settings else early_checks(args)
    from trueline.jobs.distil_config import DistilConfig
    from trueline.jobs.distillation import distil

    if args.list_settings:
        print_settings(DistilConfig.explained())
        return
    config = DistilConfig.layered(layers)
    with running(args) as call:
        results = distil(config, args.output, **call)
    say_broken(results)
    if args.json:
        print(json.dumps(results.as_dict(), ensure_ascii=False))
        return
    for name, value in results.numbers.items():
        print(f"{name:<52} {brief(value)}")
    print(f"\n{results.folder}")
    if results.note:
        print(results.note)


def early_checks(args: argparse.Namespace) -> list[Layer]:
    """Return the settings and where they were said; refuse what needs nothing heavy to be seen."""
    if args.output is None:
        raise ConfigError("`--output DIR` is missing: the folder for the trained weights.")
    if args.resume and args.overwrite:
        raise ConfigError("Give --resume or --overwrite, not both.")
    layers = read_layers(args)
    found = {name: value for values, _ in layers for name, value in values.items()}
    read_rows(found.get("prompts"), found.get("limit"))
    return layers
