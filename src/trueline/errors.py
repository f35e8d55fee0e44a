"""Every error that Trueline raises on purpose.

    TruelineError
      ConfigError(ValueError)   an option, a method name, a range
      DataError(ValueError)     a row or a file; the message starts with path:line if there is one
      ModelError(RuntimeError)  a checkpoint that lacks what is needed

A message says what is wrong, what we got and what to do. The command line prints it after
`error: ` and exits with 2; a traceback means a bug of ours.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

LONGEST = 600
"""Characters of a message; what a user gave can be a megabyte."""


class TruelineError(Exception):
    """The root: catch this to catch everything Trueline raises on purpose.

    Its text is one line that a terminal can show, whatever it quotes: other characters are escaped,
    and the middle of a long one is left out.
    """

    def __str__(self) -> str:
        text = " ".join(line.strip() for line in super().__str__().splitlines())
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 3 :]}"
        shown = (c if c.isprintable() else ascii(c)[1:-1] for c in text)
        return "".join(shown)

    def lines(self) -> list[str]:
        """Return what to print: one line, more where several things are wrong at once."""
        return [str(self)]


class ConfigError(TruelineError, ValueError):
    """An option is unknown, misspelt or out of range."""


class DataError(TruelineError, ValueError):
    """A file or a row of it cannot be used."""


class ModelError(TruelineError, RuntimeError):
    """A model or tokenizer lacks what the work needs."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean "..."?` for the closest known name, or the known names."""
    known = list(known)
    spelled = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.6)
    if close:
        return f' Did you mean "{spelled[close[0]]}"?'
    return f" Known: {', '.join(known)}." if known else ""


def check_text(name: str, value: object, advice: str = "Give it some text.") -> None:
    """Raise `ConfigError` unless `value` is text that is not blank."""
    if not isinstance(value, str):
        raise ConfigError(f"`{name}` must be text, got {value!r}. {advice}")
    if not value.strip():
        raise ConfigError(f"`{name}` is empty. {advice}")


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], what: str) -> None:
    """Raise `ConfigError` unless `value` is of one of these types."""
    if not isinstance(value, kinds):
        raise ConfigError(f"`{name}` must be {what}, got {value!r}.")


def check_flag(name: str, value: object) -> None:
    """Raise `ConfigError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"`{name}` must be True or False, got {value!r}.")


def check_number(
    name: str,
    value: object,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    whole: bool = False,
    infinite: bool = False,
) -> None:
    """Raise `ConfigError` unless `value` is a number in the range, finite unless `infinite`."""
    right_type = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if right_type:
        assert isinstance(value, (int, float))
        above = low < value if low_open else low <= value
        below = value < high if high_open else value <= high
        if above and below and (infinite or math.isfinite(value)):
            return
    kind = "a whole number" if whole else "a finite number" if not infinite else "a number"
    left, right = "(" if low_open else "[", ")" if high_open else "]"
    if math.isinf(low) and math.isinf(high):
        bounds = ""
    elif math.isinf(high):
        bounds = f" {'above' if low_open else 'of at least'} {low:g}"
    else:
        bounds = f" in {left}{low:g}, {high:g}{right}"
    raise ConfigError(f"`{name}` must be {kind}{bounds}, got {value!r}.")
