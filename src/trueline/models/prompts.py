"""Messages to token ids through the chat template, and rows of ids to a left-padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trueline.errors import DataError, ModelError
from trueline.models.hub import one_line
from trueline.types import Message, check_messages

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from trueline.models.load import LanguageModel


PROBE = "a-system-text-0"
TEMPLATE_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError,
                   RecursionError, MemoryError, AssertionError)  # fmt: skip
"""What the program in a chat template can come to, besides errors of its language."""


def chat_of(model: LanguageModel, messages: str | Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return a chat `with_default`; raises `DataError` for what is not a chat."""
    return with_default(model, check_messages(messages))


def with_default(model: LanguageModel, chat: list[Message]) -> list[Message]:
    """Return a chat that starts with the template's default system text, if it has one.

    Some templates put in a system text of their own where a chat has none. Here it becomes the
    chat's own, so that a method adds its principle to it instead of putting it out, and stays in
    every branch. A chat with a system message, be it empty, and a template without such a text are
    left alone; so are all with `model.default_system` off.
    """
    if chat[0]["role"] == "system" or not model.default_system:
        return chat
    text = default_system(model)
    return chat if text is None else [{"role": "system", "content": text}, *chat]


def default_system(model: LanguageModel) -> str | None:
    """Return the system text that the template puts in where a chat has none; None if it has none.

    Found by rendering a chat without a system message and one with a probe; taken for certain only
    where the text, given as a system message, makes the very prompt that it makes by default.
    """
    if model._default_system is None:
        model._default_system = _find_default(model)
    return model._default_system or None


def _find_default(model: LanguageModel) -> str:
    if model.raw or not model.tokenizer.chat_template or _folds_system(model):
        return ""
    question: Message = {"role": "user", "content": "Why?"}
    try:
        own = _apply(model, [question])
        parts = _apply(model, [{"role": "system", "content": PROBE}, question]).split(PROBE)
        head, tail = parts[0], parts[-1]
        if len(parts) != 2 or not own.startswith(head) or not own.endswith(tail):
            return ""
        text = own[len(head) : len(own) - len(tail)]
        if any(mark in text for mark in model.tokenizer.all_special_tokens):
            return ""  # more than a text
        again = text.strip() and _apply(model, [{"role": "system", "content": text}, question])
    except DataError:
        return ""
    return text if again == own else ""


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
        # An empty system message has no line; an empty context after a principle still ends its.
        text = "\n".join(m["content"] for m in messages if m["content"] or m["role"] != "system")
    else:
        text = render(model, messages)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("The prompt is not text: it has half of a surrogate pair.") from None
    # Quiet about length: `check_length` says it with the model's own limit.
    options = {"add_special_tokens": model.raw, "return_token_type_ids": False, "verbose": False}
    ids = list(model.tokenizer(text, **options)["input_ids"])
    if not ids and not model.raw:
        raise DataError(f'The chat template of "{model.name}" makes no prompt of this chat.')
    return ids


def check_length(model: LanguageModel, branches: Sequence[Sequence[int]]) -> None:
    """Raise `DataError` if a branch is empty or longer than the model has positions."""
    longest, limit = max(map(len, branches)), model.max_positions
    if not min(map(len, branches)):
        raise DataError("The prompt has no tokens. Give it some text.")
    if limit is not None and longest > limit:
        raise DataError(
            f"The prompt has {longest} tokens in its longest branch; model "
            f'"{model.name}" has {limit} positions. Shorten it.'
        )


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
    if messages[0]["role"] == "system":
        if _folds_system(model):
            messages = fold_system(messages)
    elif not model.default_system and default_system(model) is not None:
        # An empty system message is the one way to keep a template from putting in its own.
        messages = [{"role": "system", "content": ""}, *messages]
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
        chat: list[Message] = [
            {"role": "system", "content": PROBE},
            {"role": "user", "content": "Why?"},
        ]
        try:
            model._folds_system = PROBE not in _apply(model, chat)
        except DataError:
            model._folds_system = True
    return model._folds_system


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Return the chat with its system text at the head of the first user message."""
    system, *rest = messages
    if not system["content"]:
        return rest
    first = next(i for i, m in enumerate(rest) if m["role"] == "user")
    text = f"{system['content']}\n\n{rest[first]['content']}"
    return [*rest[:first], {"role": "user", "content": text}, *rest[first + 1 :]]
