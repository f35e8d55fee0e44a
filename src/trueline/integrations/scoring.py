"""Scoring: combined logits of given continuations under teacher forcing, one forward a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trueline.engine.scoring import combined, forced_logits
from trueline.models.load import LanguageModel
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
        """Ids that each branch's forward is fed; the last token is only predicted."""
        return [[*context, *self.tokens[:-1]] for context in self.contexts]


@torch.inference_mode()
def combined_logits(model: LanguageModel, method: Method, items: Sequence[Scored]) -> list[Tensor]:
    """Return the combined logits (token, vocab) of each item, from one forward."""
    contexts = [context for item in items for context in item.contexts]
    tokens = [item.tokens for item in items for _ in item.contexts]
    branches = len(items[0].contexts)
    adapters = [k not in method.base_branches for k in range(branches)] * len(items)
    rows = forced_logits(model, contexts, tokens, adapters=adapters)
    return [
        combined(
            method, torch.stack(rows[i * branches : (i + 1) * branches], 1).float(), item.first
        )
        for i, item in enumerate(items)
    ]
