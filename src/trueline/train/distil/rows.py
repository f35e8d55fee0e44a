"""Prompts to learn from: rows of any form as a data set, in an order that a resumed run keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from trueline.errors import DataError


def dataset_of(rows: Any, name: str) -> Any:
    """Return rows as a data set of the ecosystem, with a `prompt` in each."""
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping) or "prompt" not in row:
                raise DataError(f'{name}[{i}]: no "prompt" in {row!r:.80}.')
            if not isinstance(row["prompt"], (str, list)):
                raise DataError(f"{name}[{i}]: `prompt` must be text or messages.")
            if not isinstance(row.get("principle"), (str, type(None))):
                raise DataError(f"{name}[{i}]: `principle` must be text, got {row['principle']!r}.")
        # One type a column, and the columns of all rows: `from_list` reads the first row's only.
        chats = any(not isinstance(row["prompt"], str) for row in rows)
        if chats:
            rows = [{**row, "prompt": _messages(row["prompt"])} for row in rows]
        names = dict.fromkeys(name for row in rows for name in row)
        rows = Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    columns = getattr(rows, "column_names", None)
    if isinstance(columns, list) and "prompt" not in columns:
        raise DataError(f'`{name}` has no column "prompt"; it has {", ".join(columns) or "none"}.')
    return rows


def _messages(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


class StepSampler(Sampler[int]):
    """The rows of each update in turn, every update's rows `reuse` times; rows left over go out.

    Args:
        rows: How many rows there are.
        step: Rows of an update, of all processes together.
        reuse: Updates made with the same rows.
        seed: Draws the order; None keeps the rows' own.
        update: Returns how many updates were made: the order is a function of seed and epoch, so
            that a resumed run goes on in it.
    """

    def __init__(
        self, rows: int, step: int, reuse: int, seed: int | None, update: Callable[[], int]
    ) -> None:
        self.rows, self.step, self.reuse = rows, step, reuse
        self.seed, self.update = seed, update

    def __len__(self) -> int:
        return self.rows // self.step * self.step * self.reuse

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.rows))
        if self.seed is not None:
            epoch = self.update() // max(len(self) // self.step, 1)
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.rows, generator=generator).tolist()
        for first in range(0, self.rows // self.step * self.step, self.step):
            for _ in range(self.reuse):
                yield from order[first : first + self.step]
