"""Keys and values: a cache that grows in place, and the ones of prefixes that come again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trueline.models.prompts import shared_length

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of one row, each (head, time, size), layer by layer."""


class GrowingLayer(DynamicLayer):
    """A layer's keys and values in a buffer with room to grow: a step copies one position."""

    room: int = 64
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new positions and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < new:
            self.buffers = self._longer(key_states, new), self._longer(value_states, new)
            if old and self.keys is not None and self.values is not None:
                self.buffers[0][:, :, :old], self.buffers[1][:, :, :old] = self.keys, self.values
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, old:new] = states
        self.keys, self.values = (buffer[:, :, :new] for buffer in self.buffers)
        return self.keys, self.values

    def _longer(self, states: torch.Tensor, new: int) -> torch.Tensor:
        size = new + max(self.room, new // 2)
        return states.new_empty(*states.shape[:2], size, states.shape[-1])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, which may repeat."""
        super().batch_select_indices(indices)
        self.buffers = None


def new_cache(layers: int) -> DynamicCache:
    """Return an empty cache of `layers` growing layers."""
    cache = DynamicCache()
    cache.layers = [GrowingLayer() for _ in range(layers)]
    return cache


@dataclass
class PrefixStore:
    """Keys and values of token prefixes that several rows or several calls share.

    A prefix is looked up by its ids and whether the adapter was on. At most `size` are kept, the
    least recently used goes first.
    """

    size: int = 64
    entries: dict[tuple[bool, tuple[int, ...]], KeysValues] = field(default_factory=dict)

    def put(self, adapter: bool, ids: Sequence[int], cache: DynamicCache, row: int) -> None:
        """Keep the last len(ids) positions of one row of `cache`, dropping entries it extends."""
        n = len(ids)
        for on, known in list(self.entries):
            if on == adapter and shared_length(known, ids) == len(known):
                del self.entries[on, known]
        self.entries[adapter, tuple(ids)] = [
            (keys[row, :, -n:].clone(), values[row, :, -n:].clone()) for keys, values, *_ in cache
        ]
        while len(self.entries) > self.size:
            self.entries.pop(next(iter(self.entries)))

    def longest(self, adapter: bool, ids: Sequence[int]) -> tuple[KeysValues | None, int]:
        """Return the entry that shares most leading ids with `ids`, and how many it shares."""
        best, length = None, 0
        for key in self.entries:
            if key[0] == adapter and (shared := shared_length(key[1], ids)) > length:
                best, length = key, shared
        if best is None:
            return None, 0
        self.entries[best] = self.entries.pop(best)
        return self.entries[best], length

    def fill(self, rows: Sequence[Sequence[int]], adapters: Sequence[bool]) -> DynamicCache | None:
        """Return a cache with the leading columns of left-padded `rows`, as many as all rows have.

        The rows keep one contiguous padding on the left: with S the longest part that some row
        lacks, every row takes all but its last S ids from the store. None if nothing is shared.
        """
        found = [self.longest(a, ids) for a, ids in zip(adapters, rows, strict=True)]
        # At least the last id is computed: its logits are wanted.
        missing = max(
            max(len(ids) - shared, 1) for ids, (_, shared) in zip(rows, found, strict=True)
        )
        width = max(len(ids) for ids in rows)
        columns = width - missing
        template = next((entry for entry, _ in found if entry is not None), None)
        if columns <= 0 or template is None:
            return None
        cache = new_cache(len(template))
        for i, (keys, values) in enumerate(template):
            both = []
            for part, like in enumerate((keys, values)):
                block = like.new_zeros(len(rows), like.shape[0], columns, like.shape[-1])
                for row, (ids, (entry, _)) in enumerate(zip(rows, found, strict=True)):
                    if entry is not None and (n := columns - (width - len(ids))) > 0:
                        block[row, :, columns - n :] = entry[i][part][:, :n]
                both.append(block)
            cache.update(both[0], both[1], i)
        return cache
