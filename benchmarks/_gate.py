"""First-token gate: refuse or answer by what several system texts make of the first token.

Paper: ours. The odds that an answer begins as refusals begin are read under K system texts at once,
and a fitted weighted sum of their logarithms decides:

    s = bias + sum_k weight_k log(p_k / (1 - p_k)),   p_k = p(first token in tokens | text_k)

    s > 0    the answer begins with one of `tokens`
    else     it begins with none of them

From the second token on the first text goes on alone: the gate costs K prompts and no step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trueline.types import Message


@dataclass(frozen=True)
class FirstTokenGate:
    """Let a fitted score of the first token decide whether the answer is a refusal."""

    name: ClassVar[str] = "first-token-gate"
    first_tokens: ClassVar[int | None] = 1
    rest_branch: ClassVar[int] = 0
    base_branches: ClassVar[tuple[int, ...]] = ()

    texts: tuple[str, ...]
    """System texts in place of the chat's own; the first one gives the answer."""
    weights: tuple[float, ...]
    """Of the log-odds under each."""
    bias: float
    tokens: tuple[int, ...]
    """Ids of the tokens that refusals begin with."""

    def prompts(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Return the chat under each text."""
        rest = [m for m in messages if m["role"] != "system"]
        return [[{"role": "system", "content": text}, *rest] for text in self.texts]

    def combine(self, logits: Tensor) -> Tensor:
        """Return the first text's logits (batch, vocab), the tokens alone or without them."""
        p = logits.softmax(-1)[..., list(self.tokens)].sum(-1).clamp(1e-9, 1 - 1e-6)
        score = self.bias + ((p / (1 - p)).log() * p.new_tensor(self.weights)).sum(-1)
        among = logits.new_zeros(logits.shape[-1]).bool()
        among[list(self.tokens)] = True
        # Where the answer is to be a refusal, what is not among them goes; elsewhere what is.
        gone = among[None] != (score > 0)[:, None]
        return logits[:, 0].masked_fill(gone, -math.inf)
