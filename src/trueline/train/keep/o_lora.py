"""O-LoRA: away from the rows of earlier adapters; see `trueline.methods.o_lora`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trueline.errors import ModelError, check_number
from trueline.methods.o_lora import Penalty, check_penalty, norm, overlap, row_basis, share
from trueline.train.keep.stage import Keep, Stage
from trueline.train.keep.terms import Target, Term

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class OLora(Keep):
    """The overlap with all earlier rows costs, and perhaps the length of the matrices."""

    name: ClassVar[str] = "o-lora"

    lambda_1: float = 0.5
    """Strength of the orthogonality penalty, at least 0."""
    lambda_2: float = 0.0
    """Strength of the norm penalty, at least 0."""
    penalty: Penalty = "abs"
    """"abs" (the code's) or "squared" (the paper's)."""
    normalize: bool = True
    """A penalty that does not grow with the model and the tasks; off, the released sums."""

    def __post_init__(self) -> None:
        check_number("lambda_1", self.lambda_1, low=0)
        check_number("lambda_2", self.lambda_2, low=0)
        check_penalty(self.penalty)

    def terms(self, stage: Stage) -> list[Term]:
        """Return the overlap with earlier rows, and the norm."""
        terms: list[Term] = [
            Overlap(self.lambda_1, self.penalty, self.normalize),
            Norm(self.lambda_2, self.normalize),
        ]
        return [term for term in terms if term.strength > 0]


@dataclass(frozen=True)
class Overlap(Term):
    """`trueline.methods.o_lora.overlap` with the rows of all earlier adapters."""

    name: ClassVar[str] = "overlap"

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

    def check(self, targets: Sequence[Target]) -> None:
        """Raise `ModelError` where the new adapter starts as a copy of an earlier one.

        The same random seed before each task does that; then the overlap is at its top, where it
        has hardly a gradient. Where earlier rows span most of the width, nothing can be said.
        """
        shares = [
            float(share(target.a.detach().float().cpu(), basis.cpu()))
            for target in targets
            if target.past_rows is not None
            and 2 * len(basis := row_basis(target.past_rows)) <= basis.shape[1]
        ]
        if shares and sum(shares) / len(shares) > 0.95:
            raise ModelError(
                "The new adapter starts inside the span of earlier ones, as it does when each task "
                "begins with the same random seed. Seed each task differently, or attach with "
                "`orthogonal_start`."
            )

    def prepare(self, target: Target) -> Tensor | None:
        """Return the past rows, or a basis of their span."""
        if target.past_rows is None:
            return None
        return row_basis(target.past_rows) if self.normalize else target.past_rows

    def value(self, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        """Return the overlap of one module."""
        return share(a, state, self.penalty) if self.normalize else overlap(a, state, self.penalty)


@dataclass(frozen=True)
class Norm(Term):
    """`trueline.methods.o_lora.norm` of the new adapter; it needs no earlier ones."""

    name: ClassVar[str] = "norm"

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

    def value(self, a: Tensor, b: Tensor, state: bool) -> Tensor:
        """Return the norm of one module."""
        return norm(a, b, self.normalize)
