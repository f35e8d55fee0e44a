"""Likelihood: teacher-forced log-probabilities of given responses, plain or under a method.

One forward over rows of prompt and response, padded on the left, with explicit positions. Every
number here is a natural logarithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from trueline.engine.scoring import combined, forced_logits
from trueline.errors import DataError, ModelError, check_number
from trueline.models.prompts import chat_of, encode
from trueline.types import Message, Method, check_messages

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


@torch.inference_mode()
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
    check_number("batch_size", batch_size, low=1, whole=True)
    found: dict[int, NDArray[np.float64]] = {}
    for rows, logits in _forward(model, prompts, responses, adapters, batch_size):
        for row, z in zip(rows, logits, strict=True):
            tokens = torch.tensor(responses[row], device=z.device)
            found[row] = _chosen(z, tokens)
    return [found[row] for row in range(len(prompts))]


@torch.inference_mode()
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
    out have minus infinity.
    """
    check_number("batch_size", batch_size, low=1, whole=True)
    prompts, rows, adapters = branch_rows(model, method, chats, responses)
    k = len(prompts) // max(len(chats), 1)
    values: list[NDArray[np.float64]] = []
    per_batch = max(1, batch_size // max(k, 1))
    for start in range(0, len(chats), per_batch):
        stop = min(start + per_batch, len(chats))
        part = slice(start * k, stop * k)
        logits: dict[int, Tensor] = {}
        size = stop * k - start * k
        for indices, found in _forward(model, prompts[part], rows[part], adapters[part], size):
            logits.update(zip(indices, found, strict=True))
        for i in range(stop - start):
            z = torch.stack([logits[i * k + branch] for branch in range(k)], dim=1)
            tokens = torch.tensor(responses[start + i], device=z.device)
            values.append(_chosen(combined(method, z), tokens))
    return values


def branch_rows(
    model: LanguageModel,
    method: Method,
    chats: Sequence[Sequence[Message]],
    responses: Sequence[Sequence[int]],
) -> tuple[list[list[int]], list[Sequence[int]], list[bool]]:
    """Return (prompt ids, response ids, adapter on) of every branch of every chat, in order."""
    if len(chats) != len(responses):
        raise DataError(f"Got {len(responses)} responses for {len(chats)} prompts.")
    if method.base_branches and not model.has_adapter:
        raise ModelError(
            f'Method "{method.name}" switches the adapter off in one branch, but model '
            f'"{model.name}" has no adapter. Pass --adapter FOLDER (`adapter=`).'
        )
    prompts, rows, adapters = [], [], []
    for chat, response in zip(chats, responses, strict=True):
        for branch, messages in enumerate(method.prompts(chat_of(model, chat))):
            prompts.append(encode(model, messages))
            rows.append(response)
            adapters.append(branch not in method.base_branches)
    return prompts, rows, adapters


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


def _forward(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    adapters: Sequence[bool] | None,
    batch_size: int,
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yield row indices, and the logits (time, vocab) that predict each response; longest first."""
    if len(prompts) != len(responses):
        raise DataError(f"Got {len(responses)} responses for {len(prompts)} prompts.")
    for prompt, response in zip(prompts, responses, strict=True):
        check_fits(model, prompt, response)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - len(responses[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        on = None if adapters is None else [adapters[i] for i in rows]
        logits = forced_logits(
            model, [prompts[i] for i in rows], [responses[i] for i in rows], adapters=on
        )
        yield rows, [z.float() for z in logits]


def _chosen(logits: Tensor, tokens: Tensor) -> NDArray[np.float64]:
    """Return log softmax(logits) at the tokens."""
    logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return logprobs.double().cpu().numpy()
