"""`trueline methods`: what there is, with options, defaults and papers."""

from __future__ import annotations

import argparse
import dataclasses
import json

from trueline.cli.options import field_docs
from trueline.methods import METHODS

EXAMPLES = """examples:
  trueline methods
  trueline methods --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object a method")


def run(args: argparse.Namespace) -> None:
    """Print every method."""
    for name, cls in METHODS.items():
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        docs, options = field_docs(cls), []
        for field in dataclasses.fields(cls):
            required = field.default is dataclasses.MISSING
            default = None if required else field.default
            options.append((field.name, "required" if required else default, docs[field.name]))
        if args.json:
            listed = [{"name": n, "default": d, "help": h} for n, d, h in options]
            row = {"name": name, "paper": cls.paper, "summary": summary, "options": listed}
            print(json.dumps(row))
            continue
        print(f"{name}\n    {summary}\n    {cls.paper}")
        for option, default, text in options:
            shown = default if not isinstance(default, str) or len(default) < 40 else "see below"
            print(f"      {option} = {shown}    {text}.")
            if shown == "see below":
                print(f'          "{default}"')
        print()
