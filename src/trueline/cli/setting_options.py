"""Settings on the command line: from options, from --set, and from a TOML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from trueline.errors import ConfigError

INSTALL = "pip install 'trueline[train]'"


def need_packages(names: Sequence[str]) -> None:
    """Raise `ConfigError` with the install command if a package of training is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Training needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}. "
            f"Install: {INSTALL}"
        )


def read_layers(args: argparse.Namespace) -> list[tuple[dict[str, Any], str]]:
    """Return (settings, where they were said) of the file, of --set, and of the options."""
    from trueline.settings.reader import assignments, read_toml

    layers = [(assignments(args.set), "--set"), (given(args), "command line")]
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


def add_setting(group: Any, flag: str, setting: str, **options: Any) -> None:
    """Add an option that gives a setting; what is not typed leaves the file's value alone."""
    if not {"action", "choices", "metavar"} & options.keys():
        options["metavar"] = "NAME"
    group.add_argument(flag, dest=f"setting_{setting}", default=argparse.SUPPRESS, **options)


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
    add_setting(group, "--seed", "seed", type=int, metavar="N", help="seed of everything (0)")
    add_setting(group, "--threads", "threads", type=int, metavar="N",
                help="CPU threads; default 1 for small models, else torch's choice")  # fmt: skip
