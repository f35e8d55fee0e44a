"""ELLA: away from the entries of the weights that earlier adapters changed most.

See `trueline.methods.ella`. Nothing is kept beside the adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trueline.errors import check_number
from trueline.methods.ella import alignment, energy_of
from trueline.train.keep.stage import Keep, Stage
from trueline.train.keep.terms import Target, Term

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ella(Keep):
    """A change where earlier adapters changed the weights costs by how much they did."""

    name: ClassVar[str] = "ella"

    strength: float = 1.0
    """lambda, at least 0; 0 keeps nothing."""
    normalize: bool = True
    """In units of each module's weight, averaged over modules; off, the paper's sum."""

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0)

    def terms(self, stage: Stage) -> list[Term]:
        """Return the alignment with the sum of the earlier changes."""
        return [Alignment(self.strength, self.normalize)] if self.strength else []


@dataclass(frozen=True)
class Alignment(Term):
    """`trueline.methods.ella.alignment` with the change of all earlier adapters together."""

    name: ClassVar[str] = "alignment"

    strength: float = 1.0
    """lambda, at least 0."""
    normalize: bool = False
    """See `Ella`."""

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0)

    @property
    def mean(self) -> bool:
        """Relative changes are averaged, the paper's are summed."""
        return self.normalize

    def prepare(self, target: Target) -> Tensor | None:
        """Return scaling^2 W_past^2 by entry, or None where nothing was changed before."""
        if not target.past:
            return None
        past = sum((part.delta() for part in target.past[1:]), start=target.past[0].delta())
        weight = target.weight.detach().float().to(past.device) if self.normalize else None
        return target.scaling**2 * energy_of(past, weight)

    def value(self, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        """Return the alignment of one module."""
        return alignment(a, b, state)
