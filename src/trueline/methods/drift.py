"""Drift: how much an adapter changes what a module does on the inputs of earlier tasks.

Ours. Related: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS
2017, arXiv 1612.00796 (EWC); Ritter et al., "Online Structured Laplace Approximations for
Overcoming Catastrophic Forgetting", NeurIPS 2018, arXiv 1805.07810 (Kronecker-factored).

O-LoRA keeps the new rows away from what earlier adapters read, whether or not earlier inputs have
anything there, and only from that. What forgetting is made of is the change of outputs on earlier
inputs, and this is a quadratic form in the adapter, with the inputs' second moment as its matrix:

    E_past ||dW x||^2 = tr(b a C a^T b^T) = ||b a F^T||_F^2       C = E x x^T = F^T F
    weighted with what the earlier losses feel of an output,      G = E g g^T = H^T H
    E_past (g^T dW x)^2 ~ ||H b a F^T||_F^2          (x and g taken as independent: K-FAC)

One pass over a task's data at its end gives C (and G): statistics, no data are kept, and nothing is
added at inference. F may be low rank, the leading eigenvectors times the roots of eigenvalues.

    here      meaning
    a, b      the new adapter, dW = scale b a; the scale is the caller's, squared
    factor    F, k x d_in: F^T F is the (mean) second moment of a module's inputs
    out       H, m x d_out: H^T H is the second moment of the loss's gradient in its outputs
    relative  F / ||W F^T||_F: the drift is then a share of the output's own energy, E ||W x||^2

With G the drift needs no other scale: one half of it estimates the rise of the earlier tasks' loss.
It stays quadratic in the adapter and is 0 with gradient 0 at b = 0, so the start is free.

Not known to it: that changes of several modules add up or cancel, and curvature beyond the second
order; it sums over modules as if they were independent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Float
    from torch import Tensor


def drift(
    a: Float[Tensor, "rank d_in"],
    b: Float[Tensor, "d_out rank"],
    factor: Float[Tensor, "k d_in"],
    out: Float[Tensor, "m d_out"] | None = None,
) -> Float[Tensor, ""]:
    """Return ||b a F^T||_F^2, or ||H b a F^T||_F^2 with `out`; 0 for a factor without rows.

    Costs rank (k d_in + m d_out) products: no matrix of the module's size is formed.
    """
    reads = a @ factor.T
    writes = b if out is None else out @ b
    # ||X Y||_F^2 = tr((X^T X)(Y Y^T)), both rank x rank
    return ((writes.T @ writes) * (reads @ reads.T)).sum()


def relative(
    factor: Float[Tensor, "k d_in"], weight: Float[Tensor, "d_out d_in"]
) -> Float[Tensor, "k d_in"]:
    """Return F scaled so that drift 1 is a change as large as the output of `weight` itself."""
    size = torch.linalg.matrix_norm(weight @ factor.T) if len(factor) else factor.new_zeros(())
    return torch.where(size > 0, factor / size, torch.zeros_like(factor))


def factor_of(
    moment: Float[Tensor, "d d"], rank: int | None = None, keep: float = 1.0
) -> Float[Tensor, "k d"]:
    """Return F with F^T F = `moment`, rows from the largest down.

    At most `rank` rows, and no more than hold the share `keep` of the trace; what is left out is
    missing from every drift. None and 1 keep all that is above rounding.
    """
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    total = values.sum()
    before = values.cumsum(0) - values
    floor = torch.finfo(moment.dtype).eps * len(values) * values[0]
    count = int(((values > floor) & (before < keep * total)).sum())
    count = count if rank is None else min(count, rank)
    return values[:count].sqrt()[:, None] * vectors[:, :count].T


def mean_factor(
    factors: Sequence[Float[Tensor, "_ d"]], rank: int | None = None
) -> Float[Tensor, "k d"]:
    """Return F of the mean of the second moments, each task counting the same."""
    stacked = torch.cat([f / len(factors) ** 0.5 for f in factors])
    if len(stacked) <= (rank or stacked.shape[1]):
        return stacked
    _, values, vectors = torch.linalg.svd(stacked, full_matrices=False)
    return (values[:, None] * vectors)[:rank]
