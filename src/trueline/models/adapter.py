"""Adapters that PEFT wrote: found, checked against their own configuration, put on a model.

PEFT starts what a file lacks at zero or at random and warns at most. Here an adapter is refused
unless each of its tensors is there, has the shape that its configuration gives it, is finite, and
has a place in the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError, ModelError, check_number, suggestion
from trueline.models.checkpoint import (
    listed,
    pickle_refusal,
    quiet,
    read_object,
    reading,
    tensor_shapes,
)
from trueline.models.hub import download_adapter, looks_local, one_line
from trueline.records.hashes import digest, file_hash

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "__base__"
"""What PEFT calls the model with no adapter on, as the adapter of a row."""
MAX_RANK = 8192
"""A LoRA that is trained has no higher rank; the widest layers of large models have no more."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""
LORA = re.compile(r"(.*)\.lora_(A|B)\.weight")


def find_adapter(name: str | Path) -> Path:
    """Return the folder of an adapter: a folder's own, or of a copy of the hub's.

    Raises `ModelError` where there is none; the folder of an unfinished run names its checkpoint.
    """
    path = Path(name).expanduser()
    if (path / CONFIG).is_file():
        return path
    if path.is_dir():
        raise ModelError(_no_adapter(name, path))
    if looks_local(name) or path.exists():
        raise ModelError(f'No adapter folder at "{name}". Give a folder or a hub name.')
    return download_adapter(str(name))


def adapter_settings(name: str | None, folder: Path | None = None) -> dict[str, Any] | None:
    """Return what tells an adapter: its name, and a hash of the two files that are loaded.

    `folder` is where it was loaded from; without one it is found, see `find_adapter`. None for no
    adapter.
    """
    if name is None:
        return None
    folder = folder or find_adapter(name)
    read = [path for path in (folder / CONFIG, folder / WEIGHTS) if path.is_file()]
    return {"name": name, "hash": digest([[path.name, file_hash(path)] for path in read])}


def _no_adapter(name: str | Path, path: Path) -> str:
    """Return what a folder without an adapter is, and what to give in its place."""
    inside = sorted(path.glob(f"checkpoints/checkpoint-*/{CONFIG}"), key=_step)
    inside += sorted(path.glob(f"checkpoint-*/{CONFIG}"), key=_step)
    if inside:
        return (
            f'Folder "{name}" is a run that has not finished: it has no adapter yet. Go on with it '
            f'by --resume, or give its last checkpoint, "{inside[-1].parent}".'
        )
    stages = sorted(path.glob(f"stages/*/adapter/{CONFIG}"), key=lambda p: _step(p.parent))
    if stages:
        return (
            f'Folder "{name}" holds several adapters. Make one of them by `trueline export '
            f'--adapters {name} --to DIR`, or give one, e.g. "{stages[-1].parent}".'
        )
    if (path / "config.json").is_file():
        return f'Folder "{name}" is a model, not an adapter. Give it as --model.'
    return f'Folder "{name}" holds no adapter: it has no {CONFIG}.'


def _step(path: Path) -> int:
    return int(re.sub(r"\D", "", path.parent.name) or 0)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return an adapter's configuration; `ModelError` for what PEFT cannot have written."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = read_object(folder / CONFIG)
    kind = config.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ModelError(
            f'Adapter "{folder}": {CONFIG} names the unknown kind {kind!r} (`peft_type`).'
            f"{suggestion(str(kind), [known.value for known in PEFT_TYPE_TO_CONFIG_MAPPING])}"
        )
    if kind == "LORA":
        _check_lora_config(folder, config)
    return config


def _check_lora_config(folder: Path, config: Mapping[str, Any]) -> None:
    try:
        check_number("r", config.get("r"), low=1, whole=True)
        check_number("lora_alpha", config.get("lora_alpha"))
        for name in ("rank_pattern", "alpha_pattern", "auto_mapping"):
            if not isinstance(config.get(name) or {}, dict):
                raise ConfigError(f"`{name}` must be an object, got {config[name]!r}.")
        for value in (config.get("rank_pattern") or {}).values():
            check_number("rank_pattern", value, low=1, whole=True)
        for value in (config.get("alpha_pattern") or {}).values():
            check_number("alpha_pattern", value)
        for name in ("target_modules", "modules_to_save"):
            names = config.get(name)
            listed = isinstance(names, list) and all(isinstance(n, str) for n in names)
            if not (listed or names is None or isinstance(names, str)):
                raise ConfigError(f"`{name}` must be text or a list of it, got {names!r}.")
    except ConfigError as error:
        raise ModelError(f'Adapter "{folder}": {CONFIG}: {error}') from None


def check_adapter(folder: Path) -> dict[str, Any]:
    """Return the configuration of an adapter whose file of weights is whole and fits it.

    Raises `ModelError` for weights that are missing, pickled, damaged, of another rank than the
    configuration's, or not finite.
    """
    config = read_adapter_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        if pickled := sorted(p.name for p in folder.glob("*.bin")):
            raise ModelError(pickle_refusal(folder, pickled[0]))
        raise ModelError(
            f'Folder "{folder}" holds the configuration of an adapter and no weights: it has no '
            f"{WEIGHTS}."
        )
    shapes = tensor_shapes(path)
    if config["peft_type"] == "LORA":
        for name, shape in shapes.items():
            if (match := LORA.fullmatch(name)) and len(shape) == 2:
                rank = rank_of(config, match[1].removeprefix(PREFIX))
                found = shape[0 if match[2] == "A" else 1]
                if found != rank:
                    raise ModelError(
                        f'Adapter "{folder}": "{name}" has rank {found}, {CONFIG} says {rank} '
                        "(`r`). The two files do not belong together."
                    )
    check_finite(folder, read_tensors(path))
    return config


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """Return the rank that a LoRA's configuration gives a module."""
    from peft.utils.other import get_pattern_key

    pattern = config.get("rank_pattern") or {}
    return int(pattern.get(get_pattern_key(list(pattern), module), config["r"]))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; raises `ModelError` for one that is damaged."""
    from safetensors.torch import load_file

    tensor_shapes(path)
    return load_file(path)


def check_finite(name: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ModelError` if any tensor holds a number that is not finite."""
    odd = [k for k, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if odd:
        raise ModelError(
            f'Adapter "{name}" holds numbers that are not finite (NaN or infinity) in '
            f"{listed(odd)}: its training went wrong. Give an earlier checkpoint, or train again "
            "with a lower learning rate."
        )


def put_adapter(
    model: Any,
    name: str | Path,
    folder: Path,
    *,
    trainable: bool = False,
    on: str = "",
    called: str = "default",
) -> Any:
    """Return the model with the adapter in a folder on it, by PEFT; each tensor has its place.

    `name` and `on` are what errors call the adapter and the model, `called` is what PEFT calls it.
    A model that has an adapter keeps it on. Raises `ModelError` for an adapter of another model, or
    one that lacks a part.
    """
    from peft import PeftConfig, PeftModel, get_peft_model

    if any(called in place.split(".") for place, _ in model.named_modules()):
        raise ConfigError(
            f'A module of the model is called "{called}". Name the adapter otherwise.'
        )
    config = check_adapter(folder)
    with quiet(), reading(name, "adapter"):
        settings: Any = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = not trainable
        tuned: Any = model
        others = set(getattr(model, "peft_config", ()))
        if not isinstance(model, PeftModel):
            tuned = get_peft_model(model, settings, adapter_name=called)
        result: Any = tuned.load_adapter(str(folder), called, is_trainable=trainable)
    embedded = ("embed_tokens", "lm_head", "wte")
    missing = [k for k in result.missing_keys if not _is_shared(config, k)]
    missing = [k for k in missing if called in k.split(".") or not others & set(k.split("."))]
    unexpected = [k for k in result.unexpected_keys if not any(e in k for e in embedded)]
    for what, names in (("lacks", missing), ("has no place in the model for", unexpected)):
        if names:
            raise ModelError(
                f'Adapter "{name}" does not fit model "{on}": it {what} {listed(names)}. '
                "Give the adapter's own base model, and all of its file."
            )
    return tuned


def _is_shared(config: Mapping[str, Any], key: str) -> bool:
    """Return whether a kind of adapter draws this tensor from its configuration, as VeRA does."""
    kind = config.get("peft_type")
    return kind == "VERA" and "vera_" in key and not config.get("save_projection", True)


def add_lora(model: Any, config: Any) -> Any:
    """Return the model with a fresh adapter of this `peft.LoraConfig` on it, named "default".

    Raises:
        ConfigError: `target_modules` names no linear module, or the rank is above every width.
    """
    import torch
    from peft import get_peft_model

    linear = {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or is_conv1d(module)
    }
    widest = max((max(m.weight.shape) for m in linear.values()), default=0)
    if not 0 < (rank := getattr(config, "r", 1)) <= widest:
        raise ConfigError(
            f"The adapter's rank must be from 1 to {widest}, the widest of the model's modules, "
            f"got {rank}."
        )
    try:
        with quiet():
            return get_peft_model(model, config)
    except ValueError as error:
        targets = getattr(config, "target_modules", None)
        shown = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
        raise ConfigError(
            f'No adapter for `target_modules` "{shown}": {one_line(error)} Linear modules of this '
            f'model: {", ".join(linear)}; or "all-linear".'
        ) from None


def check_targets(model: Any, targets: Sequence[str] | str | None) -> None:
    """Raise `ConfigError` if a name in `target_modules` is of no module of the model.

    A list holds ends of names, a text is a pattern of whole names or "all-linear".
    """
    if targets is None or targets == "all-linear":
        return
    names = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        try:
            odd = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
        except re.error as error:
            raise ConfigError(f'`target_modules` "{targets}" is no pattern: {error}.') from None
    else:
        odd = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in names)]
    if odd:
        known = sorted({name.rpartition(".")[2] for name in names} - {""})
        raise ConfigError(
            f'The model has no module "{odd[0]}" (`target_modules`).{suggestion(odd[0], known)}'
        )


def trained_on(config: Mapping[str, Any]) -> str | None:
    """Return the base model that an adapter names; None where it names none."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def steady_config(folder: Path) -> None:
    """Write a configuration of PEFT's again with its sets of names in order.

    PEFT writes them in the order of a hash that differs from run to run.
    """
    path = folder / CONFIG
    config = read_object(path)
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def is_conv1d(module: Any) -> bool:
    """Return whether a module is GPT-2's Conv1D: a linear one with a transposed weight."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
