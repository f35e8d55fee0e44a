"""What is shown on stderr while a model is loaded, fetched or converted."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from trueline.models.hub import LOADING

WIDTH = 20
"""Characters of the bar."""


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Show each load of a model as one line of a terminal, gone when it has ended.

    Where stderr is no terminal only what happens once is said: that a model is fetched, converted.
    """
    terminal, said = sys.stderr.isatty(), ""

    def tell(what: str, done: int, total: int) -> None:
        nonlocal said
        if terminal:
            bar = f" [{'#' * (WIDTH * done // total):.<{WIDTH}}]" if total > 1 else " …"
            ended = what.startswith("loading") and done == total
            print(f"\r\033[K{'' if ended else what + bar}", end="", file=sys.stderr, flush=True)
        elif what != said and not what.startswith("loading"):
            said = what
            print(what, file=sys.stderr, flush=True)

    token = LOADING.set(tell)
    try:
        yield
    finally:
        LOADING.reset(token)
        if sys.exception() is not None and terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
