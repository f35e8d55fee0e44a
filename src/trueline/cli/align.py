"""`trueline align`: from sentences to a model that holds them, with a verdict and a report."""

from __future__ import annotations

import argparse
import json
from typing import Any

from trueline.errors import ConfigError

EXAMPLES = """examples:
  trueline align "Talk like a pirate."
  trueline align "Answer in one short sentence." --model smollm2 --output brief
  trueline align project.toml --output aligned
  trueline align project.toml --output aligned --dry-run
  trueline align --add principle.toml --output aligned

Exit code 0: ship. 3: do not ship; the reasons are printed, and stand with their evidence in
verdict.json. 2: the project cannot be run as it is.

The folder keeps report.html, report.md, results.json, verdict.json, the adapter or model in
exported/, and every stage. The same command goes on where a killed one stopped; after a change of
the project only what depends on it runs again. docs/aligning.md has the project file.
"""
NEEDED = ("peft", "datasets", "accelerate", "matplotlib")
DO_NOT_SHIP = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("project", nargs="*", metavar="PROJECT", help="a TOML file, or principles in words, "
        "learned in this order")  # fmt: skip
    add("--model", metavar="NAME", help='folder, hub name, or "tiny", bundled (default)')
    add("--output", default="aligned", metavar="DIR", help="folder of the project (aligned)")
    add("--add", metavar="FILE", help="principles for the project in --output: a TOML file of "
        "[[principle]] tables. The prompts of the earlier ones are not needed")  # fmt: skip
    add("--prompts", metavar="FILE", help="of a principle given in words; by default the bundled "
        "ones for tiny, else the model writes them")  # fmt: skip
    add("--pattern", metavar="REGEX", help="of a principle given in words: answers that match "
        "follow it; by default the untouched model judges")  # fmt: skip
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="any other setting, e.g. answers=1024 training.learning_rate=1e-3")  # fmt: skip
    add("--list-settings", action="store_true", help="print every setting with its default")
    add("--dry-run", action="store_true", help="print what would run, and for about how long")
    add("--overwrite", action="store_true", help="start again though the folder holds a project")
    add("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the project, and return the exit code of its verdict."""
    from trueline.cli.setting_options import need_packages

    need_packages(NEEDED)
    if args.list_settings:
        list_settings()
        return 0
    from trueline.cli.bars import bar
    from trueline.jobs.alignment import align, summary_text

    config = config_of(args)
    if args.dry_run:
        return dry_run(config, args)
    with bar("answer") as progress:
        results = align(config, args.output, progress=progress, overwrite=args.overwrite,
                        command=args.typed)  # fmt: skip
    if args.json:
        print(json.dumps(results.as_dict(), ensure_ascii=False))
    else:
        print(summary_text(results))
    return 0 if results.ship else DO_NOT_SHIP


def config_of(args: argparse.Namespace) -> Any:
    """Return the project that was asked for."""
    from trueline.jobs.alignment import extended
    from trueline.jobs.projects import AlignConfig
    from trueline.settings.reader import assignments, merge, read_toml

    more: dict[str, Any] = assignments(args.set)
    more |= {} if args.model is None else {"model": args.model}
    if args.add is not None:
        if args.project or more or args.prompts or args.pattern:
            raise ConfigError("`--add` takes the project in --output, and nothing else.")
        return extended(args.output, args.add)
    files = [word for word in args.project if word.endswith(".toml")]
    if not args.project:
        raise ConfigError("Give a project: a TOML file, or a principle in words.")
    if files:
        if len(args.project) > 1:
            raise ConfigError("Give one project file, or principles in words.")
        if args.prompts or args.pattern:
            raise ConfigError("`--prompts` and `--pattern` are for a principle given in words.")
        content, folder = read_toml(files[0]), files[0]
        return AlignConfig.of(merge(content, more), folder, _parent(folder))
    if args.pattern and len(args.project) > 1:
        raise ConfigError("`--pattern` is for one principle. Give several in a project file.")
    own = {"prompts": args.prompts, "pattern": args.pattern}
    given = {name: value for name, value in own.items() if value is not None}
    tables = [{"text": text, **given} for text in args.project]
    return AlignConfig.of({**more, "principle": tables}, "command line", ".")


def dry_run(config: Any, args: argparse.Namespace) -> int:
    """Print the stages, what is there, and about how long the others take."""
    from trueline.evals.tables import render_table
    from trueline.jobs.align_plan import plan_alignment

    stages = plan_alignment(config, args.output)
    if args.json:
        print(json.dumps([stage.as_dict() for stage in stages], ensure_ascii=False))
        return 0
    rows = [
        [s.kind, s.name, s.key[:8], str(s.answers), "done" if not s.missing else
         f"{s.missing} answers, about {s.seconds:.0f} s"]
        for s in stages
    ]  # fmt: skip
    print(render_table((["stage", "of", "key", "answers", "to run"], rows)))
    print(f"About {sum(s.seconds for s in stages) / 60:.1f} minutes, off the path not counted.")
    return 0


def list_settings() -> None:
    """Print every setting with its default and what it is."""
    from trueline.cli.setting_options import print_settings
    from trueline.jobs.projects import AlignConfig, Principle
    from trueline.settings.reader import explain

    hidden = ("principles", "folder")
    print_settings(row for row in explain([AlignConfig]) if row[0] not in hidden)
    print("\n[[principle]]")
    print_settings(explain([Principle]))


def _parent(path: str) -> str:
    from pathlib import Path

    return str(Path(path).parent)
