"""Folders of runs from the command line: which settings they belong to, what is written there."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel
    from trueline.records.runs import Run


def finish(args: argparse.Namespace, run: Run, results: dict[str, Any], draw: Any = None) -> None:
    """Draw the plot if there is one, write the results, and print them."""
    from trueline.jobs import report
    from trueline.records.runs import plain

    results = plain(results)
    results["plot"] = bool(draw) and not args.no_plot
    if results["plot"]:
        from matplotlib import rc_context

        from trueline.records.plots import STYLE

        with rc_context(STYLE):
            draw().savefig(run.folder / "plot.png")
    text = report.render_run(results, run.settings, run.command)
    written = run.finish(results, text)
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
    from importlib import resources

    from trueline.models.load import BUNDLED
    from trueline.records.runs import digest, folder_hash, model_hash, versions

    folder: Any = Path(args.model).expanduser()
    if args.model in BUNDLED:
        folder = Path(str(resources.files("trueline"))) / "assets" / args.model
    adapter = None
    if args.adapter is not None:
        own = Path(args.adapter).expanduser()
        adapter = {"name": args.adapter, "hash": folder_hash(own) if own.is_dir() else None}
    return {
        "model": {
            "name": args.model,
            "revision": args.revision,
            "hash": model_hash(model, folder),
            "adapter": adapter,
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "quantize": args.quantize,
            "raw": args.raw,
            "packed_weights": not args.no_packed_weights,
            "chat_template": digest(str(getattr(model.tokenizer, "chat_template", None))),
        },
        "versions": versions(),
    }


def run_folder(args: argparse.Namespace, kind: str, settings: Mapping[str, Any]) -> Path:
    """Return the run's folder: as given, or one named by what decides the responses."""
    from trueline.records.runs import digest, plain

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
