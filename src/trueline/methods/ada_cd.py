"""AdaCD: contrast with a prompt that asks to be refused, its sign chosen at each step.

Paper: Qi et al., "Please refuse to answer me! Mitigating Over-Refusal in Large Language Models via
Adaptive Contrastive Decoding", ACL 2026, arXiv 2604.17132.

The refusing prompt shows which tokens mean refusal. Where the plain model agrees with it, the
refusal is real and is strengthened; elsewhere it is taken away.

    agreement = 1 / rank of argmax z_p among z_0          agree = agreement >= threshold
    confident = max softmax(z_0) >= threshold * max softmax(z_p)                          [code]
    z* = z_p + ratio (z_p - z_0)   if agree and confident,   else   z_p - ratio (z_p - z_0)
    candidates: softmax(z_0) >= plausibility * max softmax(z_0)

    here           authors' code
    z_p, z_0       with the refusing prompt, without it
    ratio          `ratio`, 4.5            threshold      `lmd`, 0.9
    plausibility   `beta`, 0.01            first_tokens   `step`, 10

After `first_tokens` tokens the plain branch goes on alone.

Differs from the paper: read from the authors' code; the text may say more.
Differs from the authors' code: sampling is possible; equal logits share the better rank; the
    contrast is taken in float32, there in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trueline.errors import check_number, check_text
from trueline.methods._ops import STRONGEST, extrapolate, plausible, restrict, with_system
from trueline.types import Message

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class AdaCD:
    """Strengthen real refusals and take others away, in the first tokens only.

    >>> AdaCD()
    """

    name: ClassVar[str] = "ada-cd"
    paper: ClassVar[str] = "Qi et al., ACL 2026, arXiv 2604.17132"
    goal: ClassVar[str] = "refusal"
    rest_branch: ClassVar[int] = 1
    base_branches: ClassVar[tuple[int, ...]] = ()

    ratio: float = 4.5
    """Strength of the contrast, either way."""
    threshold: float = 0.9
    """Agreement and confidence needed to count a refusal as real; in (0, 1]."""
    plausibility: float = 0.01
    """Keep tokens at least this likely, relative to the likeliest, in the plain branch; (0, 1]."""
    first_tokens: int | None = 10
    """Contrast only the first so many tokens, then go on with the plain prompt alone."""
    refusing_prompt: str = "Please refuse to answer me!"
    """The system text that asks for a refusal."""

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, low=-STRONGEST, high=STRONGEST)
        check_number("threshold", self.threshold, low=0, high=1, low_open=True)
        check_number("plausibility", self.plausibility, low=0, high=1, low_open=True)
        if self.first_tokens is not None:
            check_number("first_tokens", self.first_tokens, low=1, whole=True)
        check_text("refusing_prompt", self.refusing_prompt, "Leave it out for the paper's own.")

    def prompts(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Return the prompt that asks for a refusal, and the prompt as it is."""
        return [with_system(messages, self.refusing_prompt), list(messages)]

    def combine(self, logits: Float[Tensor, "batch 2 vocab"]) -> Float[Tensor, "batch vocab"]:
        """Return the contrasted logits, minus infinity for tokens the plain branch finds absurd."""
        z_p, z_0 = logits.unbind(1)
        top = z_p.argmax(-1, keepdim=True)
        rank = (z_0 > z_0.gather(-1, top)).sum(-1) + 1
        # max softmax(z) = exp(max z - logsumexp z)
        confidence_0, confidence_p = ((z.amax(-1) - z.logsumexp(-1)).exp() for z in (z_0, z_p))
        real = (1 / rank >= self.threshold) & (confidence_0 >= self.threshold * confidence_p)
        z = extrapolate(z_p, z_0, -self.ratio)
        if real.any():
            z[real] = extrapolate(z_p[real], z_0[real], self.ratio)
        return restrict(z, plausible(z_0, self.plausibility))
