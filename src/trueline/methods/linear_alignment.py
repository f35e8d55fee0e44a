"""Linear Alignment: a closed-form policy step towards a principle, at every token.

Paper: Gao et al., "Linear Alignment: A Closed-form Solution for Aligning Human Preferences without
Tuning and Feedback", ICML 2024, arXiv 2401.11458.

Maximise Q(s, mu) over the output logits mu inside a norm ball around mu_0. To first order the
solution moves along g = dQ/dmu, and the paper estimates g by self-contrast: it is parallel to what
the principle prompt changes, d = z_p - z_0.                                              [paper]

    ratio form    z* = z_p + ratio (z_p - z_0)                                           [code]
    closed form   z* = z_0 + epsilon sign(g) |g|^(q-1) / ||g||_q^(q-1), 1/norm + 1/q = 1   [recon]
    gate          z_p + w (z* - z_p), w = [max p <= gate] (1 - max p)^damping             [ours]
    candidates    the top-p set of p = softmax(z_p / T); all other tokens are out        [code]

    here              paper / authors' code
    ratio             epsilon over the norm of g, plus the principle prompt itself (`ratio`)
    epsilon           radius of the ball
    norm              p of the ball's norm
    candidates        `top_p`, 0.8
    mask_temperature  T, there the sampling's `temperature`

To repeat its scripts: `mask_temperature=0.5` with greedy decoding, and `RELEASE_SYSTEM` as the
    caller's system message.

The gate is for "extrapolation cliffs" (arXiv 2605.08737): where the prompt alone is near-certain,
    a format or a name, going further breaks it.

Differs from the paper: its norm and estimator constants are not given, so `norm` is an option. g is
    taken with mean zero over the vocabulary, as any gradient through a softmax has; without that
    step the closed form would depend on an arbitrary constant in the logits. No gate there.
Differs from the authors' code: the principle joins the caller's own system message instead of a
    fixed helpful-assistant sentence. When no candidate has any mass, sampling in the code falls
    back to the principled branch and greedy decoding gives token 0; here masses are compared as
    logits and cannot vanish. Greedy decoding here sees the candidates at temperature 1, there at
    the scripts' 0.5. Its `demo.py` has no mask, and the `--topp` of its scripts is never read: the
    candidates are always 0.8. The personal-preference form here words question and principle
    otherwise, prefills no "Answer:", and asks for every user instead of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trueline.errors import check_number, check_text
from trueline.methods._ops import STRONGEST, extrapolate, nucleus, restrict, with_system
from trueline.types import COLDEST, Message

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

RELEASE_SYSTEM = "You are a helpful assistant."
"""The sentence that the authors' code keeps in both branches; this is the one for Qwen models."""
ROUNDING = 1e-4
"""The closed form has full length however small d is; below this d says nothing."""


@dataclass(frozen=True)
class LinearAlignment:
    """Follow a principle stated in words, with no training.

    >>> LinearAlignment(principle="Talk like a pirate.", ratio=2)
    >>> LinearAlignment(principle="Talk like a pirate.", epsilon=8.0, norm=2)
    """

    name: ClassVar[str] = "linear-alignment"
    paper: ClassVar[str] = "Gao et al., ICML 2024, arXiv 2401.11458"
    rest_branch: ClassVar[int] = 0
    base_branches: ClassVar[tuple[int, ...]] = ()
    first_tokens: ClassVar[int | None] = None

    principle: str
    """What the model is to follow; added to the system message of the first branch."""
    ratio: float = 2.0
    """Strength; 0 returns the principle-prompted model, -1 the plain one. The papers use 2 to 5."""
    candidates: float = 0.8
    """Mass of the candidates: tokens outside the smallest set of the principle-prompted branch that
    reaches it are out; in (0, 1], 1 keeps all tokens."""
    epsilon: float | None = None
    """Radius of the closed form, at least 0; when given it replaces `ratio`. 0 is the plain model
    on the candidates."""
    norm: float = 2.0
    """Norm of the closed form's ball: above 1, `inf` allowed."""
    gate: float = 1.0
    """Confidence of the principle-prompted branch, the probability of its likeliest token, above
    which its logits stay as they are; in [0, 1]. 1 is no gate, 0 the principle-prompted model."""
    damping: float = 0.0
    """Soft gate: the ratio is multiplied by (1 - confidence) to this power; at least 0. 0 is no
    gate, 1 the plain product."""
    mask_temperature: float | None = None
    """Temperature at which candidates and gates read the principle-prompted branch; by default that
    of the sampling, with which a low one leaves a single candidate, the prompt's own."""

    def __post_init__(self) -> None:
        check_text("principle", self.principle, "State in words what the model is to follow.")
        check_number("ratio", self.ratio, low=-STRONGEST, high=STRONGEST)
        check_number("candidates", self.candidates, low=0, high=1, low_open=True)
        if self.epsilon is not None:
            check_number("epsilon", self.epsilon, low=0, high=STRONGEST)
        check_number("norm", self.norm, low=1, low_open=True, infinite=True)
        check_number("gate", self.gate, low=0, high=1)
        check_number("damping", self.damping, low=0, high=STRONGEST)
        if self.mask_temperature is not None:
            check_number("mask_temperature", self.mask_temperature, low=COLDEST)

    def prompts(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Return the prompt with the principle, and the prompt without it."""
        return [with_system(messages, self.principle), list(messages)]

    def combine(self, logits: Float[Tensor, "batch 2 vocab"]) -> Float[Tensor, "batch vocab"]:
        """Return the logits of the aligned policy, minus infinity outside the candidates."""
        return self.combine_at(logits, 1.0)

    def combine_at(
        self, logits: Float[Tensor, "batch 2 vocab"], temperature: float
    ) -> Float[Tensor, "batch vocab"]:
        """Return the same of logits over a temperature: the ball's radius is divided by it too."""
        z_p, z_0 = logits.unbind(1)
        if self.epsilon is None:
            # z* = z_p + ratio (z_p - z_0)
            z = extrapolate(z_p, z_0, self.ratio)
        else:
            # (z_0 + epsilon step) / T, the step that of the logits themselves
            step = dual_direction((z_p - z_0) * temperature, self.norm)
            z = z_0 + self.epsilon / temperature * step
        share = self.openness(logits, temperature)
        if share is not None:
            # z_p + w (z* - z_p)
            z = z_p.lerp(z, share)
        if self.candidates == 1:
            return z
        return restrict(z, nucleus(self._seen(z_p, temperature), self.candidates))

    def openness(
        self, logits: Float[Tensor, "batch 2 vocab"], temperature: float = 1.0
    ) -> Float[Tensor, "batch 1"] | None:
        """Return the share of the step that the gates let through; None where both are off."""
        if self.gate == 1 and self.damping == 0:
            return None
        return openness(self._seen(logits[:, 0], temperature), self.gate, self.damping)

    def _seen(self, z_p: Float[Tensor, "batch vocab"], temperature: float) -> Tensor:
        """Return z_p / mask_temperature, of logits that are divided by temperature already."""
        if self.mask_temperature is None:
            return z_p
        return z_p * (temperature / self.mask_temperature)


def openness(
    logits: Float[Tensor, "batch vocab"], gate: float, damping: float
) -> Float[Tensor, "batch 1"]:
    """Return the share of the step that is taken, in [0, 1]: [c <= gate] (1 - c)^damping.

    c is the confidence, the probability of the likeliest token.
    """
    # log c = max z - log sum exp z
    confidence = (logits.amax(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)).exp()
    confidence = confidence.clamp(max=1)
    return (1 - confidence) ** damping * (confidence <= gate)


def dual_direction(d: Float[Tensor, "batch vocab"], norm: float) -> Float[Tensor, "batch vocab"]:
    """Return the step of unit `norm` that increases <d, step> most, for d with its mean removed.

    `norm` 2 is d / ||d||, `inf` is sign(d). Where d is nothing but rounding, the step is zero.
    """
    g = d - d.mean(-1, keepdim=True)
    top = g.abs().amax(-1, keepdim=True)
    g = (g / top).masked_fill(top < ROUNDING, 0)
    if math.isinf(norm):
        return g.sign()
    # sign(g) |g|^(q-1) / ||g||_q^(q-1) with q - 1 = 1 / (norm - 1), up to scale; then to unit norm
    step = g.sign() * g.abs() ** (1 / (norm - 1))
    return step / step.norm(p=norm, dim=-1, keepdim=True).clamp(min=1e-30)
