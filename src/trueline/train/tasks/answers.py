"""Rows of unequal length as batches, and how likely a model finds an answer, a label or a text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from trueline.errors import DataError
from trueline.models.load import cache_name

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Places in `labels` that the loss passes over."""


def answer_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int
) -> Tensor:
    """Return log P(answer | prompt), shape (prompt, answer): each prompt is read once.

    The prompts' cache is repeated for the answers, which follow it as one more batch.
    """
    ids, mask = padded(prompts, pad, left=True)
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    n, m, width = len(prompts), len(answers), max(map(len, answers))
    # Each prompt's last logits predict the first token of every answer.
    logits = out.logits[:, -1:].repeat_interleave(m, 0)
    tokens, real = (x.to(model.device).repeat(n, 1) for x in padded(answers, pad))
    if width > 1:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        name = cache_name(inspect.signature(base.forward).parameters)
        cache = getattr(out, name)
        cache.batch_repeat_interleave(m)
        long_mask = torch.cat([mask.repeat_interleave(m, 0), real[:, :-1]], 1)
        start = mask.sum(-1).repeat_interleave(m, 0)[:, None]
        after = model(
            input_ids=tokens[:, :-1],
            attention_mask=long_mask,
            position_ids=start + torch.arange(width - 1, device=model.device),
            **{name: cache},
            use_cache=True,
        ).logits
        logits = torch.cat([logits, after], 1)
    return _summed(logits, tokens, real).view(n, m)


def decoder_logprobs(
    model: Any, batch: Mapping[str, Tensor], answers: Sequence[Sequence[int]], pad: int
) -> Tensor:
    """Return log P(answer | prompt) of an encoder-decoder, shape (prompt, answer)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    n, m = len(batch["input_ids"]), len(answers)
    hidden = base.get_encoder()(**batch).last_hidden_state
    tokens, real = (x.to(hidden.device).repeat(n, 1) for x in padded(answers, pad))
    logits = base(
        encoder_outputs=(hidden.repeat_interleave(m, 0),),
        attention_mask=batch["attention_mask"].repeat_interleave(m, 0),
        labels=tokens,
        use_cache=False,
    ).logits
    return _summed(logits, tokens, real).view(n, m)


@torch.no_grad()
def text_loss(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> float:
    """Return the mean cross-entropy of a causal model on texts, in nats a token.

    Each text is cut to `max_length` tokens; texts of a single token say nothing.
    """
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:max_length]])
        if ids.shape[1] > 1:
            ids = ids.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    if not count:
        raise DataError("The unrelated texts have no two tokens in a row.")
    return total / count


def padded(
    rows: Sequence[Sequence[int]], filler: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return rows of unequal length as (ids, mask); mask 1 marks real ones."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(len(row))
        ids[i, part] = torch.tensor(list(row))
        mask[i, part] = 1
    return ids, mask


def by_length(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield places of rows in batches of like length, longest first."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _summed(logits: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """Return the log-probability of each row's real tokens."""
    logprobs = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return (logprobs * real).sum(-1)


def drawn_loss(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean over tokens with a label, times the number of rows."""
    there = labels != IGNORED
    kept = logits[there].float()
    return functional.cross_entropy(kept, drawn(kept, generator)) * len(labels)


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a place drawn from each row's softmax; the draw is made on the CPU."""
    probabilities = logits.detach().softmax(-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
