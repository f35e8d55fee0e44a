"""The measures of R against naive loops, and what they say of the streams anybody can picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trueline.errors import ConfigError, DataError
from trueline.evals.transfer import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
    mean_matrix,
    over_seeds,
    student_quantile,
    summary,
    trained,
)

SQUARE = st.integers(2, 6).flatmap(
    lambda n: arrays(np.float64, (n, n), elements=st.floats(0, 1, width=32))
)
# Task 0 is best after task 1, task 1 best before it was trained: no maximum is on the diagonal.
R = [[0.6, 0.9, 0.1], [0.8, 0.5, 0.3], [0.7, 0.4, 0.9]]


def test_by_hand():
    assert average_accuracy(R) == pytest.approx((0.7 + 0.4 + 0.9) / 3)
    assert learning_accuracy(R) == pytest.approx((0.6 + 0.5 + 0.9) / 3)
    assert backward_transfer(R) == pytest.approx(((0.7 - 0.6) + (0.4 - 0.5)) / 2)
    assert forgetting(R) == pytest.approx(((0.8 - 0.7) + (0.9 - 0.4)) / 2)
    assert forward_transfer(R, [9.0, 0.2, 0.4]) == pytest.approx(((0.9 - 0.2) + (0.3 - 0.4)) / 2)


@settings(max_examples=50, deadline=None)
@given(SQUARE)
def test_equal_naive_loops(matrix):
    n = len(matrix)
    accuracy = learned = backward = forgot = forward = 0.0
    for j in range(n):
        accuracy += matrix[n - 1][j] / n
        learned += matrix[j][j] / n
        if j < n - 1:
            backward += (matrix[n - 1][j] - matrix[j][j]) / (n - 1)
            best = max(matrix[i][j] for i in range(n))
            forgot += (best - matrix[n - 1][j]) / (n - 1)
        if j > 0:
            forward += (matrix[j - 1][j] - 0.25) / (n - 1)
    expected = {
        "average_accuracy": accuracy,
        "learning_accuracy": learned,
        "backward_transfer": backward,
        "forgetting": forgot,
        "forward_transfer": forward,
    }
    assert summary(matrix, [0.25] * n) == pytest.approx(expected)
    assert forgot >= -1e-12
    assert forgot >= -backward - 1e-12


def test_frozen_stream_neither_forgets_nor_transfers():
    frozen = np.tile([0.3, 0.5, 0.7], (3, 1))
    assert backward_transfer(frozen) == forgetting(frozen) == 0
    assert forward_transfer(frozen, [0.3, 0.5, 0.7]) == 0


def test_single_task_has_nothing_to_forget():
    assert average_accuracy([[0.5]]) == learning_accuracy([[0.5]]) == 0.5
    assert math.isnan(backward_transfer([[0.5]]))
    assert math.isnan(forgetting([[0.5]]))
    assert math.isnan(forward_transfer([[0.5]], [0.1]))


def test_joint_training_has_one_row():
    joint = [[0.5, 0.7, 0.9]]
    assert summary(joint, [0, 0, 0]) == {"average_accuracy": pytest.approx(0.7)}
    with pytest.raises(DataError, match=r"1 rows for 3 tasks"):
        learning_accuracy(joint)


def test_unseen_tasks_need_no_scores_but_forward_transfer_does():
    lower = np.array(R)
    lower[np.triu_indices(3, 1)] = np.nan
    assert forgetting(lower) == pytest.approx(((0.8 - 0.7) + (0.5 - 0.4)) / 2)
    assert backward_transfer(lower) == backward_transfer(R)
    with pytest.raises(DataError, match=r"R\[0, 1\] is not measured"):
        forward_transfer(lower, [0, 0, 0])
    assert "forward_transfer" not in summary(lower, [0, 0, 0])
    assert "forward_transfer" not in summary(R)


@pytest.mark.parametrize("measure", [average_accuracy, backward_transfer, forgetting])
def test_a_stream_that_has_not_ended_is_refused_and_its_part_is_not(measure):
    partial = np.full((3, 3), np.nan)
    partial[:2] = R[:2]
    with pytest.raises(DataError, match="trained"):
        measure(partial)
    part = trained(partial)
    assert part.tolist() == [[0.6, 0.9], [0.8, 0.5]]
    assert math.isfinite(measure(part))


def test_trained_of_nothing_and_of_gaps():
    assert trained(np.full((3, 3), np.nan)).shape == (0, 0)
    assert trained(R).tolist() == R
    gap = np.array(R)
    gap[1] = np.nan
    with pytest.raises(DataError, match="row 1"):
        trained(gap)


@pytest.mark.parametrize(
    ("bad", "message"),
    [([0.1, 0.2], r"got \(2,\)"), ([[]], "row a trained task"), ([[np.inf]], "infinite")],
)
def test_what_is_no_matrix_is_refused(bad, message):
    with pytest.raises(DataError, match=message):
        average_accuracy(bad)


def test_untouched_scores_are_checked():
    with pytest.raises(DataError, match="3 tasks"):
        forward_transfer(R, [0.1])
    with pytest.raises(DataError, match="without a score"):
        forward_transfer(R, [0.1, np.nan, 0.2])


def test_over_seeds():
    found = over_seeds([0.5, 0.6, 0.7])
    error = math.sqrt((0.01 + 0 + 0.01) / 2 / 3)
    assert found.value == pytest.approx(0.6)
    assert found.standard_error == pytest.approx(error)
    # t_{0.975, 2} = 4.303 of any table
    assert found.high - found.value == pytest.approx(4.3027 * error, rel=1e-4)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    one = over_seeds([0.5])
    assert one.value == 0.5
    assert math.isnan(one.standard_error)
    assert math.isnan(one.low)
    with pytest.raises(DataError, match="gaps"):
        over_seeds([0.5, np.nan])
    with pytest.raises(DataError, match="no runs"):
        over_seeds([])
    with pytest.raises(ConfigError, match="confidence"):
        over_seeds([0.5, 0.6], confidence=1)


@pytest.mark.parametrize(
    ("degrees", "p", "table"),
    [(1, 0.975, 12.7062), (2, 0.95, 2.9200), (3, 0.975, 3.1824), (4, 0.995, 4.6041),
     (8, 0.975, 2.3060), (9, 0.975, 2.2622), (30, 0.975, 2.0423)],
)  # fmt: skip
def test_student_quantiles_of_the_printed_table(degrees, p, table):
    assert student_quantile(p, degrees) == pytest.approx(table, abs=6e-5)


def test_mean_matrix():
    assert mean_matrix([[[1.0, 2.0]], [[3.0, 6.0]]]).tolist() == [[2.0, 4.0]]
    assert np.isnan(mean_matrix([[[1.0]], [[np.nan]]])).all()
    with pytest.raises(DataError, match="one shape"):
        mean_matrix([[[1.0]], [[1.0, 2.0]]])
