"""What several methods share: the affine contrast, candidate masks, merging a system text.

Written with tensor methods alone, so that the table of methods can be read without loading torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trueline.types import Message

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


STRONGEST = 1e6
"""Larger weights of a contrast leave the range of float32 logits."""


def with_system(messages: Sequence[Message], text: str | None) -> list[Message]:
    """Return `messages` with `text` added to the caller's system message, after a blank line."""
    messages = list(messages)
    if not text:
        return messages
    if messages and messages[0]["role"] == "system":
        own, messages = messages[0]["content"], messages[1:]
        text = f"{own}\n\n{text}" if own else text
    return [{"role": "system", "content": text}, *messages]


def extrapolate(
    z_p: Float[Tensor, "batch vocab"], z_0: Float[Tensor, "batch vocab"], k: float
) -> Float[Tensor, "batch vocab"]:
    """Return z_p + k (z_p - z_0), bit-exact at k = 0 (z_p) and k = -1 (z_0)."""
    # (1 + k) z_p - k z_0
    return z_p.mul(1 + k).sub_(z_0, alpha=k)


def plausible(logits: Float[Tensor, "batch vocab"], beta: float) -> Bool[Tensor, "batch vocab"]:
    """Return the tokens whose probability is at least `beta` times the largest.

    Source: Li et al., "Contrastive Decoding", ACL 2023, arXiv 2210.15097, eq. 3.
    """
    # p_i >= beta max p   <=>   z_i >= max z + log beta
    return logits >= logits.amax(-1, keepdim=True) + math.log(beta)


def nucleus(logits: Float[Tensor, "batch vocab"], top_p: float) -> Bool[Tensor, "batch vocab"]:
    """Return the top-p set of softmax(logits): a token is out when the mass before it is >= top_p.

    Exact, without sorting the vocabulary: first among the 256 likeliest; where they do not reach
    top_p, among all but the tokens below (1 - top_p) / V, which cannot hold 1 - top_p together.
    """
    probs = logits.softmax(-1)
    vocab = probs.shape[-1]
    top, index = probs.topk(min(256, vocab), dim=-1)
    if (top.sum(-1) < top_p).any():
        count = int((probs > (1 - top_p) / vocab).sum(-1).max())
        top, index = probs.topk(count, dim=-1)
    before = top.cumsum(-1) - top
    before[..., 0] = 0
    return (probs < 0).scatter_(-1, index, before < top_p)


def restrict(
    logits: Float[Tensor, "batch vocab"], keep: Bool[Tensor, "batch vocab"]
) -> Float[Tensor, "batch vocab"]:
    """Return `logits` with minus infinity outside `keep`."""
    return logits.masked_fill_(~keep, -math.inf)
