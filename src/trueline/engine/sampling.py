"""Sampling: from combined logits to one token a request."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import torch

from trueline.methods._ops import nucleus
from trueline.types import SamplingParams

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def uniforms(seed: int, count: int) -> Tensor:
    """Return the `count` draws in [0, 1) that a request with this seed uses, one a token.

    They depend on the seed and the position alone: the same text whatever the batch. All bits of a
    seed count, and its sign; torch's own generator knows 32 and serves the seeds that fit in them.
    """
    if 0 <= seed < 1 << 32:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(count, generator=generator, dtype=torch.float64)
    # Seeded with a text, Python's generator takes a hash of it for its whole state.
    wide = random.Random(str(seed))
    return torch.tensor([wide.random() for _ in range(count)], dtype=torch.float64)


def penalise_repetition(
    logits: Float[Tensor, "batch vocab"], seen: list[list[int]], penalty: float
) -> Float[Tensor, "batch vocab"]:
    """Divide positive and multiply negative logits of `seen` tokens by `penalty`.

    Source: Keskar et al., "CTRL", 2019, arXiv 1909.05858, in the signed form of transformers.
    """
    for row, tokens in enumerate(seen):
        index = torch.tensor(tokens, device=logits.device)
        score = logits[row, index]
        logits[row, index] = torch.where(score > 0, score / penalty, score * penalty)
    return logits


def sample(
    logits: Float[Tensor, "batch vocab"],
    params: SamplingParams,
    draws: Float[Tensor, " batch"] | None,
) -> Int[Tensor, " batch"]:
    """Return one token a row: the most likely one, or the one that `draws` picks.

    Filters act in the order of transformers: top-k, top-p, min-p, each on what the last one left.
    The draw inverts the cumulative distribution, so that one number decides one token.
    """
    if params.greedy or draws is None:
        return logits.argmax(-1)
    if 0 < params.top_k < logits.shape[-1]:
        lowest = logits.topk(params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if params.top_p < 1:
        logits = logits.masked_fill(~nucleus(logits, params.top_p), -math.inf)
    if params.min_p > 0:
        floor = logits.amax(-1, keepdim=True) + math.log(params.min_p)
        logits = logits.masked_fill(logits < floor, -math.inf)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    mass = logits.softmax(-1, dtype=wide).cumsum(-1)
    target = draws.to(mass)[:, None] * mass[:, -1:]
    token = torch.searchsorted(mass, target, right=True)[:, 0]
    # A target rounded up to the whole mass falls behind the last token that has any.
    last = logits.shape[-1] - 1 - (logits > -math.inf).flip(-1).int().argmax(-1)
    return torch.minimum(token, last)
