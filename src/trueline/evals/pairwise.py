"""Pairwise: how often one set of responses beats another, by a judge that sees both.

Every pair is judged in both orders, since judges favour a position (Zheng et al., NeurIPS 2023,
arXiv 2306.05685); a tie is half a win. Judges favour length too: `length_controlled` says what the
rate would be at equal length (Dubois et al., COLM 2024, arXiv 2404.04475).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trueline.errors import DataError, check_number
from trueline.evals.statistics import Estimate, mean

if TYPE_CHECKING:
    from trueline.evals.judges import PairwiseJudge


@dataclass(frozen=True)
class WinRate:
    """How often the first of two methods wins; a tie is half a win."""

    win_rate: Estimate
    length_controlled: Estimate | None
    """What the rate would be at equal length; None without lengths."""
    wins: int
    losses: int
    ties: int
    """Ties said by the judge, and verdicts that turned with the order."""
    inconsistent: int
    """Verdicts that turned with the order of the two responses: the judge's position bias."""
    unreadable: int
    """Pairs left out because an answer of the judge was unreadable."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON."""
        return asdict(self)


def compare(
    judge: PairwiseJudge,
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    criterion: str | None = None,
    lengths: tuple[ArrayLike, ArrayLike] | None = None,
) -> WinRate:
    """Return the win rate of `first` over `second`, every pair judged in both orders.

    `lengths` are tokens of the responses; by default their characters.
    """
    extra = () if criterion is None else (criterion,)
    forward = judge.pairwise(prompts, first, second, *extra)
    backward = judge.pairwise(prompts, second, first, *extra)
    a, b = lengths or ([len(t) for t in first], [len(t) for t in second])
    return win_rates(forward, backward, np.asarray(a, float) - np.asarray(b, float))


def win_rates(
    forward: Sequence[str | None],
    backward: Sequence[str | None],
    length_differences: ArrayLike | None = None,
) -> WinRate:
    """Return the win rate from verdicts in both orders.

    Args:
        forward: "A", "B", "tie" or None, where the first method is A.
        backward: The same, where the first method is B.
        length_differences: Length of the first method's response minus the second's.
    """
    if len(forward) != len(backward):
        raise DataError(f"Got {len(forward)} and {len(backward)} verdicts of the two orders.")
    points = {"A": 1.0, "tie": 0.5, "B": 0.0}
    kept = [i for i in range(len(forward)) if forward[i] in points and backward[i] in points]
    if not kept:
        raise DataError("No pair has readable verdicts in both orders.")
    # half a point an order
    pairs = [(points[str(forward[i])], 1 - points[str(backward[i])]) for i in kept]
    outcomes = np.array([(x + y) / 2 for x, y in pairs])
    controlled = None
    if length_differences is not None:
        controlled = length_controlled(outcomes, np.asarray(length_differences, float)[kept])
    return WinRate(
        win_rate=mean(outcomes),
        length_controlled=controlled,
        wins=int((outcomes > 0.5).sum()),
        losses=int((outcomes < 0.5).sum()),
        ties=int((outcomes == 0.5).sum()),
        inconsistent=sum({x, y} == {0.0, 1.0} for x, y in pairs),
        unreadable=len(forward) - len(kept),
    )


def length_controlled(
    outcomes: ArrayLike,
    length_differences: ArrayLike,
    *,
    ridge: float = 0.01,
    samples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the win rate at equal length, by logistic regression on the length difference.

    Source: Dubois et al., COLM 2024, arXiv 2404.04475, eq. 1, here for one pair of methods:

        logit P(first wins) = theta + phi tanh(difference / std(difference))
        at equal length: sigmoid(theta)

    Differs from the paper: no term for the difficulty of each instruction (it is estimated there
    over many models); phi is fitted on this pair with a small ridge penalty (`ridge` phi^2 / 2 a
    pair) instead of cross-validated; the interval is a bootstrap over pairs.
    """
    check_number("ridge", ridge, low=0, low_open=True)
    y, d = np.asarray(outcomes, float).ravel(), np.asarray(length_differences, float).ravel()
    if len(y) != len(d) or not len(y):
        raise DataError(f"Got {len(d)} length differences for {len(y)} outcomes.")
    spread = d.std()
    x = np.tanh(d / spread) if spread > 0 else np.zeros_like(d)
    value = _fit(x, y, ridge)
    generator, estimates = np.random.default_rng(seed), []
    for _ in range(samples):
        index = generator.integers(len(y), size=len(y))
        estimates.append(_fit(x[index], y[index], ridge))
    low, high = np.quantile(estimates, [0.025, 0.975])
    error = float(np.std(estimates, ddof=1)) if samples > 1 else math.nan
    return Estimate(value, len(y), float(low), float(high), error)


def _fit(x: NDArray[np.float64], y: NDArray[np.float64], ridge: float) -> float:
    """Return sigmoid(theta) of the regression of y in [0, 1] on x, by Newton's method.

    theta has a penalty of 1e-6, which keeps it finite where one method wins every pair.
    """
    features = np.stack([np.ones_like(x), x], axis=1)
    penalty = np.array([1e-6, ridge]) * len(y)
    weights = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (y - p) - penalty * weights
        curvature = (features * (p * (1 - p))[:, None]).T @ features + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        # Far steps overshoot where the curve is flat.
        weights += step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))
