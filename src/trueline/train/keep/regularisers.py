"""Terms that hold a new adapter back, one function of a module's (a, b) each.

    Overlap     O-LoRA: away from the rows of earlier adapters
    Norm        O-LoRA: short matrices
    Drift       ours: little change of outputs on earlier tasks' inputs, or of earlier losses

A term is an object with the fields and the two methods of `Regulariser`; a new one needs no other
place. `prepare` runs once for each module before training and returns what `term` needs at each
step, or None where it has nothing to say of the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from trueline.errors import ModelError, check_number
from trueline.methods.drift import drift, mean_factor, relative
from trueline.methods.o_lora import Penalty, check_penalty, norm, overlap, row_basis, share

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trueline.train.keep.second_moments import Moments


@dataclass(frozen=True)
class Target:
    """A module that the new adapter changes, as it is before training."""

    name: str
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scaling: float
    """dW = scaling b a."""
    weight: Tensor
    """Of the frozen model with all earlier adapters in it, d_out x d_in."""
    past_rows: Tensor | None
    """a of the earlier adapters, (sum of ranks) x d_in, float32; None if none has the module."""
    moments: tuple[Moments, ...]
    """Of the earlier tasks; empty unless a regulariser `needs_moments`."""


class Regulariser(Protocol):
    """What the trainer asks of a term."""

    name: ClassVar[str]
    """For the logs."""
    needs_moments: ClassVar[bool]
    """Whether `Target.moments` must be read from the adapters' folders."""

    @property
    def strength(self) -> float:
        """The factor before the term in the loss."""

    @property
    def mean(self) -> bool:
        """Whether modules are averaged instead of summed."""

    def prepare(self, target: Target) -> Any:
        """Return what `term` needs of a module, or None if the term is 0 whatever it learns."""

    def term(self, a: Tensor, b: Tensor, state: Any) -> Tensor:
        """Return the term of a module; a and b are float32."""


@dataclass(frozen=True)
class Overlap:
    """`trueline.methods.o_lora.overlap` with the rows of all earlier adapters."""

    name: ClassVar[str] = "overlap"
    needs_moments: ClassVar[bool] = False

    strength: float = 0.5
    """lambda_1, at least 0."""
    penalty: Penalty = "abs"
    """"abs" (the code's) or "squared" (the paper's)."""
    normalize: bool = False
    """The share inside the past span, in [0, 1] and averaged over modules, not the sum."""

    def __post_init__(self) -> None:
        check_number("lambda_1", self.strength, low=0)
        check_penalty(self.penalty)

    @property
    def mean(self) -> bool:
        """Shares are averaged, sums are summed."""
        return self.normalize

    def prepare(self, target: Target) -> Tensor | None:
        """Return the past rows, or a basis of their span."""
        if target.past_rows is None:
            return None
        return row_basis(target.past_rows) if self.normalize else target.past_rows

    def term(self, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        """Return the overlap of one module."""
        return share(a, state, self.penalty) if self.normalize else overlap(a, state, self.penalty)


@dataclass(frozen=True)
class Norm:
    """`trueline.methods.o_lora.norm` of the new adapter; it needs no earlier ones."""

    name: ClassVar[str] = "norm"
    needs_moments: ClassVar[bool] = False

    strength: float = 0.0
    """lambda_2, at least 0."""
    normalize: bool = False
    """Row and column lengths averaged over modules, not the sum of matrix norms."""

    def __post_init__(self) -> None:
        check_number("lambda_2", self.strength, low=0)

    @property
    def mean(self) -> bool:
        """Lengths are averaged, norms are summed."""
        return self.normalize

    def prepare(self, target: Target) -> bool:
        """Return that every module counts."""
        return True

    def term(self, a: Tensor, b: Tensor, state: bool) -> Tensor:
        """Return the norm of one module."""
        return norm(a, b, self.normalize)


@dataclass(frozen=True)
class Drift:
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

    def term(self, a: Tensor, b: Tensor, state: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Return the drift of one module."""
        terms = [drift(a, b, factor, out) for factor, out in state]
        return sum(terms[1:], start=terms[0])
