"""Likelihood: teacher-forced log-probabilities of given responses, plain or under a method.

One forward over rows of prompt and response, padded on the left, with explicit positions. Every
number here is a natural logarithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from trueline.engine.protocol import Continuation
from trueline.engine.scoring import combined, longest_first, score
from trueline.errors import DataError, ModelError, check_number
from trueline.models.prompts import chat_of, encode
from trueline.types import Message, Method, base_branches, check_messages

if TYPE_CHECKING:
    from torch import Tensor

    from trueline.models.load import LanguageModel


def response_ids(model: LanguageModel, messages: Sequence[Message], text: str) -> list[int]:
    """Return the ids of `text` as the answer to a chat, as the chat template would write it.

    Found as what the chat with the answer has beyond the chat without it; where the two do not
    share that start, the text is encoded alone. With `model.raw` no line break is put in between.
    """
    tokenizer = model.tokenizer
    if not model.raw and text.strip():
        prompt = encode(model, messages)
        whole = encode(model, [*messages, {"role": "assistant", "content": text}])
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            return whole[len(prompt) :]
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def check_fits(model: LanguageModel, prompt: Sequence[int], response: Sequence[int]) -> None:
    """Raise `DataError` if a row is empty or has more tokens than the model has positions."""
    if not len(prompt) or not len(response):
        raise DataError("A prompt and its response must have at least one token each.")
    # The last token is not fed: nothing is predicted from it.
    needed, limit = len(prompt) + len(response) - 1, model.max_positions
    if limit is not None and needed > limit:
        raise DataError(
            f"Prompt ({len(prompt)} tokens) and response ({len(response)}) need {needed} "
            f'positions; model "{model.name}" has {limit}. Shorten them.'
        )


def response_logprobs(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    adapters: Sequence[bool] | None = None,
    batch_size: int = 16,
) -> list[NDArray[np.float64]]:
    """Return the log-probability of every token of each response after its prompt.

    Args:
        model: From `load_model`.
        prompts: Token ids.
        responses: Token ids, as many as prompts.
        adapters: For each row, whether the model's adapter is on; on by default.
        batch_size: Rows of one forward; the result does not depend on it.

    Raises:
        DataError: A row is empty or does not fit the model.
    """
    _check_pairs(prompts, responses)
    on = [True] * len(prompts) if adapters is None else adapters
    items = []
    for prompt, response, adapter in zip(prompts, responses, on, strict=True):
        check_fits(model, prompt, response)
        items.append(Continuation([prompt], response, (adapter,)))
    return [values[:, 0] for values in branch_logprobs(model, items, batch_size=batch_size)]


def method_logprobs(
    model: LanguageModel,
    method: Method,
    chats: Sequence[Sequence[Message]],
    responses: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> list[NDArray[np.float64]]:
    """Return the log-probability of every token of each response under a decoding method.

    The distribution is what `Decoder` draws from at temperature 1: `method.combine` of the
    branches' logits, and of `rest_branch` alone after `first_tokens`. Tokens that the method rules
    out have minus infinity. `batch_size` counts rows, one for each branch.
    """
    _check_pairs(chats, responses)
    items = branch_items(model, method, chats, responses)
    return _logprobs(model, method, items, batch_size)


def branch_items(
    model: LanguageModel,
    method: Method,
    chats: Sequence[Sequence[Message]],
    responses: Sequence[Sequence[int]],
) -> list[Continuation]:
    """Return each response after the prompts of the method's branches.

    Raises:
        DataError: A row is empty or does not fit the model.
        ModelError: The method needs an adapter and there is none.
    """
    off = base_branches(method)
    if off and not model.has_adapter:
        raise ModelError(
            f'Method "{method.name}" switches the adapter off in one branch, but model '
            f'"{model.name}" has no adapter. Pass --adapter FOLDER (`adapter=`).'
        )
    items = []
    for chat, response in zip(chats, responses, strict=True):
        branches = [encode(model, messages) for messages in method.prompts(chat_of(model, chat))]
        for branch in branches:
            check_fits(model, branch, response)
        on = tuple(k not in off for k in range(len(branches)))
        items.append(Continuation(branches, response, on))
    return items


def branch_logprobs(
    model: LanguageModel, items: Sequence[Continuation], *, batch_size: int = 16
) -> list[NDArray[np.float64]]:
    """Return log-probabilities (time, branch) of each item's tokens, under every branch alone."""
    check_number("batch_size", batch_size, low=1, whole=True)
    found: dict[int, NDArray[np.float64]] = {}
    order = longest_first(items)
    scored = score(model, [items[i] for i in order], rows=batch_size)
    for i, logits in zip(order, scored, strict=True):
        found[i] = np.stack([_chosen(z, items[i].tokens) for z in logits.unbind(1)], 1)
    return [found[i] for i in range(len(items))]


def branch_kl(
    model: LanguageModel, items: Sequence[Continuation], *, batch_size: int = 16
) -> list[NDArray[np.float64]]:
    """Return KL(first branch || second branch) in nats at every token of each item.

    KL(p || q) = sum_i p_i (log p_i - log q_i), over the whole vocabulary
    """
    found: dict[int, NDArray[np.float64]] = {}
    order = longest_first(items)
    scored = score(model, [items[i] for i in order], rows=batch_size)
    for i, logits in zip(order, scored, strict=True):
        p, q = logits.log_softmax(-1).unbind(1)
        found[i] = (p.exp() * (p - q)).sum(-1).clamp(min=0).double().cpu().numpy()
    return [found[i] for i in range(len(items))]


def label_logprobs(
    model: LanguageModel,
    chats: Sequence[Sequence[Message]],
    labels: Sequence[str],
    *,
    method: Method | None = None,
    batch_size: int = 16,
) -> NDArray[np.float64]:
    """Return log P(label | chat), up to one constant a chat: shape (chat, label).

    Every label is scored as the answer to the chat, the sum over its tokens, and the labels of a
    chat are normalised among themselves: exp of a row sums to 1. Rows where a method rules every
    label out are nan.
    """
    chats = [check_messages(chat) for chat in chats]
    pairs = [(chat, label) for chat in chats for label in labels]
    responses = [response_ids(model, chat, label) for chat, label in pairs]
    if method is None:
        prompts = [encode(model, chat) for chat, _ in pairs]
        found = response_logprobs(model, prompts, responses, batch_size=batch_size)
    else:
        found = method_logprobs(
            model, method, [chat for chat, _ in pairs], responses, batch_size=batch_size
        )
    sums = np.array([values.sum() for values in found]).reshape(len(chats), len(labels))
    top = sums.max(axis=1, keepdims=True) if len(labels) else sums
    sums[~np.isfinite(top[:, 0])] = np.nan
    shifted = sums - np.where(np.isfinite(top), top, 0)
    # log p_l - log sum_l' p_l'
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _check_pairs(prompts: Sequence[object], responses: Sequence[object]) -> None:
    if len(prompts) != len(responses):
        raise DataError(f"Got {len(responses)} responses for {len(prompts)} prompts.")


def _logprobs(
    model: LanguageModel, method: Method, items: Sequence[Continuation], rows: int
) -> list[NDArray[np.float64]]:
    """Return the log-probability of every token of each item under the method, in order."""
    check_number("batch_size", rows, low=1, whole=True)
    found: dict[int, NDArray[np.float64]] = {}
    order = longest_first(items)
    scored = score(model, [items[i] for i in order], rows=rows)
    for i, logits in zip(order, scored, strict=True):
        found[i] = _chosen(combined(method, logits), items[i].tokens)
    return [found[i] for i in range(len(items))]


def _chosen(logits: Tensor, tokens: Sequence[int]) -> NDArray[np.float64]:
    """Return log softmax(logits) at the tokens."""
    index = torch.tensor(tokens, device=logits.device)[:, None]
    logprobs = logits.gather(-1, index)[:, 0] - logits.logsumexp(-1)
    return logprobs.double().cpu().numpy()
