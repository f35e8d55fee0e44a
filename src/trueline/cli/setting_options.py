"""Settings on the command line: from options, from --set, and from a TOML file."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trueline.cli.bars import bar
from trueline.errors import ConfigError
from trueline.records.run_folder import MANIFEST
from trueline.settings.reader import assignments, read_toml

Layer = tuple[dict[str, Any], str]
"""Settings, and where they were said."""
INSTALL = "pip install 'trueline[train]'"


def need_packages(names: Sequence[str]) -> None:
    """Raise `ConfigError` with the install command if a package of training is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Training needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}. "
            f"Install: {INSTALL}"
        )


def read_layers(args: argparse.Namespace) -> list[Layer]:
    """Return the settings of the file, of --set, and of the options."""
    layers: list[Layer] = [(assignments(args.set), "--set"), (given(args), "command line")]
    if args.config is not None:
        layers.insert(0, (read_toml(args.config), args.config))
    for values, source in layers:
        if "output_dir" in values:
            raise ConfigError(f"`output_dir` ({source}) is --output here.")
    return layers


def given(args: argparse.Namespace, option: str = "setting_") -> dict[str, Any]:
    """Return the settings that were typed as options: {"lora": {"rank": 8}} for `--rank 8`."""
    found: dict[str, Any] = {}
    for name, value in vars(args).items():
        if name.startswith(option):
            *tables, last = name.removeprefix(option).split(".")
            place = found
            for table in tables:
                place = place.setdefault(table, {})
            place[last] = value
    return found


Row = tuple[str, str, Any, str]
"""An option that gives a setting: flag, setting, what is typed, what it is for. What is typed is a
type, a metavar, a list of one metavar for several words, a tuple of choices, or the setting's value
for a flag alone."""


def add_settings(group: Any, rows: Sequence[Row]) -> None:
    """Add options that give settings; what is not typed leaves the file's value alone."""
    for flag, setting, kind, text in rows:
        options: dict[str, Any] = {"metavar": kind}
        if kind is int or kind is float:
            options = {"type": kind, "metavar": "X" if kind is float else "N"}
        elif isinstance(kind, bool):
            options = {"action": "store_true" if kind else "store_false"}
        elif isinstance(kind, tuple):
            options = {"choices": kind}
        elif isinstance(kind, list):
            options = {"nargs": "+", "metavar": kind[0]}
        options |= {"dest": f"setting_{setting}", "default": argparse.SUPPRESS}
        group.add_argument(flag, help=text, **options)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that runs share."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--output", metavar="DIR", help="folder of the run; required")
    add("--config", metavar="FILE", help="TOML file of settings, e.g. the config.toml of a run")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="any other setting that --list-settings shows, e.g. learning_rate=1e-4")  # fmt: skip
    add("--list-settings", action="store_true", help="print every setting with its default")
    add("--resume", action="store_true", help="go on where a killed run of this folder stopped")
    add("--overwrite", action="store_true", help="start again though the folder holds a run")
    add("--json", action="store_true", help="print the results as JSON")
    threads = "CPU threads; default 1 for small models, else torch's choice"
    add_settings(
        group,
        (
            ("--seed", "seed", int, "seed of everything (0)"),
            ("--threads", "threads", int, threads),
        ),
    )


def print_settings(rows: Iterable[tuple[str, Any, str]]) -> None:
    """Print every setting with its default and what it is."""
    for name, default, text in rows:
        print(f"{name} = {default}\n    {text}")


@contextlib.contextmanager
def running(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what a training job is called with beside its settings; it shows a bar of its steps."""
    try:
        with bar("step") as progress:
            yield {
                "progress": progress,
                "resume": args.resume,
                "overwrite": args.overwrite,
                "command": args.typed,
            }
    except KeyboardInterrupt:
        if Path(args.output, MANIFEST).exists():
            print(f"--resume goes on where {args.output} stopped", file=sys.stderr)
        raise


def say_broken(results: Any) -> None:
    """Say on stderr which checkpoints could not be gone on from."""
    for name in results.broken:
        print(f"{results.folder}: {name} is broken; went on from before it.", file=sys.stderr)
