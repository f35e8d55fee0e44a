"""`trueline methods`: what there is, with options, defaults and papers."""

from __future__ import annotations

import argparse
import json
import textwrap

from trueline.methods import METHODS, find_method
from trueline.methods.linear_alignment import RELEASE_SYSTEM, LinearAlignment
from trueline.settings.options import options_of

EXAMPLES = """examples:
  trueline methods
  trueline methods self-cd --json
  trueline methods my_method.py:MyMethod
"""
REPEAT = f"""To repeat the scripts of Linear Alignment exactly: `--mask-temperature 0.5` (they
divide the logits by 0.5 before they cut the candidates, and take the likeliest token; greedy
decoding, the default here, divides by 1), `--system "{RELEASE_SYSTEM}"` (their
sentence for Qwen, in both branches), and `--ratio 3` for HH or 5 for personal preference."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="these alone, also FILE.py:Class (all)")
    add("--json", action="store_true", help="print one JSON object a method")


def run(args: argparse.Namespace) -> None:
    """Print the methods."""
    names = args.names or list(METHODS)
    for name in names:
        cls = find_method(name)
        options = options_of(cls)
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        if args.json:
            listed = [
                {"name": o.name, "default": "required" if o.required else o.default, "help": o.doc}
                for o in options
            ]
            paper = getattr(cls, "paper", "-")
            row = {"name": name, "paper": paper, "summary": summary, "options": listed}
            print(json.dumps(row, default=str))
            continue
        print(f"{name}\n    {summary}\n    {getattr(cls, 'paper', '-')}")
        for o in options:
            long = isinstance(o.default, str) and len(o.default) >= 40
            shown = "required" if o.required else "see below" if long else o.default
            print(_wrapped(f"{o.name} = {shown}    {o.doc}." if o.doc else f"{o.name} = {shown}"))
            if long:
                print(_wrapped(f'"{o.default}"', 10))
        print()
    if not args.json and LinearAlignment.name in names:
        print(REPEAT)


def _wrapped(text: str, indent: int = 6) -> str:
    rest = " " * max(indent, 10)
    first, lines = " " * indent, textwrap.wrap(text, 92, replace_whitespace=False)
    return "\n".join((first if i == 0 else rest) + line for i, line in enumerate(lines))
