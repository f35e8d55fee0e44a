"""Scoring: combined logits of given continuations under teacher forcing, one forward a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trueline.modeling import LanguageModel
from trueline.prompts import pad_left
from trueline.types import Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """A continuation to score: what each branch sees before it, and its own tokens."""

    contexts: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    first: int = 0
    """How many tokens of the same text were scored before these."""

    @property
    def rows(self) -> list[list[int]]:
        """Ids of the branches' forward; the last token is only predicted."""
        return [[*context, *self.tokens[:-1]] for context in self.contexts]


@torch.inference_mode()
def combined_logits(model: LanguageModel, method: Method, items: Sequence[Scored]) -> list[Tensor]:
    """Return the combined logits (token, vocab) of each item, from one forward."""
    rows = [row for item in items for row in item.rows]
    ids, mask = pad_left(rows, model.pad_token_id, model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if "position_ids" in model.forward_names:
        options["position_ids"] = positions
    if "logits_to_keep" in model.forward_names:
        options["logits_to_keep"] = max(len(item.tokens) for item in items)
    branches = len(items[0].contexts)
    if method.base_branches:
        on = model.model.active_adapter
        names = ["__base__" if k in method.base_branches else on for k in range(branches)]
        options["adapter_names"] = names * len(items)
    logits = model.model(ids, **options).logits.float()
    # (item, branch, time, vocab) -> (time, branch, vocab) of each item
    logits = logits.view(len(items), branches, *logits.shape[1:]).transpose(1, 2)
    return [
        _combine(method, z[-len(item.tokens) :], item.first)
        for z, item in zip(logits, items, strict=True)
    ]


def _combine(method: Method, logits: Tensor, first: int) -> Tensor:
    """Combine logits (token, branch, vocab); the rest branch alone after `first_tokens`."""
    if method.first_tokens is None:
        return method.combine(logits)
    n = max(0, method.first_tokens - first)
    alone = logits[n:, method.rest_branch]
    return torch.cat([method.combine(logits[:n]), alone]) if len(logits[:n]) else alone
