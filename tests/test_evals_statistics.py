"""Statistics against hand counts, brute force and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from trueline.errors import ConfigError, DataError
from trueline.evals.statistics import (
    accuracy,
    bootstrap_interval,
    cohen_kappa,
    confusion,
    mcnemar,
    mean,
    paired_difference,
    rate,
    standard_error,
    wilson,
)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (41, 250), (1, 1)])
def test_wilson_ends_solve_the_score_equation(k, n):
    """The ends are the p with |k/n - p| = z sqrt(p (1 - p) / n): found here by bisection."""
    z = 1.959963984540054

    def gap(p):
        return abs(k / n - p) - z * math.sqrt(p * (1 - p) / n)

    def root(inside, outside):
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if gap(middle) <= 0 else (inside, middle)
        return inside

    low, high = wilson(k, n)
    assert low == pytest.approx(root(k / n, 0.0) if k else 0.0, abs=1e-9)
    assert high == pytest.approx(root(k / n, 1.0) if k < n else 1.0, abs=1e-9)


def test_wilson_covers_the_truth_as_often_as_it_says():
    n, p = 40, 0.2
    covered = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if wilson(k, n, 0.9)[0] <= p <= wilson(k, n, 0.9)[1]
    )
    assert covered == pytest.approx(0.9, abs=0.04)


def test_wilson_edges():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(0, 5)[1] > 0.4
    with pytest.raises(ConfigError, match="confidence"):
        wilson(1, 2, 1.0)
    with pytest.raises(ConfigError, match="successes"):
        wilson(3, 2)


def test_rate():
    estimate = rate([True, False, False, True, True])
    assert (estimate.value, estimate.n) == (0.6, 5)
    assert (estimate.low, estimate.high) == wilson(3, 5)
    assert estimate.standard_error == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    assert math.isnan(rate([]).value)
    assert str(estimate).startswith("0.600 [")


def test_standard_error_by_hand():
    # mean 3, squared deviations 4 + 0 + 4 = 8, variance 4, s / sqrt(3)
    assert standard_error([1, 3, 5]) == pytest.approx(2 / math.sqrt(3))
    assert math.isnan(standard_error([1]))


def test_bootstrap_against_every_resample():
    """With three values all 27 resamples can be listed."""
    values = [0.0, 1.0, 5.0]
    means = [np.mean(r) for r in itertools.product(values, repeat=3)]
    low, high = bootstrap_interval(values, samples=200_000, confidence=0.8)
    assert low == pytest.approx(np.quantile(means, 0.1), abs=1e-9)
    assert high == pytest.approx(np.quantile(means, 0.9), abs=1e-9)


def test_bootstrap_is_seeded_blockwise_and_takes_a_statistic(monkeypatch):
    values = np.random.default_rng(1).normal(size=50)
    one = bootstrap_interval(values, seed=3)
    assert one == bootstrap_interval(values, seed=3)
    assert one != bootstrap_interval(values, seed=4)
    monkeypatch.setattr("trueline.evals.statistics.BLOCK", 100)
    assert bootstrap_interval(values, samples=500) == pytest.approx(one, abs=0.1)
    assert bootstrap_interval([1, 2, 2, 2, 9], np.median, samples=500)[0] >= 1
    assert bootstrap_interval([4, 4, 4]) == (4, 4)
    # For many values the interval is mean +- 1.96 standard errors.
    low, high = bootstrap_interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error(values), rel=0.06)


def test_mean():
    estimate = mean([1.0, 2.0, 6.0])
    assert estimate.value == 3
    assert estimate.low < 3 < estimate.high
    with pytest.raises(DataError, match="no values"):
        mean([])


def test_mcnemar_by_listing_every_flip():
    first = [1, 1, 1, 1, 0, 1, 0, 1, 0]
    second = [0, 0, 0, 0, 1, 1, 0, 0, 0]
    # 5 prompts only the first, 1 only the second: 6 coins, as extreme as 1 or 5 heads and more.
    heads = [sum(c) for c in itertools.product([0, 1], repeat=6)]
    expected = np.mean([min(h, 6 - h) <= 1 for h in heads])
    assert mcnemar(first, second) == pytest.approx(expected)
    assert mcnemar(second, first) == pytest.approx(expected)
    assert mcnemar(first, first) == 1.0
    assert mcnemar([1, 0], [0, 1]) == 1.0


def test_mcnemar_large():
    a = np.r_[np.ones(3000), np.zeros(2700)]
    p = mcnemar(a, 1 - a)
    z = 299 / math.sqrt(5700)  # one less: the continuity correction
    assert p == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.05)


def test_paired_difference():
    first, second = [1, 1, 0, 1, 1, 1, 0, 1], [0, 0, 0, 1, 0, 1, 0, 0]
    d = paired_difference(first, second, samples=4000)
    assert (d.value, d.n) == (0.5, 8)
    # Of 8 draws from four 1s and four 0s all are 0 with probability 2^-8.
    assert d.p_value == pytest.approx(2 / 2**8, abs=0.006)
    assert d.low < 0.5 < d.high
    turned = paired_difference(second, first, samples=4000)
    assert turned.value == -0.5
    assert turned.p_value == pytest.approx(d.p_value)
    assert (turned.low, turned.high) == pytest.approx((-d.high, -d.low))
    assert paired_difference([1, 0], [1, 0]).p_value == 1.0
    with pytest.raises(DataError, match="got 1 and 2"):
        paired_difference([1], [1, 2])


def test_cohen_kappa_by_hand():
    # 50 items, yes/yes 20, yes/no 5, no/yes 10, no/no 15: agreement 0.7, chance 0.5, kappa 0.4.
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa([0, 1], [0, 1]) == 1
    assert cohen_kappa([0, 1], [1, 0]) == -1
    assert math.isnan(cohen_kappa([0, 0], [0, 0]))


def test_accuracy_and_confusion():
    predictions, labels = list("abca"), list("abba")
    assert accuracy(predictions, labels).value == 0.75
    assert confusion(predictions, labels, "ab", "abc") == [[2, 0, 0], [0, 1, 1]]
