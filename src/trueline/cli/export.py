"""`trueline export`: adapters of several tasks as one plain LoRA, or merged into the weights."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.cli.stack_cards import export_card
from trueline.errors import ConfigError
from trueline.records.disk import replace_file

if TYPE_CHECKING:
    from trueline.train.adapters.stack import AdapterStack

EXAMPLES = """examples:
  trueline export --adapters stacked --to one
  trueline export --adapters pirate polite --to both --form lora
  trueline export --adapters stacked --to model --form merged --dtype float32

--adapters takes folders of adapters in the order in which they were trained, or one folder that
holds them in folders of its own, as `trueline train o-lora` leaves it. Both forms give what the
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
    add("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> None:
    """Find the adapters, put them together, and say what serves them."""
    from trueline.cli.train import need_packages

    if args.form == "lora" and (args.model is not None or args.dtype != "auto"):
        raise ConfigError("`--model` and `--dtype` go with `--form merged`.")
    folders, streams = adapter_folders(args.adapters)
    need_packages(("peft",))
    from trueline.train.progress import no_bars, quiet

    with quiet(), no_bars():
        from trueline.train.adapters.export import export
        from trueline.train.adapters.stack import AdapterStack

        stack = AdapterStack.load(folders)
        if args.form == "lora":
            done = export(stack, args.to, "lora")
        else:
            model, tokenizer = base(args, stack, streams)
            done = export(stack, args.to, "merged", model=model)
            if tokenizer is not None:
                tokenizer.save_pretrained(args.to)
        name = args.model or stack.adapters[-1].config.get("base_model_name_or_path")
        card = export_card(args, done, stack, name, streams)
        replace_file(done.folder / "README.md", card)
    if args.json:
        shown = {"folder": str(done.folder), "form": done.form, "tasks": done.tasks}
        ranks = {"rank": done.rank, "vllm_max_lora_rank": done.vllm_max_lora_rank}
        print(json.dumps(shown | {"adapters": list(map(str, folders))} | ranks))
    else:
        print(done)


def adapter_folders(given: list[str]) -> tuple[list[Path], list[dict[str, Any]]]:
    """Return the folders of adapters, and what the streams among the given ones wrote of scores.

    A folder that holds several adapters stands for them, in their order.
    """
    found: list[Path] = []
    streams: list[dict[str, Any]] = []
    for name in given:
        folder = Path(name).expanduser()
        if (folder / "adapter_config.json").is_file():
            found.append(folder)
            continue
        if (folder / "R.json").is_file():
            from trueline.cli.stack import summary_of

            stream = summary_of(folder)
            if not stream.get("finished"):
                raise ConfigError(
                    f'The stream in "{name}" is unfinished. Go on with it: trueline train o-lora '
                    "--resume."
                )
            if not stream.get("adapters"):
                raise ConfigError(
                    f'The stream in "{name}" left no adapters to stack: the strategy '
                    f'"{stream.get("strategy")}" has none, or one for each task that stands alone '
                    f'("{name}/stages/*/adapter").'
                )
            found += [folder / part for part in stream["adapters"]]
            streams.append(stream)
            continue
        inside = [path.parent for path in folder.glob("*/adapter_config.json")]
        if not inside:
            raise ConfigError(f'No adapter at "{name}": it has no adapter_config.json.')
        found += sorted(inside, key=_natural)
    return found, streams


def _natural(path: Path) -> list[Any]:
    """Return a key by which task-10 comes after task-9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def base(
    args: argparse.Namespace, stack: AdapterStack, streams: list[dict[str, Any]]
) -> tuple[Any, Any]:
    """Return the untouched base model in the dtype that was asked for, and its tokenizer.

    A classifier knows the labels of the stream by their names.
    """
    from importlib import resources

    from trueline.errors import suggestion
    from trueline.models.device import DTYPES
    from trueline.models.hub import BUNDLED
    from trueline.train.adapters.export import load_base, outputs_of

    if args.dtype not in ("auto", *DTYPES):
        raise ConfigError(f'Unknown dtype "{args.dtype}".{suggestion(args.dtype, DTYPES)}')
    source = args.model or stack.adapters[-1].config.get("base_model_name_or_path")
    if not source:
        raise ConfigError("The adapters do not name their base model. Give `--model`.")
    if source in BUNDLED:
        source = str(resources.files("trueline") / "assets" / source)
    model, tokenizer = load_base(source, outputs=outputs_of(stack))
    last = streams[-1] if streams else {}
    labels = last.get("labels", [])
    if last.get("kind") == "classifier" and model.config.num_labels == len(labels):
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: k for k, label in enumerate(labels)}
    return (model if args.dtype == "auto" else model.to(DTYPES[args.dtype])), tokenizer
