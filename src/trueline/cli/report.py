"""`trueline report`: runs of `trueline eval` side by side, as Markdown and one HTML page."""

from __future__ import annotations

import argparse
import json

EXAMPLES = """examples:
  trueline report runs/refusal-1a2b3c4d
  trueline report runs/self-cd runs/ada-cd --output comparison

Writes report.md and report.html (one file, with the plots inside) into the folder. Runs on the
same prompts are compared by paired tests.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a finished `trueline eval` run")
    add("--output", default="report", metavar="DIR", help="folder for the files (report)")
    add("--json", action="store_true", help="print the runs' results as one JSON object")


def run(args: argparse.Namespace) -> None:
    """Read the runs and write the report."""
    from trueline.jobs.reports import ReportConfig, report

    found = report(ReportConfig(tuple(args.runs)), args.output)
    if args.json:
        print(json.dumps(found.as_dict(), ensure_ascii=False))
        return
    print(found.markdown)
    for name in ("report.md", "report.html"):
        print(found.folder / name)
