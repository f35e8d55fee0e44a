"""Quality: length, repetition and perplexity, measured beside every alignment metric.

A method that is too strong breaks the text before it breaks the metric: texts repeat themselves,
and the untouched model finds them unlikely.

    distinct-n    Li et al., NAACL 2016, arXiv 1510.03055: different n-grams over all n-grams
    repetition    1 - distinct-4 of a single text, as rep-4 of Welleck et al., ICLR 2020,
                  arXiv 1908.04319
    perplexity    exp of the mean negative log-probability of a token of the completion
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trueline.errors import DataError
from trueline.evals.likelihood import response_logprobs
from trueline.evals.statistics import Estimate, mean
from trueline.models.prompts import encode
from trueline.types import Message, check_messages

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Return the n-grams of a sequence, in order; none if it is shorter than n."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(texts: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Return distinct-n of a set of texts: the share of different n-grams; nan for none."""
    grams = [gram for tokens in texts for gram in ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition_rate(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Return the share of a text's n-grams that occurred in it before: 0 none, near 1 a loop.

    0 for texts shorter than n.
    """
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def negative_logprobs(
    model: LanguageModel,
    prompts: Sequence[str | Sequence[Message]],
    completions: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> list[NDArray[np.float64]]:
    """Return -log p of every token of each completion after its plain prompt, under the base model.

    `completions` are token ids, as in `Completion.token_ids`. The adapter is off if there is one.
    Empty completions give empty arrays.
    """
    if len(prompts) != len(completions):
        raise DataError(f"Got {len(completions)} completions for {len(prompts)} prompts.")
    used = [i for i, ids in enumerate(completions) if len(ids)]
    found = response_logprobs(
        model,
        [encode(model, check_messages(prompts[i])) for i in used],
        [completions[i] for i in used],
        adapters=[not model.has_adapter] * len(used),
        batch_size=batch_size,
    )
    by_row = dict(zip(used, found, strict=True))
    return [-by_row[i] if i in by_row else np.zeros(0) for i in range(len(completions))]


def perplexity(
    model: LanguageModel,
    prompts: Sequence[str | Sequence[Message]],
    completions: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> NDArray[np.float64]:
    """Return each completion's perplexity under the base model; nan for empty completions."""
    surprises = negative_logprobs(model, prompts, completions, batch_size=batch_size)
    return np.array([np.exp(s.mean()) if len(s) else np.nan for s in surprises])


@dataclass(frozen=True)
class Quality:
    """What a method did to the texts themselves."""

    length: Estimate
    """Tokens a completion, end of text included."""
    repetition: Estimate
    """Repetition rate of 4-grams, mean over completions."""
    distinct_1: float
    distinct_2: float
    perplexity: float | None = None
    """exp of the mean over all tokens of all completions; None if not asked for."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON."""
        return asdict(self)


def text_quality(
    completions: Sequence[Sequence[int]],
    *,
    model: LanguageModel | None = None,
    prompts: Sequence[str | Sequence[Message]] | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Quality:
    """Return length, repetition and, given the model and the plain prompts, perplexity.

    >>> text_quality([c.token_ids for c in completions], model=model, prompts=prompts)
    """
    overall = None
    if model is not None and prompts is not None:
        surprises = negative_logprobs(model, prompts, completions, batch_size=batch_size)
        tokens = np.concatenate([*surprises, np.zeros(0)])
        overall = float(np.exp(tokens.mean())) if len(tokens) else float("nan")
    return Quality(
        length=mean([len(ids) for ids in completions], seed=seed),
        repetition=mean([repetition_rate(ids) for ids in completions], seed=seed),
        distinct_1=distinct(completions, 1),
        distinct_2=distinct(completions, 2),
        perplexity=overall,
    )
