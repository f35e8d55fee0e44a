"""Drift (ours): little change of outputs on the inputs of earlier stages, or of earlier losses.

At a stage's end one pass over some of its rows keeps second moments in the adapter's folder, no
data; see `trueline.methods.drift`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trueline.errors import ModelError, check_number
from trueline.methods.drift import drift, mean_factor, relative
from trueline.train.keep.o_lora import Overlap
from trueline.train.keep.second_moments import save_moments
from trueline.train.keep.stage import Keep, Stage
from trueline.train.keep.terms import Target, Term

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DriftKeep(Keep):
    """Held back by what the new adapter would change on the inputs of the earlier stages."""

    name: ClassVar[str] = "drift"

    strength: float = 1.0
    """At least 0; 0 keeps nothing."""
    curvature: bool = False
    """Weigh outputs with the gradients of the earlier losses, and not with their own energy."""
    overlap: float = 0.0
    """Strength of O-LoRA's normalised penalty beside it, at least 0."""
    probe_rows: int = 256
    """Rows of a stage that its moments are taken over, at least 1."""
    factor_rank: int | None = None
    """The most directions kept of a module's moments; None for all."""

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0)
        check_number("overlap", self.overlap, low=0)
        check_number("probe_rows", self.probe_rows, low=1, whole=True)
        if self.factor_rank is not None:
            check_number("factor_rank", self.factor_rank, low=1, whole=True)

    def terms(self, stage: Stage) -> list[Term]:
        """Return the drift on the earlier stages' inputs."""
        terms: list[Term] = [
            Drift(self.strength, self.curvature),
            Overlap(self.overlap, normalize=True),
        ]
        return [term for term in terms if term.strength > 0]

    def end(self, model: Any, stage: Stage, folder: Path) -> None:
        """Keep the moments of the stage."""
        found = stage.moments(
            model, self.probe_rows, gradients=self.curvature, rank=self.factor_rank
        )
        save_moments(found, folder)


@dataclass(frozen=True)
class Drift(Term):
    """`trueline.methods.drift.drift` on the inputs of the earlier tasks; needs their moments."""

    name: ClassVar[str] = "drift"
    needs_moments: ClassVar[bool] = True

    strength: float = 1.0
    """At least 0. With `curvature`, 1 makes a rise of the earlier tasks' loss (to second order, and
    averaged over tasks) as dear as one of the new task's."""
    curvature: bool = False
    """Weigh outputs with the gradients of the earlier losses; moments need them (`gradients`)."""
    rank: int | None = None
    """The most rows kept of each factor of the mean over tasks."""

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0)

    @property
    def mean(self) -> bool:
        """Relative drifts are averaged over modules; rises of the loss are summed."""
        return not self.curvature

    def prepare(self, target: Target) -> list[tuple[Tensor, Tensor | None]] | None:
        """Return the factors with everything constant in them."""
        found = target.moments
        if not found:
            return None
        if not self.curvature:
            factor = mean_factor([m.factor for m in found], self.rank)
            weight = target.weight.detach().float().to(factor.device)
            return [(target.scaling * relative(factor, weight), None)]
        pairs: list[tuple[Tensor, Tensor | None]] = []
        for m in found:
            if m.out is None:
                raise ModelError(
                    f'The moments of module "{target.name}" have no gradients. Collect them with '
                    "`gradients=True`."
                )
            # 1/2 E (g^T dW x)^2, mean over tasks; a Kronecker product each, so they do not add up
            scale = target.scaling * (0.5 / len(found)) ** 0.5
            pairs.append((scale * m.factor[: self.rank], m.out[: self.rank]))
        return pairs

    def value(self, a: Tensor, b: Tensor, state: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Return the drift of one module."""
        terms = [drift(a, b, factor, out) for factor, out in state]
        return sum(terms[1:], start=terms[0])
