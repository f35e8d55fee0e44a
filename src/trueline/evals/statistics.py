"""Statistics: rates with intervals, paired tests, agreement. Functions of arrays, numpy only.

wilson      Wilson, "Probable inference, the law of succession, and statistical inference",
            JASA 1927
bootstrap   Efron, "Bootstrap methods: another look at the jackknife", Ann. Statist. 1979,
            percentile form
McNemar     McNemar, Psychometrika 1947, in the exact (binomial) form
kappa       Cohen, "A coefficient of agreement for nominal scales", 1960
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trueline.errors import ConfigError, DataError, check_number

BLOCK = 1 << 22
"""Resampled numbers held in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty: `low` to `high` is a confidence interval."""

    value: float
    n: int
    low: float
    high: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] n={self.n}"


@dataclass(frozen=True)
class Difference:
    """How two methods differ on the same prompts: `value` is the mean of first minus second."""

    value: float
    n: int
    low: float
    high: float
    p_value: float
    """Two-sided; small means that chance alone explains the difference badly."""


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson interval of a proportion; (0, 1) for n = 0.

    Unlike the plus-minus form it stays inside [0, 1] and has a width at 0 and 1.

    Raises:
        ConfigError: `confidence` is not in (0, 1), or not 0 <= successes <= n.
    """
    _check_confidence(confidence)
    check_number("n", n, low=0, whole=True)
    check_number("successes", successes, low=0, high=max(n, 0), whole=True)
    if n == 0:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), successes / n
    # (p + z^2/2n  +-  z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    centre, scale = p + z * z / (2 * n), 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def rate(flags: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return the share of true flags with its Wilson interval; `value` is nan for no flags."""
    values = np.asarray(flags, dtype=bool).ravel()
    n, successes = len(values), int(values.sum())
    low, high = wilson(successes, n, confidence)
    p = successes / n if n else math.nan
    return Estimate(p, n, low, high, math.sqrt(p * (1 - p) / n) if n else math.nan)


def mean(values: ArrayLike, *, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Return the mean of numbers with its bootstrap interval."""
    array = _numbers(values)
    low, high = bootstrap_interval(array, confidence=confidence, seed=seed)
    return Estimate(float(array.mean()), len(array), low, high, standard_error(array))


def perplexity(
    pairs: Sequence[tuple[float, int]], *, samples: int = 2000, seed: int = 0
) -> Estimate:
    """Return exp(sum of -log p / tokens) of texts, with its bootstrap interval over texts.

    Args:
        pairs: (sum of -log p, tokens) of each text, at least one with a token.
        samples: Resamples.
        seed: Of the resamples.
    """
    losses, tokens = np.array([p for p in pairs if p[1]], dtype=np.float64).T
    draws = np.random.default_rng(seed).integers(len(losses), size=(samples, len(losses)))
    values = np.exp(np.minimum(losses[draws].sum(1) / tokens[draws].sum(1), 700))
    low, high = np.quantile(values, [0.025, 0.975])
    value = math.exp(min(losses.sum() / tokens.sum(), 700))
    return Estimate(value, len(losses), float(low), float(high), float(values.std(ddof=1)))


def standard_error(values: ArrayLike) -> float:
    """Return the standard error of the mean, s / sqrt(n) with n - 1 in s; nan below two values."""
    array = _numbers(values)
    if len(array) < 2:
        return math.nan
    return float(array.std(ddof=1) / math.sqrt(len(array)))


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., NDArray[np.float64]] = np.mean,
    *,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `statistic`.

    Args:
        values: One number a prompt, at least one.
        statistic: A numpy reduction that takes `axis`, such as `np.mean` or `np.median`.
        samples: Resamples; the same seed gives the same interval.
        confidence: In (0, 1).
        seed: Of the resampling.
    """
    _check_confidence(confidence)
    check_number("samples", samples, low=1, whole=True)
    estimates = _resampled(_numbers(values), statistic, samples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return float(low), float(high)


def _resampled(
    array: NDArray[np.float64],
    statistic: Callable[..., NDArray[np.float64]],
    samples: int,
    seed: int,
) -> NDArray[np.float64]:
    """Return `statistic` of `samples` resamples, blockwise so that memory stays bounded."""
    generator, n = np.random.default_rng(seed), len(array)
    block = max(1, BLOCK // n)
    parts = []
    for start in range(0, samples, block):
        index = generator.integers(n, size=(min(block, samples - start), n))
        parts.append(statistic(array[index], axis=1))
    return np.concatenate(parts)


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Return the exact two-sided p-value that two methods have the same rate on the same prompts.

    Only prompts on which they differ count: under no difference each falls either way like a coin.
    1.0 when they never differ.
    """
    a, b = _paired(first, second, bool)
    only_first, only_second = int((a & ~b).sum()), int((~a & b).sum())
    n, fewer = only_first + only_second, min(only_first, only_second)
    # p = 2 sum_{i <= fewer} C(n, i) / 2^n, in whole numbers
    total, term = 0, 1
    for i in range(fewer + 1):
        total += term
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Return the mean difference of two methods on the same prompts, by paired bootstrap.

    Prompts are resampled, so what makes a prompt hard for both cancels. The p-value is twice the
    smaller share of resamples on either side of 0 (those at 0 count on both), at least
    1 / (samples + 1).
    """
    _check_confidence(confidence)
    check_number("samples", samples, low=1, whole=True)
    a, b = _paired(first, second, np.float64)
    estimates = _resampled(a - b, np.mean, samples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail])
    one_side = 1 + min(int((estimates <= 0).sum()), int((estimates >= 0).sum()))
    p_value = min(1.0, 2 * one_side / (samples + 1))
    return Difference(float((a - b).mean()), len(a), float(low), float(high), p_value)


def accuracy(predictions: Sequence[Hashable], labels: Sequence[Hashable]) -> Estimate:
    """Return the share of predictions that equal their labels, with its Wilson interval."""
    _check_lengths(predictions, labels)
    return rate([p == label for p, label in zip(predictions, labels, strict=True)])


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Return Cohen's kappa of two raters: agreement beyond what their habits give by chance.

    1 is full agreement, 0 what chance gives, below 0 worse than chance. nan where chance alone
    gives full agreement (both raters use one label only).
    """
    _check_lengths(first, second)
    n = len(first)
    if n == 0:
        return math.nan
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    # p_e = sum_k P(first says k) P(second says k);   kappa = (p_o - p_e) / (1 - p_e)
    chance = sum(first.count(k) * second.count(k) for k in {*first, *second}) / (n * n)
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def confusion(
    predictions: Sequence[Hashable],
    labels: Sequence[Hashable],
    rows: Sequence[Hashable],
    columns: Sequence[Hashable],
) -> list[list[int]]:
    """Return counts with a row for each value of `labels` and a column for each prediction."""
    _check_lengths(predictions, labels)
    pairs = list(zip(labels, predictions, strict=True))
    return [[pairs.count((row, column)) for column in columns] for row in rows]


def _numbers(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array):
        raise DataError("There is nothing to average: no values.")
    return array


def _paired(first: ArrayLike, second: ArrayLike, dtype: type) -> tuple[NDArray, NDArray]:
    a: NDArray = np.asarray(first, dtype=dtype).ravel()
    b: NDArray = np.asarray(second, dtype=dtype).ravel()
    _check_lengths(a, b)
    if not len(a):
        raise DataError("There is nothing to compare: no values.")
    return a, b


def _check_lengths(first: Sequence | NDArray, second: Sequence | NDArray) -> None:
    if len(first) != len(second):
        raise DataError(
            f"Paired values must be equally many, got {len(first)} and {len(second)}. "
            "Give both methods the same prompts."
        )


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"`confidence` must be in (0, 1), got {confidence!r}.")
