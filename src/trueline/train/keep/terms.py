"""A term that holds a new adapter back: one function of a module's (a, b).

A term is an object with the fields and the methods of `Term`; a new one needs no other place.
`prepare` runs once for each module before training and returns what `value` needs at each step, or
None where it has nothing to say of the module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trueline.train.adapters.stack import LowRank
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
    past: tuple[LowRank, ...]
    """Parts of the earlier adapters, oldest first; empty if none has the module."""
    past_rows: Tensor | None
    """Their a, (sum of ranks) x d_in, float32; None if none has the module."""
    moments: tuple[Moments, ...]
    """Of the earlier tasks; empty unless a term `needs_moments`."""


class Term:
    """What the trainer asks of a term."""

    name: ClassVar[str]
    """For the logs."""
    needs_moments: ClassVar[bool] = False
    """Whether `Target.moments` must be read from the adapters' folders."""
    strength: float
    """The factor before the term in the loss."""

    @property
    def mean(self) -> bool:
        """Whether modules are averaged instead of summed."""
        return False

    def check(self, targets: Sequence[Target]) -> None:
        """Raise `ModelError` where the adapter starts at a place that the term cannot leave."""

    def prepare(self, target: Target) -> Any:
        """Return what `value` needs of a module, or None if the term is 0 whatever it learns."""
        raise NotImplementedError

    def value(self, a: Tensor, b: Tensor, state: Any) -> Tensor:
        """Return the term of a module; a and b are float32."""
        raise NotImplementedError
