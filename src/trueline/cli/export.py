"""`trueline export`: adapters of several tasks as one plain LoRA, or merged into the weights."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from trueline.errors import ConfigError

EXAMPLES = """examples:
  trueline export --adapters stacked --to one
  trueline export --adapters pirate polite --to both --form lora
  trueline export --adapters stacked --to model --form merged --dtype float32

--adapters takes folders of adapters in the order in which they were trained, or one folder that
holds them in folders of its own, as `trueline train o-lora` leaves it. Both forms give what the
stacked adapters give, and load in transformers, PEFT and vLLM with no Trueline.
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
    add("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> None:
    """Find the adapters, put them together, and say what serves them."""
    from trueline.cli.train import need_packages

    if args.form == "lora" and (args.model is not None or args.dtype != "auto"):
        raise ConfigError("`--model` and `--dtype` go with `--form merged`.")
    folders = adapter_folders(args.adapters)
    need_packages(("peft",))
    from trueline.train.runs.records import quiet

    with quiet():
        from trueline.train.adapters.export import export
        from trueline.train.adapters.stack import AdapterStack

        stack = AdapterStack.load(folders)
        if args.form == "lora":
            done = export(stack, args.to, "lora")
        else:
            model, tokenizer = base(args, stack)
            done = export(stack, args.to, "merged", model=model)
            if tokenizer is not None:
                tokenizer.save_pretrained(args.to)
    if args.json:
        shown = {"folder": str(done.folder), "form": done.form, "tasks": done.tasks}
        ranks = {"rank": done.rank, "vllm_max_lora_rank": done.vllm_max_lora_rank}
        print(json.dumps(shown | {"adapters": list(map(str, folders))} | ranks))
    else:
        print(done)


def adapter_folders(given: list[str]) -> list[Path]:
    """Return the folders of adapters; one that holds several stands for them, in their order."""
    found: list[Path] = []
    for name in given:
        folder = Path(name).expanduser()
        if (folder / "adapter_config.json").is_file():
            found.append(folder)
            continue
        if (folder / "R.json").is_file():
            from trueline.cli.stack import summary_of

            stream = summary_of(folder)
            found += [folder / part for part in stream.get("adapters", [])]
            if not stream.get("adapters") or not stream.get("finished"):
                why = "is unfinished" if not stream.get("finished") else "left no adapters to stack"
                raise ConfigError(f'The stream in "{name}" {why}.')
            continue
        inside = [path.parent for path in folder.glob("*/adapter_config.json")]
        if not inside:
            raise ConfigError(f'No adapter at "{name}": it has no adapter_config.json.')
        found += sorted(inside, key=_natural)
    return found


def _natural(path: Path) -> list[Any]:
    """Return a key by which task-10 comes after task-9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def base(args: argparse.Namespace, stack: Any) -> tuple[Any, Any]:
    """Return the untouched base model in the dtype that was asked for, and its tokenizer."""
    from importlib import resources

    from trueline.errors import suggestion
    from trueline.modeling import BUNDLED, DTYPES
    from trueline.train.adapters.export import load_base

    if args.dtype not in ("auto", *DTYPES):
        raise ConfigError(f'Unknown dtype "{args.dtype}".{suggestion(args.dtype, DTYPES)}')
    source = args.model or stack.adapters[-1].config.get("base_model_name_or_path")
    if not source:
        raise ConfigError("The adapters do not name their base model. Give `--model`.")
    if source in BUNDLED:
        source = str(resources.files("trueline") / "assets" / source)
    model, tokenizer = load_base(source)
    return (model if args.dtype == "auto" else model.to(DTYPES[args.dtype])), tokenizer
