"""`trueline report`: runs of `trueline eval` side by side, as Markdown and one HTML page."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from trueline.errors import ConfigError

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
    from trueline.cli.inspect import output_folder
    from trueline.jobs.report import render_html, render_markdown
    from trueline.records.run_folder import read_results

    runs = [read_results(folder) for folder in args.runs]
    names = [Path(folder).name or str(folder) for folder in args.runs]
    if len(set(map(str, map(Path.resolve, map(Path, args.runs))))) < len(runs):
        raise ConfigError("A run is named twice. Give each folder once.")
    for i, (name, results) in enumerate(zip(names, runs, strict=True)):
        results["name"] = name if names.count(name) == 1 else str(args.runs[i])
    folder = output_folder(args.output)
    text = render_markdown(runs, folder)
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(render_html(runs), encoding="utf-8")
    if args.json:
        print(json.dumps({"runs": runs, "folder": str(folder)}, ensure_ascii=False))
    else:
        print(text)
        print(folder / "report.md")
        print(folder / "report.html")
