"""Messages to token ids through the chat template, and rows of ids to a left-padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from trueline.errors import DataError, ModelError
from trueline.models.hub import one_line
from trueline.types import Message

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from trueline.models.load import LanguageModel


TEMPLATE_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError,
                   RecursionError, MemoryError, AssertionError)  # fmt: skip
"""What the program in a chat template can come to, besides errors of its language."""


def encode(model: LanguageModel, messages: Sequence[Message]) -> list[int]:
    """Return the token ids of a chat, ready for the model to answer.

    With a chat template the ids are the template's own (no further special tokens); a last message
    from the assistant is continued. A template without a system role gets the system text at the
    head of the first user message. With `model.raw` the contents are joined by line breaks.

    Raises:
        ModelError: The tokenizer has no chat template and `model.raw` is off.
        DataError: The template refuses these messages.
    """
    if model.raw:
        text = "\n".join(message["content"] for message in messages)
    else:
        text = render(model, messages)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("The prompt is not text: it has half of a surrogate pair.") from None
    # Quiet about length: `Decoder.check_length` says it with the model's own limit.
    options = {"add_special_tokens": model.raw, "return_token_type_ids": False, "verbose": False}
    return list(model.tokenizer(text, **options)["input_ids"])


def system_prefix(model: LanguageModel, messages: Sequence[Message]) -> list[int]:
    """Return the leading ids that every chat with the same system message shares.

    Found by encoding two different questions, so a template may put what it likes around the text.
    """
    system = [m for m in messages[:1] if m["role"] == "system"]
    questions = ("0", "Why?")
    rows = [encode(model, [*system, {"role": "user", "content": q}]) for q in questions]
    return rows[0][: shared_length(*rows)]


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading ids `a` and `b` share."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))


def pad_left(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[Int[Tensor, "row time"], Int[Tensor, "row time"]]:
    """Return (ids, mask) with every row ending at the last column; mask 1 marks real tokens."""
    width = max(len(row) for row in rows)
    ids = [[pad_token_id] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def render(model: LanguageModel, messages: Sequence[Message]) -> str:
    """Return the text of a chat through the template; see `encode`."""
    tokenizer = model.tokenizer
    if not tokenizer.chat_template:
        raise ModelError(
            f'Model "{model.name}" has no chat template. Pass --chat-template FILE (in Python '
            "`chat_template=`), or --raw (`raw=True`) to send the prompt as it is."
        )
    if messages[0]["role"] == "system" and _folds_system(model):
        messages = fold_system(messages)
    return _apply(model, messages)


def _apply(model: LanguageModel, messages: Sequence[Message]) -> str:
    from jinja2.exceptions import TemplateError

    open_answer = messages[-1]["role"] == "assistant"
    try:
        return str(
            model.tokenizer.apply_chat_template(
                [{"role": m["role"], "content": m["content"]} for m in messages],
                tokenize=False,
                add_generation_prompt=not open_answer,
                continue_final_message=open_answer,
            )
        )
    except (TemplateError, *TEMPLATE_ERRORS) as error:
        raise DataError(
            f'The chat template of "{model.name}" refuses this chat: {one_line(error)}'
        ) from None


def _folds_system(model: LanguageModel) -> bool:
    """Return whether the template has no system role: it raises on one, or drops its text."""
    if model._folds_system is None:
        probe = "a-system-text-0"
        chat: list[Message] = [
            {"role": "system", "content": probe},
            {"role": "user", "content": "Why?"},
        ]
        try:
            model._folds_system = probe not in _apply(model, chat)
        except DataError:
            model._folds_system = True
    return model._folds_system


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Return the chat with its system text at the head of the first user message."""
    system, *rest = messages
    first = next(i for i, m in enumerate(rest) if m["role"] == "user")
    text = f"{system['content']}\n\n{rest[first]['content']}"
    return [*rest[:first], {"role": "user", "content": text}, *rest[first + 1 :]]
