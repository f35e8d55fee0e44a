"""A score of prompts, fitted, and the answers where it decides which of two texts gives them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def fitted_weights(
    odds: NDArray[np.float64], unsafe: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], float]:
    """Return the weights and the bias of a logistic score (Newton, a ridge of 1 on scaled odds)."""
    mean, scale = odds.mean(0), odds.std(0) + 1e-9
    x = np.concatenate([(odds - mean) / scale, np.ones((len(odds), 1))], 1)
    w, y = np.zeros(x.shape[1]), unsafe.astype(float)
    ridge = np.diag([1.0] * (x.shape[1] - 1) + [0.0])
    for _ in range(25):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge + 1e-9 * np.eye(len(w))
        w = w + np.linalg.solve(hessian, x.T @ (y - p) - ridge @ w)
    weights = w[:-1] / scale
    return weights, float(w[-1] - weights @ mean)


def fitted_score(
    odds: NDArray[np.float64], unsafe: NDArray[np.bool_], fit: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return the score of all prompts, fitted on some."""
    weights, bias = fitted_weights(odds[fit], unsafe[fit])
    score: NDArray[np.float64] = odds @ weights + bias
    return score


def form_features(texts: Sequence[str], words: int = 25) -> NDArray[np.float64]:
    """Return what a question looks like: its first word, log length, whether "?" ends it."""
    first = [text.split()[0].lower() for text in texts]
    known = [word for word, _ in Counter(first).most_common(words)]
    return np.array([
        [*(float(word == k) for k in known), math.log(len(text)), float(text.strip()[-1] == "?")]
        for word, text in zip(first, texts, strict=True)
    ])  # fmt: skip


def ranked(score: NDArray[np.float64], unsafe: NDArray[np.bool_], on: NDArray[np.bool_]) -> float:
    """Return the share of pairs in which the unsafe prompt has the higher score (the AUC)."""
    high, low = score[on & unsafe], score[on & ~unsafe]
    return float(((high[:, None] > low) + 0.5 * (high[:, None] == low)).mean())


def routes(
    flags: Mapping[str, list[float | None]], score: NDArray[np.float64], fit: NDArray[np.bool_]
) -> dict[str, list[float | None]]:
    """Return what is refused where the score decides which of two texts answers.

    The nine thresholds are quantiles of the score on the prompts that it was fitted on.
    """
    found = {}
    for low, high in itertools.permutations(flags, 2):
        for q in range(1, 10):
            above = score > np.quantile(score[fit], q / 10)
            mixed = [
                b if up else a for a, b, up in zip(flags[low], flags[high], above, strict=True)
            ]
            found[f"{low}, from quantile {q / 10:g} on {high}"] = mixed
    return found
