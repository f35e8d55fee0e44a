"""Strategies that keep something of a task beside its weights, for the tasks after it.

replay      some of its rows
drift       second moments of what modules read, in its adapter's folder
inf-lora    a basis of what modules read so far
ewc         the diagonal Fisher information so far, and the values that it holds to
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from trueline.continual.families import Row
from trueline.continual.fisher import fisher, moments_of
from trueline.continual.stages import Stage, Strategy, Weights
from trueline.errors import check_number
from trueline.methods.inf_lora import grow_basis, reading_matrix
from trueline.train.adapters.stack import adapter_layers
from trueline.train.keep.regularisers import Drift, Overlap, Regulariser, Target
from trueline.train.keep.second_moments import save_moments

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Replay(Strategy):
    """One LoRA throughout, with rows of each earlier task kept and mixed in."""

    name: ClassVar[str] = "replay"
    weights: ClassVar[Weights] = "one"

    buffer: int = 32
    """Rows kept of each earlier task, at least 1."""
    share: float = 0.5
    """Share of the training rows that is drawn from the buffer, in (0, 1)."""

    def __post_init__(self) -> None:
        check_number("buffer", self.buffer, low=1, whole=True)
        check_number("share", self.share, low=0, high=1, low_open=True, high_open=True)

    def training_rows(self, stage: Stage) -> list[Row]:
        """Return as many rows as the task has, part of them from the buffer, with repeats."""
        kept = [
            row
            for i, rows in enumerate(stage.earlier_rows)
            # The rows kept of a task are the same at each later one.
            for row in Stage.draw(_at(stage, i), self.buffer, rows, key="buffer")
        ]
        if not kept:
            return list(stage.rows)
        old = max(1, round(self.share * len(stage.rows)))
        rng = random.Random(f"{stage.seed} replay")
        # Each row of the buffer as often as any other, up to one.
        order = [kept[i] for _ in range(-(-old // len(kept)))
                 for i in rng.sample(range(len(kept)), len(kept))]  # fmt: skip
        return stage.draw(len(stage.rows) - old, key="new") + order[:old]


def _at(stage: Stage, index: int) -> Stage:
    """Return the stage with the seed of an earlier one."""
    return replace(stage, seed=stage.seed - stage.index + index)


@dataclass(frozen=True)
class DriftLora(Strategy):
    """A LoRA a task, held back by what it would change on the inputs of the earlier tasks.

    After each task one pass over `probe_rows` of its rows keeps second moments, no data.
    """

    name: ClassVar[str] = "drift"

    strength: float = 1.0
    """At least 0; 0 is inc-lora."""
    curvature: bool = False
    """Weigh outputs with the gradients of the earlier losses, and not with their own energy."""
    overlap: float = 0.0
    """Strength of O-LoRA's normalised penalty beside it, at least 0."""
    probe_rows: int = 256
    """Rows of a task that its moments are taken over, at least 1."""
    factor_rank: int | None = None
    """The most directions kept of a module's moments; None for all."""

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0)
        check_number("overlap", self.overlap, low=0)
        check_number("probe_rows", self.probe_rows, low=1, whole=True)
        if self.factor_rank is not None:
            check_number("factor_rank", self.factor_rank, low=1, whole=True)

    def regularisers(self, stage: Stage) -> list[Regulariser]:
        """Return the drift on the earlier tasks' inputs."""
        terms: list[Any] = [
            Drift(self.strength, self.curvature),
            Overlap(self.overlap, normalize=True),
        ]
        return [term for term in terms if term.strength > 0]

    def after(self, model: Any, stage: Stage, folder: Path) -> None:
        """Keep the moments of the task."""
        save_moments(
            moments_of(
                model,
                stage.kind,
                stage.draw(self.probe_rows, key="probe"),
                stage.batch_size,
                seed=stage.seed,
                gradients=self.curvature,
                rank=self.factor_rank,
            ),
            folder,
        )


BASIS = "basis.safetensors"


@dataclass(frozen=True)
class InfLora(Strategy):
    """InfLoRA: a is chosen from inputs and fixed, b is trained.

    The share of the earlier inputs' energy that the basis holds rises over the stream from
    `threshold` to `threshold_end`, as in the authors' code [recon].
    """

    name: ClassVar[str] = "inf-lora"

    threshold: float = 0.95
    """In [0, 1]."""
    threshold_end: float = 1.0
    """In [0, 1]; the last task would have it."""
    probe_rows: int = 256
    """Rows of a task that its inputs are taken from, at least 1."""

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, low=0, high=1)
        check_number("threshold_end", self.threshold_end, low=0, high=1)
        check_number("probe_rows", self.probe_rows, low=1, whole=True)

    def before(self, model: Any, stage: Stage) -> None:
        """Write the reading matrix of each module, and freeze it."""
        bases = load_file(stage.folders[-1] / BASIS) if stage.folders else {}
        factors = self._factors(model, stage)
        for name, layer in adapter_layers(model).items():
            a = layer.lora_A["default"].weight
            factor = factors[name]
            basis = bases.get(name, torch.zeros(0, factor.shape[1])).to(factor)
            with torch.no_grad():
                a.copy_(reading_matrix(factor, basis, len(a)))
            a.requires_grad_(False)

    def after(self, model: Any, stage: Stage, folder: Path) -> None:
        """Keep the basis of all inputs so far."""
        bases = load_file(stage.folders[-1] / BASIS) if stage.folders else {}
        rise = (self.threshold_end - self.threshold) * stage.index / stage.total
        grown = {}
        for name, factor in self._factors(model, stage).items():
            basis = bases.get(name, torch.zeros(0, factor.shape[1])).to(factor)
            grown[name] = grow_basis(basis, factor, self.threshold + rise).cpu().contiguous()
        save_file(grown, folder / BASIS)

    def _factors(self, model: Any, stage: Stage) -> dict[str, Tensor]:
        rows = stage.draw(self.probe_rows, key="probe")
        found = moments_of(model, stage.kind, rows, stage.batch_size, seed=stage.seed)
        return {name: moments.factor for name, moments in found.items()}


EWC = "fisher.safetensors"


@dataclass(frozen=True)
class Ewc(Strategy):
    """One LoRA throughout; leaving its earlier values costs by their Fisher information.

    strength / 2 sum_{i<t} sum_k F_ik (theta_k - theta_ik)^2 over the LoRA's parameters, F_i the
    diagonal after task i. The sum over tasks is kept as one: with F = sum_i F_i and theta* the mean
    of theta_i weighted by F_i it is F (theta - theta*)^2 and a constant.
    """

    name: ClassVar[str] = "ewc"
    weights: ClassVar[Weights] = "one"

    strength: float = 100.0
    """At least 0; the Fisher information is of a row's loss."""
    probe_rows: int = 128
    """Rows of a task that its Fisher information is taken over, at least 1."""

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0)
        check_number("probe_rows", self.probe_rows, low=1, whole=True)

    def regularisers(self, stage: Stage) -> list[Regulariser]:
        """Return the cost of leaving earlier values."""
        if not stage.folders or self.strength == 0:
            return []
        return [Anchored(self.strength, stage.folders[-1] / EWC)]

    def after(self, model: Any, stage: Stage, folder: Path) -> None:
        """Keep the summed Fisher information and the weighted mean of the values."""
        rows = stage.draw(self.probe_rows, key="probe")
        new = fisher(model, stage.kind, rows, stage.seed)
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
class Anchored:
    """The term of `Ewc`, as a regulariser of a module's two matrices."""

    name: ClassVar[str] = "ewc"
    needs_moments: ClassVar[bool] = False
    mean: ClassVar[bool] = False

    strength: float
    file: Path

    def prepare(self, target: Target) -> list[Tensor] | None:
        """Return the Fisher information and the anchor of a and b."""
        state, keys = load_file(self.file), [f"{target.name}.{part}" for part in "ab"]
        return [state[f"{key}.{what}"] for key in keys for what in ("fisher", "anchor")]

    def term(self, a: Tensor, b: Tensor, state: list[Tensor]) -> Tensor:
        """Return 1/2 sum F (theta - theta*)^2."""
        fisher_a, anchor_a, fisher_b, anchor_b = state
        left = (fisher_a * (a - anchor_a).square()).sum()
        return 0.5 * (left + (fisher_b * (b - anchor_b).square()).sum())
