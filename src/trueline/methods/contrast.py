"""Contrast: classifier-free guidance between two prompts, or between a tuned model and its base.

Paper: Sanchez et al., "Stay on topic with Classifier-Free Guidance", ICML 2024, arXiv 2306.17806,
eq. 7 (negative prompts: sec. 3.4). Tuned against base: Liu et al., "Tuning Language Models by
Proxy", COLM 2024, arXiv 2401.08565, and Mitchell et al., "An Emulator for Fine-Tuning", ICLR 2024,
arXiv 2310.12962, here with one set of weights and its adapter off.

    z* = z_n + guidance (z_p - z_n)

    here          paper
    guidance      gamma
    z_p, z_n      conditional (positive), unconditional (negative)

Differs from the paper: a chat has no unconditional prompt, so the second branch is the same chat
    with the `negative` system text, none, or the adapter off.
Differs from the authors' code: `guidance_scale` of transformers mixes log-probabilities; softmax of
    both is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trueline.errors import ConfigError, check_flag, check_number, check_text
from trueline.methods._ops import STRONGEST, extrapolate, with_system
from trueline.types import Message

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Contrast:
    """Guide decoding from one prompt and away from another.

    >>> Contrast(principle="Be brief.", negative="Ramble.", guidance=1.5)
    >>> Contrast(base=True, guidance=2)   # exaggerate what the adapter learned
    """

    name: ClassVar[str] = "contrast"
    paper: ClassVar[str] = "Sanchez et al., ICML 2024, arXiv 2306.17806"
    rest_branch: ClassVar[int] = 0
    first_tokens: ClassVar[int | None] = None

    guidance: float = 1.5
    """0 returns the second branch, 1 the first, above 1 extrapolates away from the second."""
    principle: str | None = None
    """System text of the first branch."""
    negative: str | None = None
    """System text of the second branch, to move away from."""
    base: bool = False
    """Run the second branch with the model's adapter off."""

    def __post_init__(self) -> None:
        check_number("guidance", self.guidance, low=-STRONGEST, high=STRONGEST)
        check_flag("base", self.base)
        for name in ("principle", "negative"):
            if getattr(self, name) is not None:
                check_text(name, getattr(self, name), "Give it some text or leave it out.")
        if not (self.base or self.principle or self.negative):
            raise ConfigError("The two branches are equal. Give `principle`, `negative` or `base`.")

    @property
    def base_branches(self) -> tuple[int, ...]:
        """The second branch, if `base`."""
        return (1,) if self.base else ()

    def prompts(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Return the positive and the negative prompt."""
        if self.base and not self.negative:
            return [with_system(messages, self.principle)] * 2
        return [with_system(messages, self.principle), with_system(messages, self.negative)]

    def combine(self, logits: Float[Tensor, "batch 2 vocab"]) -> Float[Tensor, "batch vocab"]:
        """Return the guided logits."""
        z_p, z_n = logits.unbind(1)
        # z* = z_n + guidance (z_p - z_n) = z_p + (guidance - 1)(z_p - z_n)
        return extrapolate(z_p, z_n, self.guidance - 1)
