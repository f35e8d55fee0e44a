"""A LoRA that PEFT wrote, read back: two matrices a module, and what it saved whole."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.utils.other import get_pattern_key

from trueline.errors import ModelError
from trueline.models.adapter import (
    CONFIG,
    LORA,
    PREFIX,
    WEIGHTS,
    check_adapter,
    find_adapter,
    rank_of,
    read_tensors,
)
from trueline.records.hashes import file_hash

if TYPE_CHECKING:
    from torch import Tensor

ODD = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in lora_B",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA on bare parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
}
"""Options of PEFT's LoRA that are more than a product of two matrices, or change the base."""


@dataclass(frozen=True)
class LowRank:
    """One module's part of an adapter: dW = scaling b a."""

    a: Tensor
    """rank x d_in"""
    b: Tensor
    """d_out x rank"""
    scaling: float

    def delta(self) -> Tensor:
        """Return dW in float32, d_out x d_in."""
        return self.scaling * (self.b.float() @ self.a.float())


@dataclass(frozen=True)
class SavedLora:
    """A LoRA that PEFT wrote, read back; made by `read_lora`."""

    folder: Path
    config: dict[str, Any] = field(repr=False)
    modules: Mapping[str, LowRank] = field(repr=False)
    """By the module's name in the base model."""
    saved: Mapping[str, Tensor] = field(repr=False)
    """Parameters saved whole, by name: those of `modules_to_save`."""

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration gives a module."""
        return rank_of(self.config, module)

    def weights_hash(self) -> str:
        """Return the hash of the weights' file."""
        return self.file_hashes()[WEIGHTS]

    def file_hashes(self) -> dict[str, str]:
        """Return a hash of each file that decides what the adapter does."""
        return {name: file_hash(self.folder / name) for name in (CONFIG, WEIGHTS)}


def read_lora(folder: str | Path) -> SavedLora:
    """Return the LoRA in a folder.

    Raises `ModelError` where there is none, where its files do not fit one another or hold numbers
    that are not finite, or for one that is more than a low-rank addition (DoRA, a trained bias,
    embeddings, convolutions).
    """
    folder = find_adapter(folder)
    config = check_adapter(folder)
    _refuse(folder, config)
    pairs, saved = _pairs(folder)
    patterns = config.get("alpha_pattern") or {}
    modules = {}
    for module, pair in pairs.items():
        _check_target(folder, module, config.get("target_modules"))
        if set(pair) != {"A", "B"} or any(t.dim() != 2 for t in pair.values()):
            raise ModelError(
                f'Adapter "{folder}": module "{module}" has no two matrices. Train adapters on '
                "linear modules."
            )
        rank = pair["A"].shape[0]
        alpha = patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        modules[module] = LowRank(pair["A"], pair["B"], scaling)
    if not modules:
        raise ModelError(f'Adapter "{folder}" has no LoRA weights. Save it with save_pretrained.')
    return SavedLora(folder, config, modules, saved)


def _check_target(folder: Path, module: str, targets: Any) -> None:
    """Raise `ModelError` if the configuration does not put an adapter on a module of the file."""
    if isinstance(targets, str):
        meant = targets == "all-linear" or bool(re.fullmatch(targets, module))
    else:
        meant = targets is None or any(f".{module}".endswith(f".{t}") for t in targets)
    if not meant:
        raise ModelError(
            f'Adapter "{folder}" holds weights for "{module}", which `target_modules` in {CONFIG} '
            "does not name. The two files do not belong together."
        )


def _pairs(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return the matrices A and B of each module, and the parameters saved whole."""
    pairs: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in read_tensors(folder / WEIGHTS).items():
        name = key.removeprefix(PREFIX)
        if match := LORA.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif "lora_" in name:
            raise ModelError(
                f'Adapter "{folder}" has "{name}", which is no LoRA on a linear module. Train '
                "adapters on linear modules."
            )
        else:
            saved[name] = tensor
    return pairs, saved


def _refuse(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    odd = [words for name, words in ODD.items() if config.get(name)]
    if kind != "LORA":
        odd = [f"the kind {kind}"]
    elif config.get("bias", "none") != "none":
        odd.append("a trained bias")
    if odd:
        raise ModelError(
            f'Adapter "{folder}" uses {", ".join(odd)}, which cannot be stacked exactly. Train a '
            'plain LoRA (bias "none").'
        )
