"""`trueline demo`: principle adherence and over-refusal on a model, as a report."""

from __future__ import annotations

import argparse

from trueline.cli.bars import bar

EXAMPLES = """examples:
  trueline demo
  trueline demo --limit 60 --output /tmp/demo
  trueline demo --model smollm2 --output demo-real

Writes report.md, results.json (every number and every answer) and demo.png into the folder. About a
minute on one core; `--limit` makes it shorter. On a model that was not made for it, some minutes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("--model", default="tiny", help='folder, hub name, "smollm2", or "tiny", the bundled one '
        "(default)")  # fmt: skip
    add("--output", default="demo", metavar="DIR", help="folder for the files (demo)")
    add("--limit", type=int, metavar="N", help="at most N answers a row of the "
        "report (300; 24 on a model other than the bundled one)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="which pairs and requests are drawn (0)")


def run(args: argparse.Namespace) -> None:
    """Measure, write the report, and print the counts."""
    from trueline.jobs.demonstration import FIGURE, DemoConfig, demonstrate

    config = DemoConfig(args.limit, args.seed, args.model)
    with bar("answer") as progress:
        found = demonstrate(config, args.output, progress=progress, command=args.typed)
    print(found.table())
    print(f"\n{found.seconds} seconds, {found.answers} answers")
    for name in ("report.md", FIGURE, "results.json"):
        print(found.folder / name)
