"""Continual learning in numbers: functions of R, numpy only.

R[i, j] is the score on task j after training task i; tasks count from 0 here and from 1 in the
formulas, T is the last. A score may be in any unit; each number below has the same one.

    average accuracy    mean_j R[T, j]
    learning accuracy   mean_j R[j, j]
    backward transfer   mean_{j<T} (R[T, j] - R[j, j])          below 0: earlier tasks got worse
    forgetting          mean_{j<T} (max_l R[l, j] - R[T, j])    at least 0
    forward transfer    mean_{j>1} (R[j-1, j] - b[j])           b: the model before any training

Papers: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017
(average accuracy, the two transfers); Chaudhry et al., "Riemannian Walk for Incremental Learning",
ECCV 2018 (forgetting).

The maximum in forgetting goes over every row of the column, those before task j was trained too,
where they were measured. Chaudhry et al. leave the last row out, which lets forgetting fall below
0 where the last row is the best; here it is 0 then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trueline.errors import ConfigError, DataError
from trueline.evals.statistics import Estimate, standard_error


def average_accuracy(R: ArrayLike) -> float:
    """Return the mean score over all tasks after the last one.

    R may have fewer rows than tasks: joint training has one row for all of them.
    """
    matrix = _matrix(R)
    _need(matrix, [(len(matrix) - 1, j) for j in range(matrix.shape[1])])
    return float(matrix[-1].mean())


def learning_accuracy(R: ArrayLike) -> float:
    """Return the mean score on each task right after it was trained: plasticity."""
    matrix = _square(R)
    _need(matrix, [(j, j) for j in range(len(matrix))])
    return float(np.diag(matrix).mean())


def backward_transfer(R: ArrayLike) -> float:
    """Return how much later training changed the earlier tasks; nan for a single task."""
    matrix = _square(R)
    last = len(matrix) - 1
    _need(matrix, [(i, j) for j in range(last) for i in (j, last)])
    return float(np.mean([matrix[last, j] - matrix[j, j] for j in range(last)])) if last else np.nan


def forgetting(R: ArrayLike) -> float:
    """Return how far the earlier tasks fell from their best; nan for a single task.

    Scores above the diagonal may be nan (not measured); they are passed over.
    """
    matrix = _square(R)
    last = len(matrix) - 1
    _need(matrix, [(i, j) for j in range(last) for i in range(j, last + 1)])
    if not last:
        return math.nan
    # max_l R[l, j] - R[T, j]
    return float(np.mean(np.nanmax(matrix[:, :last], axis=0) - matrix[last, :last]))


def forward_transfer(R: ArrayLike, untouched: ArrayLike) -> float:
    """Return how much earlier tasks helped a task before its own training; nan for a single task.

    Args:
        R: Square, the entries right above the diagonal measured.
        untouched: The scores of the model before any training, one a task.
    """
    matrix = _square(R)
    before = np.asarray(untouched, dtype=np.float64)
    if before.shape != (len(matrix),):
        raise DataError(
            f"`untouched` must have a score for each of {len(matrix)} tasks, got shape "
            f"{before.shape}."
        )
    if not np.isfinite(before[1:]).all():
        raise DataError("`untouched` has tasks without a score. Measure the model before training.")
    _need(matrix, [(j - 1, j) for j in range(1, len(matrix))])
    if len(matrix) == 1:
        return math.nan
    return float(np.mean([matrix[j - 1, j] - before[j] for j in range(1, len(matrix))]))


def trained(R: ArrayLike) -> NDArray[np.float64]:
    """Return the square part of R that belongs to the tasks trained so far, perhaps 0 by 0.

    Rows not yet measured are nan throughout and must be the last ones.
    """
    matrix = _matrix(R)
    there = np.asarray(np.isfinite(matrix).any(axis=1))
    t = int(there.sum())
    if not there[:t].all():
        raise DataError(f"R has no scores in row {int(np.argmin(there))}, but has some below it.")
    return matrix[:t, :t]


def summary(R: ArrayLike, untouched: ArrayLike | None = None) -> dict[str, float]:
    """Return every measure of R by name.

    Joint training (one row) has an average accuracy only; there is forward transfer if `untouched`
    is given and the tasks were measured before their own training.
    """
    matrix = _matrix(R)
    measures: dict[str, Callable[[], float]] = {"average_accuracy": lambda: average_accuracy(R)}
    if matrix.shape[0] == matrix.shape[1]:
        measures |= {
            "learning_accuracy": lambda: learning_accuracy(R),
            "backward_transfer": lambda: backward_transfer(R),
            "forgetting": lambda: forgetting(R),
        }
        above = all(np.isfinite(matrix[j - 1, j]) for j in range(1, len(matrix)))
        if untouched is not None and above:
            measures["forward_transfer"] = lambda: forward_transfer(R, untouched)
    return {name: measure() for name, measure in measures.items()}


def over_seeds(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return the mean of one measure over runs, its standard error and Student's t interval.

    Runs may differ in seed, in order, or in both; `low` and `high` are nan for a single run.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"`confidence` must be in (0, 1), got {confidence!r}.")
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array):
        raise DataError("There is nothing to average: no runs.")
    if not np.isfinite(array).all():
        raise DataError(f"A measure over runs has gaps: {array.tolist()}.")
    centre, error, n = float(array.mean()), standard_error(array), len(array)
    half = student_quantile((1 + confidence) / 2, n - 1) * error if n > 1 else math.nan
    return Estimate(centre, n, centre - half, centre + half, error)


def mean_matrix(matrices: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Return the mean of several R of one shape; entries that one of them lacks are nan."""
    arrays = [_matrix(R) for R in matrices]
    if not arrays or len({a.shape for a in arrays}) > 1:
        raise DataError(f"R must all have one shape, got {[a.shape for a in arrays]}.")
    return np.mean(arrays, axis=0)


def student_quantile(p: float, degrees: int) -> float:
    """Return the p-quantile of Student's t with a whole number of degrees of freedom, p > 1/2.

    By bisection on the closed form of P(|t| < x), Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    low, high = 0.0, 1.0
    while _student_inside(high, degrees) < 2 * p - 1:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if _student_inside(middle, degrees) < 2 * p - 1:
            low = middle
        else:
            high = middle
    return high


def _student_inside(x: float, degrees: int) -> float:
    """Return P(|t| < x)."""
    angle = math.atan(x / math.sqrt(degrees))
    cos, sin = math.cos(angle), math.sin(angle)
    odd = degrees % 2
    term = total = (cos if degrees > 1 else 0.0) if odd else 1.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sin * total) if odd else sin * total


def _matrix(R: ArrayLike) -> NDArray[np.float64]:
    matrix = np.asarray(R, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise DataError(f"R must have a row a trained task, a column a task, got {matrix.shape}.")
    if np.isinf(matrix).any():
        raise DataError("R has infinite scores.")
    return matrix


def _square(R: ArrayLike) -> NDArray[np.float64]:
    matrix = _matrix(R)
    if matrix.shape[0] != matrix.shape[1]:
        raise DataError(
            f"This measure needs a row for each task, got {matrix.shape[0]} rows for "
            f"{matrix.shape[1]} tasks. For a stream that has not ended take `trained(R)`."
        )
    return matrix


def _need(matrix: NDArray[np.float64], places: Sequence[tuple[int, int]]) -> None:
    for i, j in places:
        if np.isnan(matrix[i, j]):
            raise DataError(
                f"R[{i}, {j}] is not measured (nan). For a stream that has not ended take "
                "`trained(R)`."
            )
