"""O-LoRA: each task learns in a low-rank subspace orthogonal to those of the tasks before it.

Paper: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning",
EMNLP Findings 2023, arXiv 2310.14152, equations 6 to 8.

Task t trains its own LoRA (a_t, b_t) on top of the frozen earlier ones. The rows of a_i span what
task i reads of a module's input; a_t is kept orthogonal to all of them, so that learning task t
moves the weights in directions that earlier tasks did not use.

    loss = task loss + lambda_1 sum_modules overlap + lambda_2 sum_modules norm
    overlap  = sum_{i<t} sum_jk |(a_i a_t^T)_jk|                                          [code]
             = sum_{i<t} sum_jk (a_i a_t^T)_jk^2                                          [paper]
    norm     = ||a_t||_F + ||b_t||_F                                                      [code]

    here        paper / authors' code
    a_new       A_t, transposed as PEFT stores it: `loranew_A`, rank x d_in
    a_past      A_1 ... A_{t-1}, stacked: `lora_A`, (sum of past ranks) x d_in
    normalize   nothing: both sum over entries, tasks and modules

The sums grow with width, rank, tasks and modules (about 77 for each earlier task at width 1024 and
rank 8 in 144 modules), and can be lowered by making a_t short instead of orthogonal. Normalised,
the overlap of one module is the share of the new rows that lies in the span of the past rows:

    squared  mean_j ||P a_j||^2 / ||a_j||^2     abs  mean_j ||P a_j|| / ||a_j||
    with P the projection onto the span of a_past: the cosine of the angle to it        [ours]

It is 0 where a_t is orthogonal and 1 where it learns nothing new, whatever the rank, the width, the
number of tasks and the length of either side; over modules take the mean. It is not a mean over
entries: that falls with width and tasks while the directions it guards do not. Random rows start at
about past ranks / d_in (squared): how crowded the module is. Where the past rows span the whole
input there is no room, the share is 1 and its gradient 0.

Differs from the paper: the absolute value is the released code's, and the default of `overlap`. The
    defaults of `trueline stack` are not the paper's: normalised, with lambda_1 0.5, the pressure is
    about 1,100 times weaker than the released sum at the shapes of T5-large (144 modules of width
    1024, rank 8). `normalize=False` with the paper's lambda_1 is the paper's setting.
Differs from the authors' code: past rows are one matrix for each module, so that a step costs one
    product for each. They multiply all pairs of parameters by name. Their dropout of a module's
    input reaches the past adapters too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from trueline.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Penalty = Literal["abs", "squared"]
PENALTIES = ("abs", "squared")


def overlap(
    a_new: Float[Tensor, "rank d_in"],
    a_past: Float[Tensor, "past d_in"],
    penalty: Penalty = "abs",
    normalize: bool = False,
) -> Float[Tensor, ""]:
    """Return how far the new rows of one module overlap with the past ones; 0 without past rows.

    The released sum over entries (`penalty="abs"`), the paper's (`"squared"`), or, with
    `normalize`, the share in [0, 1] of the new rows inside the past span. The span is found anew
    at each call; a caller that takes many steps keeps `row_basis` and calls `share`.

    >>> overlap(torch.eye(4)[:2], torch.eye(4)[1:])
    tensor(1.)
    """
    check_penalty(penalty)
    if normalize:
        return share(a_new, row_basis(a_past), penalty)
    # (a_i a_t^T)_jk for all i < t at once
    products = a_past @ a_new.T
    return products.abs().sum() if penalty == "abs" else products.square().sum()


def share(
    a_new: Float[Tensor, "rank d_in"],
    basis: Float[Tensor, "span d_in"],
    penalty: Penalty = "abs",
) -> Float[Tensor, ""]:
    """Return the mean share of the new rows inside the span of the orthonormal rows `basis`.

    A row of zeros has a share of 0. Gradients are finite everywhere, 0 at both ends of "squared".
    """
    check_penalty(penalty)
    # ||P a_j||^2 and ||a_j||^2; a vector's norm has gradient 0 at 0, its square root does not
    tiny = torch.finfo(a_new.dtype).tiny
    inside = torch.linalg.vector_norm(a_new @ basis.T, dim=-1)
    cosine = inside / torch.linalg.vector_norm(a_new, dim=-1).clamp(min=tiny**0.5)
    return cosine.mean() if penalty == "abs" else cosine.square().mean()


def row_basis(rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "span d_in"]:
    """Return orthonormal rows that span the same space; as many as `rows` has rank.

    Rows are first brought to length 1, so that a task with small weights counts like any other.
    """
    if len(rows) == 0:
        return rows
    lengths = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    _, values, basis = torch.linalg.svd(
        torch.where(lengths > 0, rows / lengths, rows), full_matrices=False
    )
    floor = torch.finfo(rows.dtype).eps * max(rows.shape) * values[0]
    return basis[values > floor]


def norm(
    a: Float[Tensor, "rank d_in"], b: Float[Tensor, "d_out rank"], normalize: bool = False
) -> Float[Tensor, ""]:
    """Return ||a||_F + ||b||_F; its gradient is 0 where a matrix is 0, as b is at the start.

    With `normalize` both are divided by sqrt(rank): the root mean square length of rows of a and
    columns of b, which at the usual start is sqrt(1/3) whatever the rank and the width.
    """
    total = torch.linalg.vector_norm(a) + torch.linalg.vector_norm(b)
    return total / len(a) ** 0.5 if normalize else total


def check_penalty(penalty: str) -> None:
    """Raise `ConfigError` for a penalty that does not exist."""
    if penalty not in PENALTIES:
        raise ConfigError(f'Unknown penalty "{penalty}".{suggestion(penalty, PENALTIES)}')
