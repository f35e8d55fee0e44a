"""Inverse-Q*: token-level reinforcement learning towards an estimate of the optimal policy.

Paper: Xia et al., "Inverse-Q*: Token Level Reinforcement Learning for Aligning Large Language
Models Without Preference Data", EMNLP Findings 2024, arXiv 2408.14874. Identity: Rafailov et al.,
"From r to Q*", arXiv 2404.12358.

DPO learns the optimal policy pi* from preferences. Here pi* is estimated first, by a decoding
method on the frozen start S of the model; the dense reward is read off it, and the policy imitates
that reward on its own responses. No reward model, value model or preferences.

    A*_t = r_t + V*(s_t+1) - V*(s_t) = beta log pi*(y_t|s_t) / pi_S(y_t|s_t)
    pi*(.|s) = softmax(z_p + ratio (z_p - z_0))   for Linear Alignment              [recon]
    r_t      = beta (log pi*(y_t|s_t) - log pi_S(y_t|s_t))          token reward
    rhat_t   = beta (log pi(y_t|s_t) - log pi_S(y_t|s_t))           what the policy pays by itself

    imitation   mean_t (rhat_t - r_t)^2
    advantage   mean_t -sg[r_t - rhat_t] log pi(y_t|s_t), as PPO's clipped form on older samples
    kl          mean_t KL(pi(.|s_t) || pi*(.|s_t)), over the whole vocabulary

With y_t ~ pi, and states as they came, their expected gradients are 2 beta^2, beta and 1 times that
of the last, which has the least variance. All three stand still where pi = pi*.

    here                   paper
    teacher, policy        pi*, pi_theta
    reference              S, the frozen start
    beta                   beta; a scale of reward and loss, not of the fixed point

Differs from the paper: its exact estimator, hyper-parameters and tables could not be obtained.
    `advantage` and `kl` are ours, and so is the floor under a teacher that rules tokens out.
    Per sample `advantage` has the gradient of `imitation` over 2 beta, so both take samples that
    others drew; `kl` is exact in the tokens, and blind to those that the policy gives no chance.
Differs from the authors' code: none was found.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

Metrics = dict[str, "Tensor"]
"""Means over unmasked tokens, without gradient."""


def token_logprobs(
    logits: Float[Tensor, "*batch vocab"], tokens: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Return log softmax(logits) at the tokens; log-probabilities may stand for logits."""
    logits = _wide(logits)
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def floored(
    teacher: Float[Tensor, "*batch vocab"], reference: Float[Tensor, "*batch vocab"], floor: float
) -> Float[Tensor, "*batch vocab"]:
    """Return log((1 - floor) pi* + floor pi_S), from logits: a teacher that rules nothing out.

    A candidates mask gives tokens probability 0, so that the log-ratio and the reverse divergence
    are infinite as soon as the policy draws one. Mixed, no reward is below beta log(floor), and
    the fixed point keeps at most `floor` of the reference's mass outside the mask. In [0, 1); 0
    returns log pi*.
    """
    log_q = teacher.log_softmax(-1)
    if floor == 0:
        return log_q
    return torch.logaddexp(log_q + math.log1p(-floor), reference.log_softmax(-1) + math.log(floor))


def token_reward(
    teacher_logprobs: Float[Tensor, "*batch"],
    reference_logprobs: Float[Tensor, "*batch"],
    beta: float,
) -> Float[Tensor, "*batch"]:
    """Return the reward of each token, beta log pi*(y)/pi_S(y): the optimal advantage."""
    return beta * (teacher_logprobs - reference_logprobs)


def imitation_loss(
    policy_logprobs: Float[Tensor, "batch time"],
    teacher_logprobs: Float[Tensor, "batch time"],
    reference_logprobs: Float[Tensor, "batch time"],
    mask: Int[Tensor, "batch time"],
    *,
    beta: float,
    old_logprobs: Float[Tensor, "batch time"] | None = None,
    clip: float = 0.2,
    count: Any = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Return the squared distance of the policy's own reward from the token reward.

    Args:
        policy_logprobs: log pi of the sampled tokens, with gradient.
        teacher_logprobs: log pi* of the same.
        reference_logprobs: log pi_S of the same.
        mask: 1 where a token counts; what is elsewhere changes nothing, not even nan.
        beta: Scale of the rewards, above 0.
        old_logprobs: log pi at sampling time. Each token is then weighed by pi/pi_old, clipped to
            [1 - clip, 1 + clip], without gradient; none means that the samples are fresh.
        clip: See above.
        count: Divisor in place of the number of unmasked tokens, for batches in parts.
    """
    policy, teacher, reference = _counted(
        mask, policy_logprobs, teacher_logprobs, reference_logprobs
    )
    reward, own = token_reward(teacher, reference, beta), token_reward(policy, reference, beta)
    loss = (own - reward) ** 2
    if old_logprobs is not None:
        (old,) = _counted(mask, old_logprobs)
        loss = loss * (policy.detach() - old).exp().clamp(1 - clip, 1 + clip)
    return _mean(loss, count), {"reward": _mean(reward.detach())}


def advantage_loss(
    policy_logprobs: Float[Tensor, "batch time"],
    teacher_logprobs: Float[Tensor, "batch time"],
    reference_logprobs: Float[Tensor, "batch time"],
    mask: Int[Tensor, "batch time"],
    *,
    beta: float,
    old_logprobs: Float[Tensor, "batch time"] | None = None,
    clip: float = 0.2,
    count: Any = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Return minus the advantage times log pi; arguments as for `imitation_loss`.

    With `old_logprobs` it is PPO's form, the lesser of w A and clip(w) A with w = pi/pi_old and
    the same advantage A = sg[r - rhat].
    """
    policy, teacher, reference = _counted(
        mask, policy_logprobs, teacher_logprobs, reference_logprobs
    )
    reward, own = token_reward(teacher, reference, beta), token_reward(policy, reference, beta)
    advantage = (reward - own).detach()
    if old_logprobs is None:
        loss = -advantage * policy
    else:
        (old,) = _counted(mask, old_logprobs)
        weight = (policy - old).exp()
        loss = -torch.minimum(weight * advantage, weight.clamp(1 - clip, 1 + clip) * advantage)
    return _mean(loss, count), {"reward": _mean(reward.detach())}


def kl_loss(
    policy_logits: Float[Tensor, "batch time vocab"],
    teacher_logits: Float[Tensor, "batch time vocab"],
    mask: Int[Tensor, "batch time"] | None = None,
    *,
    top_k: int | None = None,
    count: Any = None,
) -> tuple[Float[Tensor, ""], Metrics]:
    """Return KL(pi || pi*), the mean over unmasked tokens; logits or log-probabilities.

    Without `mask` every token counts.

    `top_k` keeps the teacher's k likeliest tokens and gathers all others in one bucket: a lower
    bound that needs little memory, equal to the full divergence where k is the vocabulary.
    """
    policy, teacher = _counted(mask, policy_logits, teacher_logits)
    if top_k is not None and top_k < teacher.shape[-1]:
        policy, teacher = _buckets(policy, teacher, top_k)
    kl = reverse_kl(policy, teacher)
    return _mean(kl, count), {"kl_to_teacher": _mean(kl.detach())}


def reverse_kl(
    policy: Float[Tensor, "*batch vocab"], teacher: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """Return KL(softmax(policy) || softmax(teacher)); gradient to the policy only."""
    kl: Tensor = _ReverseKL.apply(policy, teacher)
    return kl


class _ReverseKL(torch.autograd.Function):
    """The divergence with its gradient written out, so that one (batch, vocab) tensor is kept."""

    @staticmethod
    def forward(ctx: Any, policy: Tensor, teacher: Tensor) -> Tensor:
        log_p = _wide(policy).log_softmax(-1)
        # log p - log q
        gap = log_p - _wide(teacher).log_softmax(-1)
        p = log_p.exp_()
        # KL = sum_v p_v gap_v
        kl = torch.linalg.vecdot(p, gap)
        # d KL / d z_v = p_v (gap_v - KL)
        ctx.save_for_backward(gap.sub_(kl[..., None]).mul_(p))
        ctx.dtype = policy.dtype
        return kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad[..., None]).to(ctx.dtype), None


def _buckets(policy: Tensor, teacher: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the teacher's k likeliest tokens, and of all others as one."""
    index = teacher.topk(top_k, dim=-1).indices
    pair = []
    for logits in map(_wide, (policy, teacher)):
        total = logits.logsumexp(-1, keepdim=True)
        # Of the others themselves: 1 minus the k would lose a small rest to rounding.
        rest = logits.scatter(-1, index, -math.inf).logsumexp(-1, keepdim=True)
        pair.append(torch.cat([logits.gather(-1, index), rest], dim=-1) - total)
    return pair[0], pair[1]


def _counted(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the unmasked tokens of each tensor, as rows."""
    if mask is None:
        return tensors
    keep = mask.bool()
    return tuple(tensor[keep] for tensor in tensors)


def _wide(tensor: Tensor) -> Tensor:
    """Return half precision as float32; a sum over a vocabulary needs it."""
    return tensor.float() if tensor.itemsize < 4 else tensor


def _mean(values: Tensor, count: Any = None) -> Tensor:
    return values.sum() / (max(values.numel(), 1) if count is None else count)
