"""Three answers to one question: plain, with the method's prompt alone, and under the method."""

from __future__ import annotations

import shutil
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from trueline.errors import ConfigError
from trueline.methods import Plain
from trueline.types import Message, Method, Request, SamplingParams

if TYPE_CHECKING:
    from trueline.engine.decoding import Decoder
    from trueline.types import Completion

NARROWEST = 24
"""Columns narrower than this are stacked instead."""


@dataclass(frozen=True)
class Column:
    """One of the answers: its key in JSON, its title, how it is decoded."""

    key: str
    title: str
    method: Method


def columns(method: Method) -> list[Column]:
    """Return what to compare: plain, the method's prompt alone, the method.

    Raises `ConfigError` if the method is plain decoding itself.
    """
    chosen = [Column("plain", "plain", Plain())]
    for name in ("principle", "safety_prompt", "refusing_prompt", "negative"):
        if text := getattr(method, name, None):
            title = f"{name.removesuffix('_prompt')} prompt"
            chosen.append(Column("prompted", title, Plain(principle=text)))
            break
    if pairs := getattr(method, "principles", None):
        text = "\n".join(principle for principle, weight in pairs if weight > 0)
        if text:
            chosen.append(Column("prompted", "all principles", Plain(principle=text)))
    if method.name != "plain":
        chosen.append(Column("aligned", method.name, method))
    if len(chosen) == 1:
        raise ConfigError(
            "There is nothing to compare with plain decoding. Give --principle TEXT or --method "
            "NAME (in a chat /principle or /method)."
        )
    return chosen


def compare(
    decoder: Decoder,
    messages: Sequence[Message],
    method: Method,
    sampling: SamplingParams,
    seed: int,
) -> list[tuple[Column, Completion]]:
    """Return the answers, decoded as one batch with the same seed."""
    chosen, one = columns(method), replace(sampling, n=1)
    requests = [Request(messages, column.method, one, seed) for column in chosen]
    completions = decoder.complete([decoder.encode(request) for request in requests])
    return list(zip(chosen, completions, strict=True))


def layout(answers: Sequence[tuple[str, str]], width: int | None = None) -> str:
    """Return (title, text) pairs side by side in `width` characters, or stacked where narrow."""
    width = width or shutil.get_terminal_size().columns
    size = (width - 3 * (len(answers) - 1)) // len(answers)
    wide = any(unicodedata.east_asian_width(c) in "WF" for _, text in answers for c in text)
    if size < NARROWEST or wide:
        return "\n\n".join(f"--- {title} ---\n{text}" for title, text in answers)
    cells = [[title[:size], "-" * size, *_wrap(text, size)] for title, text in answers]
    lines = zip_longest(*cells, fillvalue="")
    return "\n".join(" | ".join(cell.ljust(size) for cell in line).rstrip() for line in lines)


def _wrap(text: str, width: int) -> list[str]:
    lines = (textwrap.wrap(line, width) or [""] for line in text.expandtabs().splitlines())
    return [part for line in lines for part in line]
