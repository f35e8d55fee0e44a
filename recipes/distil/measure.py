"""How far a policy follows its principle, whether it still knows, and how far it has drifted.

Everything is measured without a system prompt unless one is given, on prompts that the policy was
not trained on, next to the model it started from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recipes.distil.questions import CHAT, Principle, grammar, questions, requests
from trueline import (
    LanguageModel,
    Message,
    Plain,
    Request,
    SamplingParams,
    generate,
)
from trueline.models.prompts import encode, pad_left

NEW_TOKENS = 40
BATCH = 256
Rate = dict[str, float]


def rate(values: Sequence[float]) -> Rate:
    """Mean, standard error over the values, and n."""
    n = len(values)
    mean = sum(values) / n
    spread = sum((v - mean) ** 2 for v in values) / max(n - 1, 1)
    return {"mean": round(mean, 5), "se": round(math.sqrt(spread / n), 5), "n": n}


def pool(rates: Sequence[Rate]) -> Rate:
    """The mean over seeds, and its standard error over seeds; n counts all prompts.

    With one seed the standard error is that over prompts.
    """
    if len(rates) == 1:
        return dict(rates[0])
    result = rate([r["mean"] for r in rates])
    return result | {"n": sum(r["n"] for r in rates), "seeds": len(rates)}


def answers(
    lm: LanguageModel, prompts: Sequence[Sequence[Message]], temperature: float, seed: int
) -> list[list[int]]:
    """Token ids of one answer to each chat, the end-of-text token with them."""
    rows = [Request(list(p), Plain(), seed=seed * 100_000 + i) for i, p in enumerate(prompts)]
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=temperature)
    return [list(c.token_ids) for c in generate(lm, rows, sampling=sampling, batch_size=BATCH)]


@torch.inference_mode()
def logprobs(
    lm: LanguageModel, prompts: Sequence[Sequence[Message]], responses: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probabilities (token, vocab) at every token of the responses, after their prompts."""
    rows = [encode(lm, p) + list(r) for p, r in zip(prompts, responses, strict=True)]
    ids, mask = pad_left(rows, lm.pad_token_id, lm.device)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    keep = max(len(r) for r in responses) + 1
    out = lm.model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep
    ).logits
    # Rows end together: the last len(r) predictions before the last token are the response's.
    return [
        z[keep - 1 - len(r) : keep - 1].log_softmax(-1) for z, r in zip(out, responses, strict=True)
    ]


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) at every position, from log-probabilities over the whole vocabulary."""
    return (p.exp() * (p - q)).sum(-1)


def asked(texts: Sequence[str], system: str | None = None) -> list[list[Message]]:
    """A chat of one question for each text."""
    head: list[Message] = [{"role": "system", "content": system}] if system else []
    return [[*head, {"role": "user", "content": text}] for text in texts]


class Probe:
    """All measurements of one principle against one start, on one split with one seed.

    Args:
        start: The model that training begins with; its own answers to other chats are kept.
        principle: What is to be followed.
        split: "dev" or "test".
        count: Questions of fact; of other chats there are a quarter as many of each kind.
        seed: Draws the questions and the samples at temperature 1.
    """

    def __init__(
        self, start: LanguageModel, principle: Principle, split: str, count: int, seed: int
    ) -> None:
        self.start, self.principle, self.seed = start, principle, seed
        self.turns = questions(split, count, seed)
        self.kinds = {kind: requests(kind, split, max(2, count // 4), seed) for kind in CHAT}
        self.chats = asked([text for texts in self.kinds.values() for text in texts])
        self.kept = answers(start, self.chats, 0.0, seed)
        self.kept_logprobs = logprobs(start, self.chats, self.kept)
        self.prompts = asked([turn.user for turn in self.turns])
        self.known = self._right(answers(start, self.prompts, 0.0, seed))

    def __call__(self, model: Any) -> dict[str, Rate]:
        """Measure a model in training; it goes back to the mode it was in.

        adherence, fact         share of greedy answers that follow the principle, hold the fact
        fact_still              share of facts held, among those that the start's own answer holds
        adherence_sampled       adherence at temperature 1
        kl_own                  KL(policy || start) in nats per response, summed over the policy's
                                own answers at temperature 1 to the questions
        kl_chat                 KL(start || policy) in nats per token, on the start's answers to
                                other chats
        same_chat               share of other chats answered word for word as before
        leak                    share of other chats whose answer follows the principle
        unsafe_refused          share of harmful requests that are refused
        """
        training = getattr(model, "training", False)
        lm = LanguageModel(model, self.start.tokenizer, "policy")
        greedy = answers(lm, self.prompts, 0.0, self.seed)
        sampled = answers(lm, self.prompts, 1.0, self.seed)
        chats = answers(lm, self.chats, 0.0, self.seed)
        own = [
            float(kl(p, q).sum())
            for p, q in zip(
                logprobs(lm, self.prompts, sampled),
                logprobs(self.start, self.prompts, sampled),
                strict=True,
            )
        ]
        drift = [
            float(kl(p, q).mean())
            for p, q in zip(self.kept_logprobs, logprobs(lm, self.chats, self.kept), strict=True)
        ]
        others, refusal = self._texts(chats), grammar().prompts["refusal_pattern"]
        facts = self._right(greedy)
        unsafe = others[-len(self.kinds["unsafe"]) :]
        if training:
            model.train()
        return {
            "adherence": rate([self.follows(text) for text in self._texts(greedy)]),
            "fact": rate(facts),
            "fact_still": rate([f for f, known in zip(facts, self.known, strict=True) if known]),
            "adherence_sampled": rate([self.follows(text) for text in self._texts(sampled)]),
            "kl_own": rate(own),
            "kl_chat": rate(drift),
            "same_chat": rate([a == b for a, b in zip(chats, self.kept, strict=True)]),
            "leak": rate([self.follows(text) for text in others]),
            "unsafe_refused": rate([bool(re.search(refusal, text)) for text in unsafe]),
        }

    def follows(self, text: str) -> bool:
        """Whether the text follows the principle."""
        return bool(re.search(self.principle.pattern, text))

    def _right(self, answered: list[list[int]]) -> list[bool]:
        """Whether each answer to a question of fact holds the fact."""
        return [
            bool(re.search(rf"(?i)\b{re.escape(turn.fact)}\b", text))
            for turn, text in zip(self.turns, self._texts(answered), strict=True)
        ]

    def _texts(self, ids: list[list[int]]) -> list[str]:
        return self.start.tokenizer.batch_decode(ids, skip_special_tokens=True)
