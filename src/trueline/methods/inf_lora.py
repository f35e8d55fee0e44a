"""InfLoRA: a fixed reading matrix that earlier tasks' inputs cannot reach; only b is trained.

Paper: Liang and Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning",
CVPR 2024, arXiv 2404.00228. The subspace of earlier inputs is kept as in Saha et al., "Gradient
Projection Memory for Continual Learning", ICLR 2021, arXiv 2103.09762.

With a fixed, training b alone is training the whole weight inside the row space of a. Rows of a are
chosen before the task, from inputs alone, in two conditions: orthogonal to what the earlier tasks'
inputs span, so that their outputs stay; and along what the new task's inputs span, so that there is
something to learn from.

    H_t   the new task's inputs (columns); C = H H^T / n = F^T F
    M     orthonormal basis of the earlier tasks' inputs
    H'_t  = H_t - M M^T H_t = U S V^T             a_t = the first r columns of U, as rows   [paper]
    M grows after each task by the leading columns of U, as few as reach
        ||M^T H||_F^2 + ||leading part||_F^2 >= threshold ||H||_F^2                        [paper]

    here        paper
    a           B_t, its dimension reduction (its A_t is PEFT's lora_B)
    factor      H_t^T / sqrt(n), or any F with F^T F = C: what follows depends on C alone
    basis       M_t, as rows

Reconstructed: the text was read some time ago and not again for this page. Its code divides a by
sqrt(3), the row length of the usual start; so do we [recon]. The paper switches to storing the
complement when the basis is past half of the width (DualGPM): a matter of memory, left out. Its
threshold rises from task to task; here each call names its own.
Differs from the authors' code: where the new inputs have fewer than r directions left, rows are
filled up with random ones in the complement of the basis, and none can be had when it is full.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from trueline.errors import ConfigError
from trueline.methods.o_lora import row_basis

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def outside(
    factor: Float[Tensor, "k d_in"], basis: Float[Tensor, "span d_in"]
) -> Float[Tensor, "k d_in"]:
    """Return the rows of `factor` less their projection onto the orthonormal rows `basis`."""
    return factor - (factor @ basis.T) @ basis


def reading_matrix(
    factor: Float[Tensor, "k d_in"], basis: Float[Tensor, "span d_in"], rank: int
) -> Float[Tensor, "rank d_in"]:
    """Return a_t: `rank` orthogonal rows of length sqrt(1/3), in the complement of `basis`.

    Raises `ConfigError` where the complement has fewer than `rank` dimensions.
    """
    width = basis.shape[1]
    if (free := width - len(basis)) < rank:
        raise ConfigError(
            f"Earlier inputs leave {free} of {width} directions, `rank` asks for {rank}. "
            "Lower the threshold or the rank."
        )
    _, values, rows = torch.linalg.svd(outside(factor, basis), full_matrices=False)
    floor = 10 * torch.finfo(factor.dtype).eps * torch.linalg.matrix_norm(factor)
    rows = rows[:rank][values[:rank] > floor]
    while len(rows) < rank:
        more = torch.randn(rank - len(rows), width, dtype=factor.dtype, device=factor.device)
        for _ in range(2):  # once more against rounding
            more = outside(outside(more, basis), rows)
        rows = torch.cat([rows, row_basis(more)])
    return rows / math.sqrt(3)


def grow_basis(
    basis: Float[Tensor, "span d_in"], factor: Float[Tensor, "k d_in"], threshold: float
) -> Float[Tensor, "grown d_in"]:
    """Return `basis` with the fewest new rows that make it hold `threshold` of the inputs' energy.

    `threshold` is a share in [0, 1] of ||F||_F^2. A basis that holds it already is returned as is.
    """
    rest = outside(factor, basis)
    total = factor.square().sum()
    held = total - rest.square().sum()
    _, values, rows = torch.linalg.svd(rest, full_matrices=False)
    floor = 10 * torch.finfo(factor.dtype).eps * total.sqrt()
    before = held + values.square().cumsum(0) - values.square()
    count = int(((before < threshold * total) & (values > floor)).sum())
    # the new rows are orthogonal to the basis up to rounding: once more
    return torch.cat([basis, row_basis(outside(rows[:count], basis))])
