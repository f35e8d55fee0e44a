"""Log-probabilities of tokens, as OpenAI shows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trueline.engine.protocol import Step


def token_logprobs(step: Step, top: int, texts: Callable[[int], str]) -> dict[str, Any]:
    """Return a recorded token's log-probability in the distribution that it was drawn from, and
    those of the `top` likeliest."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        text = texts(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    assert step.combined is not None
    values = step.combined.float().log_softmax(-1)
    found = one(step.token_id, float(values[step.token_id]))
    best = values.topk(min(top, len(values)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return found | {"top_logprobs": [one(i, value) for i, value in pairs if math.isfinite(value)]}


def chat_logprobs(tokens: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return tokens in the form of a chat."""
    return {"content": list(tokens), "refusal": None}


def text_logprobs(tokens: Sequence[dict[str, Any]], before: int) -> dict[str, Any]:
    """Return tokens in the form of a text completion, `before` characters into it."""
    offsets = []
    for token in tokens:
        offsets.append(before)
        before += len(token["token"])
    return {
        "tokens": [t["token"] for t in tokens],
        "token_logprobs": [t["logprob"] for t in tokens],
        "top_logprobs": [{o["token"]: o["logprob"] for o in t["top_logprobs"]} for t in tokens],
        "text_offset": offsets,
    }
