"""`trueline train`: task after task, with nothing forgotten."""

from __future__ import annotations

import argparse

from trueline.cli import stack
from trueline.cli.setting_options import add_run_options, need_packages

EXAMPLES = stack.EXAMPLES
PARTS = {"o-lora": "a stream of tasks, each in its own orthogonal low-rank subspace"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the trainers with their options; an option's `dest` is the setting that it gives."""
    parts = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, summary in PARTS.items():
        about = f"{summary[0].upper()}{summary[1:]}."
        part = parts.add_parser(name, help=summary, description=about, epilog=EXAMPLES)
        part.set_defaults(parser=part)
        stack.add_options(part)
        add_run_options(part)


def run(args: argparse.Namespace) -> None:
    """Check that the packages are there, and train the stream."""
    need_packages(("peft", "datasets"))
    stack.run(args)
