"""InfLoRA: a is chosen from inputs and fixed, b is trained; see `trueline.methods.inf_lora`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trueline.errors import DataError, check_number
from trueline.methods.inf_lora import grow_basis, reading_matrix
from trueline.train.adapters.stack import adapter_layers
from trueline.train.keep.stage import Keep, Stage

if TYPE_CHECKING:
    from torch import Tensor

BASIS = "basis.safetensors"


@dataclass(frozen=True)
class InfLora(Keep):
    """The reading matrix lies outside of what earlier stages' inputs span.

    The share of the earlier inputs' energy that the basis holds rises over the chain from
    `threshold` to `threshold_end`, as in the authors' code [recon].
    """

    name: ClassVar[str] = "inf-lora"

    threshold: float = 0.95
    """In [0, 1]."""
    threshold_end: float = 1.0
    """In [0, 1]; the last stage would have it."""
    probe_rows: int = 256
    """Rows of a stage that its inputs are taken from, at least 1."""

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, low=0, high=1)
        check_number("threshold_end", self.threshold_end, low=0, high=1)
        check_number("probe_rows", self.probe_rows, low=1, whole=True)

    def begin(self, model: Any, stage: Stage) -> None:
        """Write the reading matrix of each module, and freeze it."""
        bases = _bases(stage)
        factors = self._factors(model, stage)
        for name, layer in adapter_layers(model).items():
            a = layer.lora_A["default"].weight
            factor = factors[name]
            basis = bases.get(name, torch.zeros(0, factor.shape[1])).to(factor)
            with torch.no_grad():
                a.copy_(reading_matrix(factor, basis, len(a)))
            a.requires_grad_(False)

    def end(self, model: Any, stage: Stage, folder: Path) -> None:
        """Keep the basis of all inputs so far."""
        bases = _bases(stage)
        rise = (self.threshold_end - self.threshold) * stage.index / stage.total
        grown = dict(bases)  # modules that this stage has not are kept for those after it
        for name, factor in self._factors(model, stage).items():
            basis = bases.get(name, torch.zeros(0, factor.shape[1])).to(factor)
            grown[name] = grow_basis(basis, factor, self.threshold + rise).cpu().contiguous()
        save_file(grown, folder / BASIS)

    def _factors(self, model: Any, stage: Stage) -> dict[str, Tensor]:
        found = stage.moments(model, self.probe_rows)
        return {name: moments.factor for name, moments in found.items()}


def _bases(stage: Stage) -> dict[str, Tensor]:
    """Return the basis of earlier inputs of each module."""
    if not stage.folders:
        return {}
    path = stage.folders[-1] / BASIS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: cannot be read: {error} InfLoRA needs it of every earlier adapter."
        ) from None
