"""ELLA: a new adapter may not change the weights where earlier ones changed them most.

Paper: Das Biswas et al., "ELLA: Efficient Lifelong Learning for Adapters in Large Language Models",
EACL 2026, arXiv 2601.02232.

The changes of all earlier adapters are one matrix for each module, so that neither memory nor time
grows with the number of tasks. Overlap with it costs by how large its entries are: what earlier
tasks changed much is held, what they hardly touched stays free for all.

    loss = task loss + lambda sum_modules ||dW_t * W_past||_F^2          * by entry        [paper]
    W_past = sum_{i<t} dW_i = W_now - W_0,     dW_i = scale_i b_i a_i                      [paper]

    here      paper
    a, b      A_t, B_t: the new adapter, dW_t = scale b a; the scale is the caller's, squared
    energy    W_past^2 by entry, as it is or in other units

Normalised, one module's term is in units of its own weight, whatever the size of earlier changes:

    sum_jk e_jk (dW_t)_jk^2 / ||W||_F^2,   e = W_past^2 / mean(W_past^2)                    [ours]

It is the relative change of the weight where e is 1 throughout; over modules take the mean. As the
drift it is quadratic in the adapter and 0 with gradient 0 at b = 0, so the start is free.

Reconstructed: only the penalty's formula was at hand, neither the text nor code [recon]: whether
modules are summed or averaged, and the paper's lambda, are not known here; the sum is ours.
Differs from the paper: nothing known. Differs from the authors' code: not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def alignment(
    a: Float[Tensor, "rank d_in"],
    b: Float[Tensor, "d_out rank"],
    energy: Float[Tensor, "d_out d_in"],
) -> Float[Tensor, ""]:
    """Return sum_jk energy_jk (b a)_jk^2, the entries of `energy` at least 0.

    Its gradient is found in the same pass: nothing of the module's size is held until backward.
    There is no second derivative.

    >>> alignment(torch.ones(1, 2), torch.ones(2, 1), torch.eye(2))
    tensor(2.)
    """
    found: Tensor = _Alignment.apply(a, b, energy)
    return found


def energy_of(
    past: Float[Tensor, "d_out d_in"], weight: Float[Tensor, "d_out d_in"] | None = None
) -> Float[Tensor, "d_out d_in"]:
    """Return W_past^2 by entry; with `weight` in its units, see the module; 0 where nothing was."""
    energy = past.square()
    if weight is None:
        return energy
    total = energy.mean() * weight.square().sum()
    return torch.where(total > 0, energy / total, torch.zeros_like(energy))


class _Alignment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, energy: Tensor) -> Tensor:
        # d value / d dW = 2 energy dW; from it both gradients, and the value: <d b, b> / 2
        slope = (b @ a).mul_(energy).mul_(2)
        of_b = slope @ a.T
        ctx.save_for_backward(b.T @ slope, of_b)
        return (of_b * b).sum() / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        of_a, of_b = ctx.saved_tensors
        return grads[0] * of_a, grads[0] * of_b, None
