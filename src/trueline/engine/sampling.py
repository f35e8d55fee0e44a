"""Sampling: from the branches' logits to one token a completion."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trueline.methods._ops import nucleus
from trueline.types import Method, SamplingParams, combine_at

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
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


@dataclass(frozen=True)
class Choice:
    """The next token of several completions that are chosen in the same way."""

    tokens: Int[Tensor, " batch"]
    combined: Float[Tensor, "batch vocab"]
    """Logits that the tokens were drawn from, before top-k, top-p and min-p."""
    branches: Float[Tensor, "batch branch vocab"]
    """Logits of the branches after temperature."""

    @property
    def finite(self) -> Bool[Tensor, " batch"]:
        """Whether each token has a finite logit."""
        return self.combined.gather(-1, self.tokens[:, None])[:, 0].isfinite()

    def logprobs(self) -> tuple[list[float], list[float]]:
        """Return the tokens' log-probabilities, combined and under the first branch alone."""
        index = self.tokens[:, None]
        return tuple(  # type: ignore[return-value]
            (z.gather(-1, index)[:, 0] - z.logsumexp(-1)).tolist()
            for z in (self.combined, self.branches[:, 0])
        )


def choose_tokens(
    method: Method,
    params: SamplingParams,
    logits: Float[Tensor, "batch branch vocab"],
    seen: Sequence[Iterable[int]],
    draws: Float[Tensor, " batch"] | None,
    *,
    contrasted: bool,
) -> Choice:
    """Choose a token for each completion from the logits of its branches.

    Args:
        method: Combines the branches.
        params: How a token is chosen.
        logits: Of the branches that still run.
        seen: The tokens that a repetition penalty acts on, for each completion.
        draws: A number in [0, 1) for each; None where decoding is greedy.
        contrasted: Whether all branches of the method still run, or its rest branch alone.
    """
    temperature = 1.0 if params.greedy else params.temperature
    z = logits if temperature == 1 else logits / temperature
    combined = combine_at(method, z, temperature) if contrasted else z[:, 0]
    if params.repetition_penalty != 1:
        ids = [sorted(tokens) for tokens in seen]
        combined = penalise_repetition(combined.clone(), ids, params.repetition_penalty)
    return Choice(sample(combined, params, draws), combined, z)
