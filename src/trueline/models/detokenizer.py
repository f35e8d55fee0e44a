"""Token ids to text, piece by piece, without splitting characters or missing a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Detokenizer:
    """The growing text of one completion.

    `push` returns text that is final: whole characters that cannot become part of a stop string.
    Decoding starts at a recent border, so a token costs the same at any length.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.text = ""
        """All text so far, also what is held back."""
        self.stopped = False
        """Whether a stop string was found; `text` then ends before it."""
        self._start = self._border = self._given = 0

    def push(self, token_id: int) -> str:
        """Add a token and return the text that became final."""
        self.ids.append(token_id)
        known = self._decode(self.ids[self._start : self._border])
        grown = self._decode(self.ids[self._start :])
        if len(grown) > len(known) and not grown.endswith("\ufffd"):
            self._append(grown[len(known) :])
            self._start, self._border = self._border, len(self.ids)
        return self._give(len(self.text) - (0 if self.stopped else self._held_back()))

    def finish(self) -> str:
        """Return what was held back, now that no token follows."""
        if not self.stopped:
            known = self._decode(self.ids[self._start : self._border])
            self._append(self._decode(self.ids[self._start :])[len(known) :])
        return self._give(len(self.text))

    def _append(self, piece: str) -> None:
        longest = max((len(s) for s in self.stop), default=0)
        search_from = max(0, len(self.text) - longest + 1)
        self.text += piece
        found = [i for s in self.stop if (i := self.text.find(s, search_from)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held_back(self) -> int:
        """Return how many last characters may be the beginning of a stop string."""
        for size in range(max((len(s) for s in self.stop), default=1) - 1, 0, -1):
            tail = self.text[-size:]
            if len(tail) == size and any(s.startswith(tail) for s in self.stop):
                return size
        return 0

    def _give(self, end: int) -> str:
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
