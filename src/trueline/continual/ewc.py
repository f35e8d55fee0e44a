"""EWC: one LoRA throughout, each weight held by its diagonal Fisher information.

Paper: Kirkpatrick et al., PNAS 2017, arXiv 1612.00796. Labels are drawn from the model itself,
among those over which the training loss goes, as the Fisher information asks for: with the true
labels a task learned well would leave nothing behind. Dropout is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from trueline.errors import check_number
from trueline.train.adapters.stack import adapter_layers
from trueline.train.keep.stage import Keep, Stage
from trueline.train.keep.terms import Target, Term
from trueline.train.tasks.families import Family, Row
from trueline.train.tasks.stages import TaskStage

if TYPE_CHECKING:
    from torch import Tensor, nn

EWC = "fisher.safetensors"


@dataclass(frozen=True)
class Ewc(Keep):
    """Leaving the earlier values of one LoRA costs by their Fisher information.

    strength / 2 sum_{i<t} sum_k F_ik (theta_k - theta_ik)^2 over the LoRA's parameters, F_i the
    diagonal after task i. The sum over tasks is kept as one: with F = sum_i F_i and theta* the mean
    of theta_i weighted by F_i it is F (theta - theta*)^2 and a constant.
    """

    name: ClassVar[str] = "ewc"

    strength: float = 100.0
    """At least 0; the Fisher information is of a row's loss."""
    probe_rows: int = 128
    """Rows of a task that its Fisher information is taken over, at least 1."""

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0)
        check_number("probe_rows", self.probe_rows, low=1, whole=True)

    def terms(self, stage: Stage) -> list[Term]:
        """Return the cost of leaving earlier values."""
        if not stage.folders or self.strength == 0:
            return []
        return [Anchored(self.strength, stage.folders[-1] / EWC)]

    def end(self, model: Any, stage: Stage, folder: Path) -> None:
        """Keep the summed Fisher information and the weighted mean of the values."""
        assert isinstance(stage, TaskStage)
        rows = stage.draw(self.probe_rows, key="probe")
        new = fisher(model, stage.family, rows, stage.seed)
        old = load_file(stage.folders[-1] / EWC) if stage.folders else {}
        state = {}
        for module, layer in adapter_layers(model).items():
            matrices = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            for part, theta in zip("ab", matrices, strict=True):
                key, value = f"{module}.{part}", theta.detach().float().cpu()
                own = new[theta].cpu()
                before, anchor = old.get(f"{key}.fisher", 0 * own), old.get(f"{key}.anchor", value)
                total = before + own
                mean = (before * anchor + own * value) / total.clamp(min=1e-30)
                state[f"{key}.fisher"] = total
                state[f"{key}.anchor"] = torch.where(total > 1e-30, mean, value)
        save_file(state, folder / EWC)


@dataclass(frozen=True)
class Anchored(Term):
    """The term of `Ewc` on a module's two matrices."""

    name: ClassVar[str] = "ewc"

    strength: float
    file: Path

    def prepare(self, target: Target) -> list[Tensor] | None:
        """Return the Fisher information and the anchor of a and b."""
        state, keys = load_file(self.file), [f"{target.name}.{part}" for part in "ab"]
        return [state[f"{key}.{what}"] for key in keys for what in ("fisher", "anchor")]

    def value(self, a: Tensor, b: Tensor, state: list[Tensor]) -> Tensor:
        """Return 1/2 sum F (theta - theta*)^2."""
        fisher_a, anchor_a, fisher_b, anchor_b = state
        left = (fisher_a * (a - anchor_a).square()).sum()
        return 0.5 * (left + (fisher_b * (b - anchor_b).square()).sum())


def fisher(
    model: Any, family: Family, rows: Sequence[Row], seed: int
) -> dict[nn.Parameter, Tensor]:
    """Return E (d loss / d theta)^2 over rows for each trained parameter; a backward pass a row."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    total = {p: torch.zeros_like(p, dtype=torch.float32) for p in trained}
    was_training = model.training
    model.eval()
    for row in rows:
        batch = {k: v.to(model.device) for k, v in family.collate([row]).items()}
        loss = family.own_loss(_logits(model, batch), batch, generator)
        for p, grad in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True),
                           strict=True):  # fmt: skip
            if grad is not None:
                total[p] += grad.float().square() / len(rows)
    model.train(was_training)
    return total


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return logits; labels go in only where a decoder's input is made of them."""
    fed = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    if getattr(model.config, "is_encoder_decoder", False):
        fed["labels"] = batch["labels"]
    logits: Tensor = model(**fed).logits
    return logits
