"""The loss of one part of an update, and the sums of which the logged means are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trueline.methods.inverse_q import (
    advantage_loss,
    imitation_loss,
    kl_loss,
    token_logprobs,
    token_reward,
)

if TYPE_CHECKING:
    from torch import Tensor

    from trueline.train.distil.config import InverseQConfig
    from trueline.train.distil.sampling import Samples

MEANS = ("kl_to_teacher", "kl_to_reference", "entropy", "reward")
"""Means over the tokens of the student's own answers; the first three in nats."""


@dataclass
class Sums:
    """Sums over tokens, of one part of an update or of many; floats or tensors of no dimension."""

    kl_to_teacher: Any = 0.0
    kl_to_reference: Any = 0.0
    entropy: Any = 0.0
    reward: Any = 0.0
    tokens: Any = 0.0
    """Of the answers that are measured: the student's own."""
    answers: Any = 0.0
    """How many are measured."""
    all_tokens: Any = 0.0
    """Those of the teacher's answers too."""

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def reduced(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> Sums:
        """Return the sums of all processes, by `reduce` of one tensor."""
        values = [torch.as_tensor(v, dtype=torch.float32, device=device) for v in self._values()]
        return Sums(*reduce(torch.stack(values)).unbind())

    def means(self) -> dict[str, float]:
        """Return what is logged, `MEANS` and the mean length of an answer."""
        tokens = float(self.tokens)
        found = {name: float(getattr(self, name)) / tokens for name in MEANS}
        return {**found, "completion_length": tokens / float(self.answers)}

    def _values(self) -> list[Any]:
        return [getattr(self, f.name) for f in dataclasses.fields(self)]


def part_loss(
    samples: Samples,
    logits: Sequence[Tensor],
    taught: Iterable[tuple[int, Tensor, Tensor]],
    args: InverseQConfig,
    count: Any,
    *,
    keep: bool = False,
) -> tuple[Tensor, Sums]:
    """Return the loss of a part, its sum over tokens divided by `count`, and what is logged.

    Args:
        samples: Lessons and answers; with `keep` they get the policy's log-probabilities, to be
            weighed against at later uses.
        logits: Of the student at its answers, (time, vocab) each, with gradient.
        taught: (row, teacher logits, reference logits) of `policies`, in the rows' order.
        args: The loss and its numbers.
        count: Tokens of the whole update.
        keep: See above.
    """
    device = logits[0].device
    tokens = [torch.tensor(answer, device=device) for answer in samples.answers]
    sampled = args.loss != "kl"
    policy = [token_logprobs(z, y) for z, y in zip(logits, tokens, strict=True) if sampled]
    losses: list[Tensor] = []
    teacher, reference, sums = [], [], Sums()
    for i, z_star, z_s in taught:
        teacher.append(token_logprobs(z_star, tokens[i]))
        reference.append(token_logprobs(z_s, tokens[i]))
        if not sampled:
            losses.append(kl_loss(logits[i], z_star, top_k=args.top_k, count=count)[0])
        sums.all_tokens += len(tokens[i])
        if samples.measured[i]:
            reward = token_reward(teacher[-1], reference[-1], args.beta).sum()
            kls = divergences(logits[i], z_star, z_s)
            sums += Sums(*kls, reward, len(tokens[i]), 1)
    if not sampled:
        return torch.stack(losses).sum(), sums
    old = samples.old_logprobs
    loss = _sampled_loss(policy, teacher, reference, old, args, count)
    if keep and not old:
        samples.old_logprobs = [row.detach() for row in policy]
    return loss, sums


def _sampled_loss(
    policy: Sequence[Tensor],
    teacher: Sequence[Tensor],
    reference: Sequence[Tensor],
    old: Sequence[Tensor],
    args: InverseQConfig,
    count: Any,
) -> Tensor:
    """Return the loss on the tokens that were drawn, from their log-probabilities by row."""
    function = imitation_loss if args.loss == "imitation" else advantage_loss
    ones = [torch.ones_like(row) for row in policy]
    return function(
        *(
            pad_sequence(list(rows), batch_first=True)
            for rows in (policy, teacher, reference, ones)
        ),
        beta=args.beta,
        old_logprobs=pad_sequence(list(old), batch_first=True) if old else None,
        clip=args.clip,
        count=count,
    )[0]


@torch.no_grad()
def divergences(
    policy: Tensor, teacher: Tensor, reference: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums over tokens: KL to the teacher, KL to the reference, entropy."""
    log_p = policy.float().log_softmax(-1)
    p = log_p.exp()
    minus_entropy = torch.linalg.vecdot(p, log_p).sum()
    # KL(p || q) = sum p log p - sum p z_q + lse(z_q)
    kls = [
        minus_entropy - torch.linalg.vecdot(p, z).sum() + z.logsumexp(-1).sum()
        for z in (teacher, reference)
    ]
    return kls[0], kls[1], -minus_entropy
