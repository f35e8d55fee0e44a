"""Folders of runs from the command line: which settings they belong to, what is written there."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel
    from trueline.records.run_folder import RunFolder


def finish(
    args: argparse.Namespace, run: RunFolder, results: dict[str, Any], draw: Any = None
) -> None:
    """Draw the plot if there is one, write the results, and print them."""
    from trueline.jobs import report
    from trueline.records.lines import plain

    results = plain(results)
    results["plot"] = bool(draw) and not args.no_plot
    if results["plot"]:
        from matplotlib import rc_context

        from trueline.records.style import STYLE

        with rc_context(STYLE):
            run.draw("plot.png", draw())
    text = report.render_run(results, run.settings, run.command)
    run.write("results.md", text)
    written = run.finish(results)
    if args.json:
        print(json.dumps({"folder": str(run.folder), **written}, ensure_ascii=False))
        return
    if "points" in results:
        print(report.render_table(report.point_table(results["points"])))
    if "numbers" in results:
        print(report.render_table(report.numbers_table(results)))
    if "recommendation" in results:
        print()
        print("\n".join(report.recommendation_lines(results["recommendation"])))
    print(f"\n{run.folder}")


def model_settings(args: argparse.Namespace, model: LanguageModel) -> dict[str, Any]:
    """Return what tells the model and the versions it runs under."""
    from trueline.cli.options import model_config
    from trueline.records.hashes import versions

    return {"model": model_config(args).identity(model), "versions": versions()}


def run_folder(args: argparse.Namespace, kind: str, settings: Mapping[str, Any]) -> Path:
    """Return the run's folder: as given, or one named by what decides the responses."""
    from trueline.records.hashes import digest
    from trueline.records.lines import plain

    if args.output is not None:
        return Path(args.output).expanduser()
    return Path("runs") / f"{kind}-{digest(plain(settings))[:8]}"


def sources(args: argparse.Namespace) -> list[str]:
    """Return the files that the prompts come from."""
    names = ("safe", "unsafe", "prompts", "questions", "pairs")
    return [getattr(args, n) for n in names if getattr(args, n, None)] or ["bundled"]


def command(args: argparse.Namespace) -> str:
    """Return what the user typed."""
    return shlex.join(["trueline", *getattr(args, "argv", sys.argv[1:])])


def output_folder(name: str) -> Path:
    """Return the folder, made if need be; raise `ConfigError` if that cannot be."""
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write-test").touch()
        (folder / ".write-test").unlink()
    except OSError as error:
        raise ConfigError(f'Cannot write into "{name}": {error}.') from None
    return folder
