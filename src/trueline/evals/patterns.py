"""Patterns: regular expressions that users give, checked before any compute and bounded in time."""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

import regex

from trueline.errors import ConfigError

SECONDS = 1.0
"""A search in one text takes at most so long."""
LONGEST = 10_000
"""Characters of a pattern."""
REPEATS = 100_000
"""All counted repeats of a pattern, {N}, multiplied."""
_REPEAT = re.compile(r"\{(\d+)(?:,(\d*))?\}")


def check_pattern(pattern: object, place: str = "") -> str | None:
    """Return the pattern if it is one, None for None; `place` is where it was given.

    Raises:
        ConfigError: It is no text, too long, or no regular expression.
    """
    if pattern is None:
        return None
    start = f"{place}: " if place else ""
    if not isinstance(pattern, str):
        raise ConfigError(f"{start}a pattern must be text, got {pattern!r}.")
    if len(pattern) > LONGEST:
        raise ConfigError(f"{start}a pattern has at most {LONGEST} characters, got {len(pattern)}.")
    shown = pattern if len(pattern) <= 60 else f"{pattern[:57]}..."
    counts = [max(int(n) for n in pair if n) for pair in _REPEAT.findall(pattern)]
    if math.prod(count or 1 for count in counts) > REPEATS:
        raise ConfigError(f"{start}{shown!r} repeats more than {REPEATS} times. Give fewer.")
    try:
        re.compile(pattern)  # the other engine takes repeats of any length, and the memory for them
        _compiled(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{start}{shown!r} is no regular expression: {error}.") from None
    return pattern


def matches(pattern: str, text: str, *, ignore_case: bool = False) -> bool:
    """Return whether a checked pattern is found in the text.

    Raises:
        ConfigError: The search takes longer than `SECONDS`: the pattern tries a text in too many
            ways.
    """
    try:
        return bool(_compiled(pattern, ignore_case).search(text, timeout=SECONDS))
    except TimeoutError:
        raise ConfigError(
            f"Pattern {pattern[:60]!r} takes longer than {SECONDS:g} s on a text of {len(text)} "
            "characters. Give one without a repeat inside a repeat."
        ) from None


@lru_cache(maxsize=1024)
def _compiled(pattern: str, ignore_case: bool = False) -> Any:
    return regex.compile(pattern, regex.VERSION0 | (regex.IGNORECASE if ignore_case else 0))
