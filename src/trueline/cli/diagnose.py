"""`trueline diagnose`: what a model makes of a system text, and where to start."""

from __future__ import annotations

import argparse
import json

from trueline.cli.bars import bar
from trueline.cli.options import add_model_options, model_config

EXAMPLES = """examples:
  trueline diagnose --model smollm2
  trueline diagnose --model smollm2 --principle "Answer in one sentence." "Be formal."
  trueline diagnose --model DIR --principle "Talk like a pirate." --pattern "arr|matey" --json
  trueline diagnose --model DIR --safe xstest.jsonl --unsafe harmbench.jsonl --output looked

Without --principle and --safe both parts run, on three principles that a pattern can check and on
the bundled requests. About a minute for a model of 135M on one core: few prompts, short greedy
answers, wide intervals. It says from which settings to go on; `trueline eval` measures them.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("--principle", nargs="+", action="extend", default=[], metavar="TEXT",
        help="system texts to follow (three that a pattern can check)")  # fmt: skip
    add("--pattern", metavar="REGEX", help="answers that match follow the principles given (none)")
    add("--prompts", metavar="FILE", help="questions for the principles (bundled ones)")
    add("--safe", metavar="FILE", help="requests that should be answered (bundled ones)")
    add("--unsafe", metavar="FILE", help="requests that should be refused (bundled ones)")
    add("--safety-prompt", metavar="TEXT", help="the safety text (Self-CD's own)")
    add("--limit", type=int, default=16, metavar="N",
        help="questions a principle, and requests of each kind (16)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="which prompts are drawn (0)")
    add("--output", metavar="DIR", help="folder for results.json, report.md, answers.jsonl (none)")
    add("--overwrite", action="store_true", help="start again though the folder holds another run")
    add("--json", action="store_true", help="print the numbers as JSON")
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    """Look at the model, and print what was found and what follows."""
    from trueline.jobs.diagnosis import DiagnoseConfig, diagnose

    names = ("pattern", "prompts", "safe", "unsafe", "limit", "seed")
    given = {name: getattr(args, name) for name in names}
    if args.safety_prompt is not None:
        given["safety_prompt"] = args.safety_prompt
    config = DiagnoseConfig(model_config(args), tuple(args.principle), **given)
    with bar("answer") as progress:
        found = diagnose(
            config,
            args.output,
            progress=progress,
            overwrite=args.overwrite,
            command=args.typed,
        )
    if args.json:
        print(json.dumps(found.as_dict(), ensure_ascii=False))
        return
    print(found.table())
    print(f"\n{found.seconds} seconds" + (f", {found.folder}" if found.folder else ""))
