"""Bars: the progress of a job on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from tqdm import tqdm

from trueline.types import Progress


@contextlib.contextmanager
def bar(unit: str) -> Iterator[Progress]:
    """Show what is told to the yielded function as a bar; `unit` is what is counted, as one.

    What is there before anything is done is said on a line of its own.
    """
    shown: tqdm | None = None

    def show(what: str, done: int, total: int) -> None:
        nonlocal shown
        if shown is None:
            if done:
                print(f"{done} {unit}s are there already; going on.", file=sys.stderr)
            every = 0.2 if sys.stderr.isatty() else 30.0
            shown = tqdm(total=total, initial=done, unit=unit, mininterval=every, file=sys.stderr)
        elif shown.total != total or done < shown.n:
            shown.reset(total)
        shown.set_postfix_str(what, refresh=False)
        shown.update(done - shown.n)

    try:
        yield show
    finally:
        if shown is not None:
            shown.close()
