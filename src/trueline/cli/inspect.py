"""`trueline inspect`: what a method changed at every token, as a page, a figure and numbers."""

from __future__ import annotations

import argparse

from trueline.cli.bars import bar
from trueline.cli.options import (
    add_method_options,
    add_model_options,
    add_sampling_options,
    add_system_option,
    check_system,
    method_and_sampling,
    model_config,
)

EXAMPLES = """examples:
  trueline inspect "What is the moon?" --principle "Talk like a pirate." --ratio 2
  trueline inspect "How do I kill a Python process?" --method self-cd --output out/kill

Writes index.html (open it in a browser), trace.png and trace.jsonl (a token a line).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("question", metavar="QUESTION", help="what to ask")
    add_system_option(parser)
    add("--output", metavar="DIR", help="folder for the files (runs/inspect-HASH)")
    add("--overwrite", action="store_true", help="start again though the folder holds another run")
    add("--top", type=int, default=5, metavar="N", help="alternatives shown at every token (5)")
    add_model_options(parser)
    add_method_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Decode the question with a trace, and say what it shows and where."""
    from trueline.jobs.inspection import InspectConfig, inspect

    check_system(args.system)
    method, sampling = method_and_sampling(args)
    config = InspectConfig(
        args.question, model_config(args), method, sampling, args.system, args.seed, args.top
    )
    with bar("token") as progress:
        found = inspect(
            config,
            args.output,
            progress=progress,
            overwrite=args.overwrite,
            command=args.typed,
        )
    print(found.text)
    changed = f"{found.changed} of {found.tokens} tokens are not the model's own"
    print(f"\n{changed} ({found.first}, alone)\n")
    for path in found.files:
        print(path)
