"""`trueline train`: put a principle into the weights, or task after task with nothing forgotten.

trueline train inverse-q   distil a decoding method into an adapter or the weights
trueline train o-lora      a stream of tasks, each in its own orthogonal low-rank subspace
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError

if TYPE_CHECKING:
    from trueline.records.run_folder import RunFolder

EXAMPLES = """examples:
  trueline train inverse-q --principle "Talk like a pirate." --prompts prompts.jsonl --output pirate
  trueline train inverse-q --config pirate/config.toml --output again --steps 200 --set floor=0.01
  trueline train inverse-q --teacher self-cd --alpha 2.5 --prompts requests.jsonl --output frank
  trueline train inverse-q --model DIR --full --dtype bfloat16 --prompts p.jsonl --output out ...
  trueline train o-lora --tasks stream.toml --output stacked
  trueline generate "What is the moon?" --adapter pirate

Every setting can stand in a TOML file (--config) or behind --set NAME=VALUE; --list-settings shows
them all. The command line goes before the file. The folder of a run keeps config.toml, which makes
the same run again, manifest.json, results.json, log.jsonl, curves.png, README.md and the weights,
which load in transformers and PEFT with no Trueline. --resume goes on where a killed run stopped.
"""

PARTS = {
    "inverse-q": "distil a decoding method into an adapter or the weights",
    "o-lora": "a stream of tasks, each in its own orthogonal low-rank subspace",
}
INSTALL = "pip install 'trueline[train]'"
NEEDED = ("peft", "datasets", "accelerate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the trainers with their options; an option's `dest` is the setting that it gives."""
    parts = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, summary in PARTS.items():
        if name == "inverse-q":
            from trueline.cli.distil import add_options

            examples = EXAMPLES
        else:
            from trueline.cli.stack import EXAMPLES as examples
            from trueline.cli.stack import add_options
        part = parts.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=examples
        )
        part.set_defaults(parser=part)
        add_options(part)
        _add_run_options(part)


def run(args: argparse.Namespace) -> int | None:
    """Check that the packages are there, and hand over to the trainer that was asked for."""
    need_packages()
    if args.what == "inverse-q":
        from trueline.cli import distil

        return distil.run(args)
    from trueline.cli import stack

    stack.run(args)
    return None


def need_packages(names: Sequence[str] = NEEDED) -> None:
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


def show(args: argparse.Namespace, folder: RunFolder, note: str) -> None:
    """Print the results, the folder, and how to use what is in it."""
    from trueline.records.style import brief

    results = folder.results or {}
    if args.json:
        print(json.dumps({"folder": str(folder.folder), **results}, ensure_ascii=False))
        return
    for name, value in results.items():
        print(f"{name:<52} {brief(value)}")
    print(f"\n{folder.folder}")
    if note:
        print(note)


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


def _add_run_options(parser: argparse.ArgumentParser) -> None:
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
    add_setting(group, "--report-to", "report_to", nargs="+", metavar="NAME",
                help="wandb, tensorboard, trackio ... (none)")  # fmt: skip
