"""Blend: several principles at once, each with its own signed weight.

Paper: ours, after the additive contrasts of Liu et al., "DExperts", ACL 2021, arXiv 2105.03023, and
the single-principle step of Linear Alignment (arXiv 2401.11458).

All principles share one plain branch, so n principles cost n + 1 rows of one batch.

    z* = z_0 + sum_k w_k (z_k - z_0)

One principle with weight 1 + rho is Linear Alignment with ratio rho; weights that sum to 0 on the
same text cancel; a negative weight moves away from its principle.

    candidates: the union of the top-p sets of the branches with positive weight, or the plain
    branch's if there is none

Differs from the paper: nothing known (there is none for this form).
Differs from the authors' code: there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trueline.errors import ConfigError, check_number, check_text
from trueline.methods._ops import STRONGEST, nucleus, restrict, with_system
from trueline.types import Message

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Blend:
    """Follow several principles, each as strongly as its weight says.

    >>> Blend(principles=(("Talk like a pirate.", 3.0), ("Be brief.", 1.5)))
    """

    name: ClassVar[str] = "blend"
    paper: ClassVar[str] = "ours; after Liu et al., ACL 2021, arXiv 2105.03023"
    rest_branch: ClassVar[int] = 0
    base_branches: ClassVar[tuple[int, ...]] = ()
    first_tokens: ClassVar[int | None] = None

    principles: tuple[tuple[str, float], ...]
    """Pairs of (principle, weight); weight 1 is the principle prompt, 0 nothing, negative away."""
    candidates: float = 0.8
    """Mass of the candidates, in (0, 1]; 1 keeps all tokens."""

    def __post_init__(self) -> None:
        try:
            pairs = tuple((text, weight) for text, weight in self.principles)
        except (TypeError, ValueError):
            raise ConfigError(
                f"`principles` must be pairs of (text, weight), got {self.principles!r}."
            ) from None
        object.__setattr__(self, "principles", pairs)
        if not pairs:
            raise ConfigError("`principles` is empty. Give at least one (text, weight) pair.")
        for text, weight in pairs:
            check_text("principles", text, "Each is a (text, weight) pair.")
            check_number(f"weight of {text!r}", weight, low=-STRONGEST, high=STRONGEST)
        check_number("candidates", self.candidates, low=0, high=1, low_open=True)

    def prompts(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Return the plain prompt, then the prompt with each principle."""
        return [list(messages), *(with_system(messages, text) for text, _ in self.principles)]

    def combine(self, logits: Float[Tensor, "batch branch vocab"]) -> Float[Tensor, "batch vocab"]:
        """Return the blended logits, minus infinity outside the candidates."""
        weights = logits.new_tensor([weight for _, weight in self.principles])
        # z_0 + sum_k w_k (z_k - z_0) = (1 - sum_k w_k) z_0 + sum_k w_k z_k
        coefficients = logits.new_tensor([1 - float(weights.sum()), *weights.tolist()])
        z = (coefficients[:, None] * logits).sum(1)
        if self.candidates == 1:
            return z
        positive = [1 + i for i, (_, weight) in enumerate(self.principles) if weight > 0] or [0]
        keep = nucleus(logits[:, positive[0]], self.candidates)
        for branch in positive[1:]:
            keep |= nucleus(logits[:, branch], self.candidates)
        return restrict(z, keep)
