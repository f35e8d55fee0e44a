"""Keys and values: a cache that grows in place, and the ones of prefixes that come again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trueline.models.prompts import shared_length

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of one row, each (head, time, size), layer by layer."""
PrefixKey = tuple[str, tuple[int, ...]]
"""The adapter that was on, and the ids."""


class GrowingLayer(DynamicLayer):
    """A layer's keys and values in a buffer with room to grow: a step copies one position.

    The columns in use are those from `start` on; what lies before is finite and never looked at.
    """

    room: int = 64
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None
    start: int = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new positions and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < self.start + new:
            self._renew(key_states, value_states, key_states.shape[0], new, 0)
        assert self.buffers is not None
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.start + old : self.start + new] = states
        return self._use(new)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`, which may repeat."""
        super().batch_select_indices(indices)
        self.buffers, self.start = None, 0

    def join(self, other: GrowingLayer, places: list[int], rows: int, width: int) -> None:
        """Write the rows of `other` over or behind these: `rows` rows of `width` columns in all."""
        theirs, mine = other.get_seq_length(), self.get_seq_length()
        if not theirs:
            return
        assert other.keys is not None
        assert other.values is not None
        assert self.keys is not None
        lead = width - mine
        if self.buffers is None or rows > self.keys.shape[0] or lead > self.start:
            self._renew(other.keys, other.values, rows, width, max(0, lead))
            self.start -= min(0, lead)
        else:
            self.start -= lead
        end = self.start + width
        assert self.buffers is not None
        for buffer, states in zip(self.buffers, (other.keys, other.values), strict=True):
            buffer[places, :, end - theirs : end] = states.to(buffer)
        self._use(width)

    def take_back(self, count: int, shifts: list[int], width: int) -> None:
        """Drop the last `count` columns, move each row right by its shift, keep `width` columns."""
        self._use(self.get_seq_length() - count)
        assert self.buffers is not None
        end = self.start + self.get_seq_length()
        for row, shift in enumerate(shifts):
            for buffer in self.buffers if shift else ():
                own = buffer[row, :, self.start : end]
                own[:, shift:] = own[:, :-shift].clone()
        self.start = end - width
        self._use(width)

    def _renew(
        self, keys: torch.Tensor, values: torch.Tensor, rows: int, columns: int, lead: int
    ) -> None:
        """Move to buffers of at least these rows and columns, `lead` columns of zeros first."""
        old, pair = self.get_seq_length(), []
        columns = max(columns, lead + old)
        for like, states in ((keys, self.keys), (values, self.values)):
            size = columns + max(self.room, columns // 2)
            buffer = like.new_empty(rows, like.shape[1], size, like.shape[-1])
            if old and states is not None:
                buffer[: states.shape[0], :, lead : lead + old] = states
                buffer[:, :, :lead] = 0
                buffer[states.shape[0] :, :, : lead + old] = 0
            pair.append(buffer)
        self.buffers, self.start = (pair[0], pair[1]), 0

    def _use(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Let the columns from `start` on be the keys and values."""
        assert self.buffers is not None
        end = self.start + columns
        self.keys, self.values = (buffer[:, :, self.start : end] for buffer in self.buffers)
        return self.keys, self.values


def new_cache(layers: int) -> DynamicCache:
    """Return an empty cache of `layers` growing layers."""
    cache = DynamicCache()
    cache.layers = [GrowingLayer() for _ in range(layers)]
    return cache


@dataclass
class PrefixStore:
    """Keys and values of token prefixes that several rows or several calls share.

    A prefix is looked up by its ids and the adapter that was on. At most `size` are kept, of at
    most `max_bytes` together; the least recently used goes first.
    """

    size: int = 64
    max_bytes: int = 1 << 30
    entries: dict[PrefixKey, KeysValues] = field(default_factory=dict)

    def put(self, adapter: str, ids: Sequence[int], cache: DynamicCache, row: int) -> None:
        """Keep the last len(ids) positions of one row of `cache`."""
        n = len(ids)
        self.entries.pop((adapter, tuple(ids)), None)
        self.entries[adapter, tuple(ids)] = [
            (keys[row, :, -n:].clone(), values[row, :, -n:].clone()) for keys, values, *_ in cache
        ]
        while self.entries and (len(self.entries) > self.size or self.nbytes > self.max_bytes):
            self.entries.pop(next(iter(self.entries)))

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(
            keys.nbytes + values.nbytes for entry in self.entries.values() for keys, values in entry
        )

    def knows(self, key: PrefixKey) -> bool:
        """Return whether a prefix is there; it then counts as just used."""
        if key not in self.entries:
            return False
        self.entries[key] = self.entries.pop(key)
        return True

    def drop_shorter(self, adapter: str, ids: Sequence[int]) -> None:
        """Forget the entries that `ids` begin with: turns of a conversation that has gone on."""
        for on, known in list(self.entries):
            if on == adapter and shared_length(known, ids) == len(known):
                del self.entries[on, known]

    def longest(
        self, adapter: str, ids: Sequence[int], among: Collection[PrefixKey] | None = None
    ) -> tuple[KeysValues | None, int]:
        """Return the entry that shares most leading ids with `ids`, and how many it shares."""
        best, length = None, 0
        for key in self.entries if among is None else among:
            if key[0] != adapter or key not in self.entries:
                continue
            if (shared := shared_length(key[1], ids)) > length:
                best, length = key, shared
        if best is None:
            return None, 0
        self.knows(best)
        return self.entries[best], length

    def fill(
        self,
        rows: Sequence[Sequence[int]],
        adapters: Sequence[str],
        among: Collection[PrefixKey] | None = None,
    ) -> DynamicCache | None:
        """Return a cache with the leading columns of left-padded `rows`, as many as all rows have.

        The rows keep one contiguous padding on the left: with S the longest part that some row
        lacks, every row takes all but its last S ids from the store. None if nothing is shared.
        """
        found = [self.longest(a, ids, among) for a, ids in zip(adapters, rows, strict=True)]
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
