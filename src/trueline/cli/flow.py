"""Text that comes in pieces, broken at words where it runs off the terminal."""

from __future__ import annotations

import re
import shutil
import sys
import unicodedata
from typing import TextIO

NARROWEST = 20
"""Terminals narrower than this are left to break lines themselves."""


def cells(text: str) -> int:
    """Return how many columns a terminal needs for a text without line breaks."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


class Flow:
    """Writes pieces as they come; on a terminal a word that does not fit starts a new line.

    The last word waits for its end. What is no terminal gets every piece as it is.
    """

    def __init__(self, file: TextIO | None = None, width: int | None = None) -> None:
        self.file = sys.stdout if file is None else file
        if width is None and self.file.isatty():
            width = shutil.get_terminal_size().columns
        self.width = width if width is not None and width >= NARROWEST else None
        self.column, self.word = 0, ""

    def write(self, piece: str) -> None:
        """Write a piece."""
        if self.width is None:
            self.file.write(piece)
        else:
            *whole, self.word = re.split(r"(?<=[ \n])", self.word + piece)
            for part in whole:
                self._put(part)
        self.file.flush()

    def end(self) -> None:
        """Write what waits, and a line break."""
        self._put(self.word)
        self.word = ""
        self.file.write("\n")
        self.file.flush()
        self.column = 0

    def _put(self, part: str) -> None:
        """Write a word with the blank or the line break behind it."""
        size = cells(part.rstrip(" \n"))
        if self.width is not None and self.column and self.column + size > self.width:
            self.file.write("\n")
            self.column = 0
        self.file.write(part)
        self.column = 0 if part.endswith("\n") else self.column + cells(part)
