"""Exporting: adapters of several tasks as one plain LoRA, or merged into the weights of their base.

    results = export(ExportConfig(adapters=("pirate", "polite")), "one")
    results.rank, results.folder

The folder loads in transformers, PEFT and vLLM with no Trueline. It is written beside its place and
moved there whole: a full disk or a kill leaves nothing that could be taken for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trueline.errors import ConfigError, ModelError
from trueline.jobs.stack_cards import export_card
from trueline.models.adapter import CONFIG, trained_on
from trueline.models.checkpoint import load_as_saved, quiet, read_tokenizer, skeleton
from trueline.models.device import DTYPES, check_dtype
from trueline.models.load import need
from trueline.models.places import find_model
from trueline.records.disk import replace_file, whole_folder
from trueline.train.adapters.export import (
    Exported,
    new_folder,
    outputs_of,
    write_lora,
    write_merged,
)
from trueline.train.adapters.stack import AdapterStack
from trueline.types import Progress

FORMS = ("lora", "merged")


@dataclass(frozen=True)
class ExportConfig:
    """Which adapters become one, and in what form."""

    adapters: tuple[str, ...]
    """Folders of adapters, the first task's first, or folders that hold them."""
    form: str = "lora"
    """"lora", one LoRA of the summed rank, or "merged", a whole model."""
    model: str | None = None
    """Of a merged model: the untouched base; None is the one that the adapters name."""
    dtype: str = "auto"
    """Of a merged model: float32, bfloat16, float16; auto is the checkpoint's own."""
    trust_remote_code: bool = False
    """Run code that comes with the base."""

    def __post_init__(self) -> None:
        given = [self.adapters] if isinstance(self.adapters, (str, Path)) else self.adapters
        object.__setattr__(self, "adapters", tuple(map(str, given)))
        if not self.adapters:
            raise ConfigError("There are no adapters to export. Give at least one.")
        if self.form not in FORMS:
            raise ConfigError(f'`form` must be "lora" or "merged", got "{self.form}".')
        check_dtype(self.dtype)
        if self.form == "lora" and (self.model is not None or self.dtype != "auto"):
            raise ConfigError("`--model` and `--dtype` go with the form merged.")


@dataclass(frozen=True)
class ExportResults(Exported):
    """What an export wrote."""

    adapters: tuple[str, ...] = ()
    """Their folders, in the order in which they were trained."""
    tokenizer: bool = False
    """Whether a tokenizer lies beside the weights."""

    def __str__(self) -> str:
        without = "" if self.tokenizer else "; no tokenizer, since the base is not on this machine"
        return super().__str__() + without

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self) | {"folder": str(self.folder), "adapters": list(self.adapters)}


def export(
    config: ExportConfig,
    folder: str | Path,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> ExportResults:
    """Write adapters as one plain LoRA or a merged model, with tokenizer and card.

    Args:
        config: What is exported.
        folder: A new or empty folder.
        command: What was typed, for the card.
        progress: Called as progress(what, done, total).

    Raises:
        ConfigError: A folder has no adapter, `folder` is not empty, or cannot be written.
        ModelError: The adapters do not fit one another or their base.
    """
    need("peft", "adapters", "export")
    tell = progress or (lambda *_: None)
    target = new_folder(Path(folder).expanduser())
    found, streams = find_adapters(config.adapters)
    tell("reading the adapters", 0, 3)
    stack = AdapterStack.load(found)
    base = config.model or trained_on(stack.adapters[-1].config)
    with whole_folder(target) as part:
        if config.form == "lora":
            tokenizer = _check_base(config, base, stack)
            done = write_lora(stack, part)
        else:
            tell("loading the base", 1, 3)
            model, tokenizer = _base(config, base, stack, streams)
            done = write_merged(stack, part, model)
        tell("writing", 2, 3)
        if tokenizer is not None:
            with quiet():
                tokenizer.save_pretrained(part)
        results = ExportResults(
            **asdict(done) | {"folder": target},
            adapters=tuple(map(str, found)),
            tokenizer=tokenizer is not None,
        )
        replace_file(part / "README.md", export_card(command, results, stack, base, streams))
    tell("writing", 3, 3)
    return results


def find_adapters(given: Sequence[str]) -> tuple[list[Path], list[dict[str, Any]]]:
    """Return the folders of adapters, and what the streams among the given ones wrote of scores.

    A folder that holds several adapters stands for them, in their order.
    """
    found: list[Path] = []
    streams: list[dict[str, Any]] = []
    for name in given:
        folder = Path(name).expanduser()
        if (folder / CONFIG).is_file():
            found.append(folder)
        elif (folder / "R.json").is_file():
            stream = _stream(name, folder)
            found += [folder / part for part in stream["adapters"]]
            streams.append(stream)
        else:
            inside = [path.parent for path in folder.glob(f"*/{CONFIG}")]
            if not inside:
                raise ConfigError(f'No adapter at "{name}": it has no {CONFIG}.')
            found += sorted(inside, key=_natural)
    return found, streams


def _stream(name: str, folder: Path) -> dict[str, Any]:
    """Return the scores of a finished stream that left adapters to stack."""
    try:
        stream = json.loads((folder / "R.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stream = None
    if not isinstance(stream, dict):
        raise ConfigError(f'"{folder / "R.json"}" cannot be read: no run wrote it.')
    if not stream.get("finished"):
        raise ConfigError(
            f'The stream in "{name}" is unfinished. Go on with it: trueline stack --resume.'
        )
    parts = stream.get("adapters")
    if not isinstance(parts, list) or not parts:
        raise ConfigError(
            f'The stream in "{name}" left no adapters to stack: the strategy '
            f'"{stream.get("strategy")}" has none, or one for each task that stands alone '
            f'("{name}/stages/*/adapter").'
        )
    kinds = {"tasks": list, "measures": dict, "labels": list, "strategy": str}
    if odd := [key for key, kind in kinds.items() if not isinstance(stream.get(key), kind)]:
        raise ConfigError(f'"{folder / "R.json"}" has no `{odd[0]}` that a run writes.')
    if not all(isinstance(part, str) and (folder / part / CONFIG).is_file() for part in parts):
        raise ConfigError(f'The stream in "{name}" lacks adapters that its R.json names.')
    return stream


def _natural(path: Path) -> list[Any]:
    """Return a key by which task-10 comes after task-9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _base(
    config: ExportConfig, name: str | None, stack: AdapterStack, streams: list[dict[str, Any]]
) -> tuple[Any, Any]:
    """Return the untouched base in the dtype that was asked for, and its tokenizer.

    A classifier knows the labels of the stream by their names.
    """
    if name is None:
        raise ConfigError("The adapters do not name their base model. Give `--model`.")
    outputs = outputs_of(stack)
    place = find_model(name, trust_remote_code=config.trust_remote_code)
    loaded = load_as_saved(place, head=None if outputs is None else {"num_labels": outputs})
    model = loaded.model
    labels = streams[-1].get("labels", []) if streams else []
    classifies = type(model).__name__.endswith("ForSequenceClassification")
    if classifies and model.config.num_labels == len(labels):
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: k for k, label in enumerate(labels)}
    if config.dtype != "auto":
        model.to(DTYPES[config.dtype])
    return model, loaded.tokenizer


def _check_base(config: ExportConfig, name: str | None, stack: AdapterStack) -> Any:
    """Return the base's tokenizer, having seen that the adapters fit; None where there is no base.

    A LoRA can be written without its base, which may lie on another machine.
    """
    try:
        if name is None:
            return None
        place = find_model(name, trust_remote_code=config.trust_remote_code)
        model = skeleton(place)
    except (ModelError, ConfigError):
        return None
    stack.fitting(model)
    try:
        return read_tokenizer(place)
    except ModelError:
        return None
