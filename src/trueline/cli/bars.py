"""Bars: the progress of a job on stderr.

A job tells `progress(what, done, total)`; here that becomes a bar that leaves room for itself in a
terminal of any width, and that is off the line before anything else is written.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator

from trueline.types import Progress

FORMAT = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
REST = 60
"""Columns of a line that are not for what is being done: the bar and the numbers."""


@contextlib.contextmanager
def bar(unit: str) -> Iterator[Progress]:
    """Show what is told to the yielded function as a bar; `unit` is what is counted, as one.

    What is there before anything is done is said on a line of its own. One thing alone, such as the
    loading of a model, is no bar: on a terminal it is named while it lasts.
    """
    from tqdm import tqdm

    shown: tqdm | None = None
    terminal = sys.stderr.isatty()

    named = False

    def show(what: str, done: int, total: int) -> None:
        nonlocal shown, named
        if shown is not None and (shown.total != total or done < shown.n):
            shown.close()
            shown = None
        if total <= 1 or named:
            named = done < total <= 1
            name_alone(what if named else "")
        if total <= 1:
            return
        if shown is None:
            if done:
                print(f"{done} {unit}s are there already; going on.", file=sys.stderr)
            shown = tqdm(
                desc=fitted(what), total=total, initial=done, unit=unit, bar_format=FORMAT,
                file=sys.stderr,
                mininterval=0.1 if terminal else 30.0, miniters=1, leave=not terminal,
                dynamic_ncols=True,
            )  # fmt: skip
        shown.set_description_str(fitted(what), refresh=False)
        shown.update(done - shown.n)

    try:
        yield show
    finally:
        if shown is not None:
            shown.close()
        if named:
            name_alone("")


def name_alone(what: str) -> None:
    """Show on a terminal what is under way that cannot be counted; nothing clears the line."""
    if sys.stderr.isatty():
        text = f"{what} …" if what else ""
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def fitted(what: str, columns: int | None = None) -> str:
    """Return what stands in front of the bar, cut so that the bar stays readable."""
    room = max(8, (columns or shutil.get_terminal_size().columns) - REST)
    text = " ".join(what.split())
    text = text if len(text) <= room else text[: room - 1] + "…"
    return f"{text} " if text else ""
