"""`trueline export`: adapters of several tasks as one plain LoRA, or merged into the weights."""

from __future__ import annotations

import argparse
import json

EXAMPLES = """examples:
  trueline export --adapters stacked --to one
  trueline export --adapters pirate polite --to both --form lora
  trueline export --adapters stacked --to model --form merged --dtype float32

--adapters takes folders of adapters in the order in which they were trained, or one folder that
holds them in folders of its own, as `trueline stack` leaves it. Both forms give what the
stacked adapters give, and load in transformers, PEFT and vLLM with no Trueline; the README.md that
is written beside them says how.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("--adapters", nargs="+", metavar="DIR", required=True, help="adapters, the first task's "
        "first, or the folder that holds them")  # fmt: skip
    add("--to", metavar="DIR", required=True, help="a new or empty folder")
    add("--form", choices=("lora", "merged"), default="lora", help="one LoRA of rank T x r "
        "(default), or a whole model")  # fmt: skip
    add("--model", metavar="NAME", help="merged: the untouched base, a folder, hub name or "
        '"tiny"; by default the one that the adapters name')  # fmt: skip
    add("--dtype", default="auto", help="merged: float32, bfloat16, float16; auto (default) is "
        "the checkpoint's own, to which the sum is rounded")  # fmt: skip
    add("--trust-remote-code", action="store_true", help="run code that comes with the base")
    add("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> None:
    """Export, and say what serves the result."""
    from trueline.jobs.exporting import ExportConfig, export

    config = ExportConfig(
        adapters=tuple(args.adapters),
        form=args.form,
        model=args.model,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    results = export(config, args.to, command=args.typed)
    print(json.dumps(results.as_dict()) if args.json else results)
