"""Self-CD: less over-refusal, by contrast with the model's own safety-prompted self.

Paper: Shi et al., "Navigating the OverKill in Large Language Models", ACL 2024, arXiv 2401.17633.

A safety prompt makes the model attend to harmful words, also in harmless questions. What it adds to
the logits is measured and taken away again, `alpha` times.

    z* = z_p - alpha (z_p - z_0)                                                    [paper, code]

    here          paper / authors' code
    z_p, z_0      with the safety prompt, without it
    alpha         alpha, 2.5

0 is the safety-prompted model, 1 the plain one, above 1 extrapolates away from the safety prompt.
It is Linear Alignment with ratio = -alpha and no candidates mask.

Differs from the paper: nothing known. `plausibility` and `first_tokens` are options of later work
    (see `ada_cd`), off by default.
Differs from the authors' code: both branches keep a cache; the safety prompt is an option and a
    system message, where the code puts its text into the user's turn; answers there have up to 200
    tokens, here `max_new_tokens` (128 by default).
Known weakness: a large alpha also lowers refusals of truly unsafe requests, and where the safety
    prompt takes refusals away, alpha adds them. `trueline eval refusal` puts it beside plain system
    texts, which can be better: look there before you use it.
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

SAFETY_PROMPT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe. Your answers must not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content."
)


@dataclass(frozen=True)
class SelfCD:
    """Take a safety prompt's over-refusal out of the decoding.

    >>> SelfCD(alpha=2.5)
    """

    name: ClassVar[str] = "self-cd"
    paper: ClassVar[str] = "Shi et al., ACL 2024, arXiv 2401.17633"
    goal: ClassVar[str] = "refusal"
    rest_branch: ClassVar[int] = 0
    base_branches: ClassVar[tuple[int, ...]] = ()

    alpha: float = 2.5
    """How much of the safety prompt's effect is taken away: 0 none, 1 all; refusals rise again
    above about 2.5 in the paper."""
    safety_prompt: str = SAFETY_PROMPT
    """The safety-emphasising system text of the first branch."""
    plausibility: float | None = None
    """Keep tokens at least this likely, relative to the likeliest, in the plain branch; (0, 1]."""
    first_tokens: int | None = None
    """Contrast only the first so many tokens, then go on with the safety prompt alone."""

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, low=-STRONGEST, high=STRONGEST)
        check_text("safety_prompt", self.safety_prompt, "Leave it out for the paper's kind.")
        if self.plausibility is not None:
            check_number("plausibility", self.plausibility, low=0, high=1, low_open=True)
        if self.first_tokens is not None:
            check_number("first_tokens", self.first_tokens, low=1, whole=True)

    def prompts(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Return the prompt with the safety text, and the prompt without it."""
        return [with_system(messages, self.safety_prompt), list(messages)]

    def combine(self, logits: Float[Tensor, "batch 2 vocab"]) -> Float[Tensor, "batch vocab"]:
        """Return the logits with the safety prompt's effect taken away `alpha` times."""
        z_p, z_0 = logits.unbind(1)
        # z* = z_p - alpha (z_p - z_0)
        z = extrapolate(z_p, z_0, -self.alpha)
        return z if self.plausibility is None else restrict(z, plausible(z_0, self.plausibility))
