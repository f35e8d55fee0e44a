"""The rows of one forward: ids, mask, positions and cache, for any number of prompt branches."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from trueline.engine.cache import GrowingLayer, PrefixKey, PrefixStore, new_cache
from trueline.models.load import LanguageModel
from trueline.models.prompts import pad_left

if TYPE_CHECKING:
    from torch import Tensor


class Batch:
    """The rows of one forward: cache, mask, positions. Every row ends at the last column.

    `adapters` names each row's adapter, `BASE` where none is on.
    """

    def __init__(self, model: LanguageModel, rows: list[list[int]], adapters: list[str]) -> None:
        self.model, self.rows, self.adapters = model, rows, adapters
        self.cache = new_cache(model.text_config.num_hidden_layers)
        self.ids, self.mask = pad_left(rows, model.pad_token_id, model.device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.lengths = [len(ids) for ids in rows]
        self.padded = len(set(self.lengths)) > 1

    def prefill(
        self, store: PrefixStore | None, among: Collection[PrefixKey] | None = None
    ) -> Tensor:
        """Run the prompts and return the logits (row, vocab) of their last tokens.

        What the store knows is not computed again; of its entries only `among`, if given, count.
        """
        cached = store.fill(self.rows, self.adapters, among) if store is not None else None
        if cached is not None:
            self.cache = cached
        start = self.cache.get_seq_length()
        logits = self._call(self.ids[:, start:], self.positions[:, start:])
        self.positions = self.positions[:, -1:]
        return logits[:, -1]

    def forward(self, tokens: list[list[int]], idle: Sequence[int] = ()) -> Tensor:
        """Feed tokens (row, time) and return the logits (row, time, vocab) behind each of them.

        `idle` rows wait for `join` to write over them: they grow no longer.
        """
        ids, count = torch.tensor(tokens, device=self.mask.device), len(tokens[0])
        positions = self.positions + torch.arange(1, count + 1, device=self.mask.device)
        self.lengths = [length + count for length in self.lengths]
        for row in idle:
            positions[row], self.lengths[row] = 0, 1
        if count > 1 and self.model.max_positions is not None:
            positions = positions.clamp(max=self.model.max_positions - 1)  # `keep` drops those
        self.positions = positions[:, -1:]
        if self.padded:
            self.mask = torch.cat([self.mask, self.mask.new_ones(ids.shape)], dim=1)
        return self._call(ids, positions, count)

    def keep(self, counts: list[int], of: int) -> None:
        """Take back all but the first counts[row] of the `of` tokens that were fed last.

        Every row ends at the last column again: rows that keep fewer move to the right.
        """
        if min(counts) == of:
            return
        drop, most = [of - count for count in counts], max(counts)
        self.lengths = [length - n for length, n in zip(self.lengths, drop, strict=True)]
        shifts, width = [most - count for count in counts], max(self.lengths)
        for layer in self.cache.layers:
            cast(GrowingLayer, layer).take_back(of - most, shifts, width)
        lengths = torch.tensor(self.lengths, device=self.mask.device)
        self.positions = lengths[:, None] - 1
        self._mask(lengths, width)

    def select(self, rows: list[int]) -> None:
        """Keep the given rows, which may repeat."""
        index = torch.tensor(rows)  # on the CPU: layers may lie on different devices
        self.cache.batch_select_indices(index)
        self.mask, self.positions = self.mask[index], self.positions[index]
        self.adapters = [self.adapters[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]

    def join(self, other: Batch, free: Sequence[int] = ()) -> list[int]:
        """Take in the rows of `other`, both sides padded on the left; return where each went.

        `free` rows are written over first. Columns that no row uses any more are dropped.
        """
        old, new = len(self.lengths), len(other.lengths)
        places = [*free, *range(old, old + new)][:new]
        rows = max(old, 1 + max(places))
        self.positions = torch.cat([self.positions, other.positions[: rows - old]])
        self.positions[places] = other.positions
        self.lengths += other.lengths[: rows - old]
        self.adapters += other.adapters[: rows - old]
        for place, length, adapter in zip(places, other.lengths, other.adapters, strict=True):
            self.lengths[place], self.adapters[place] = length, adapter
        width = max(self.lengths)
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            cast(GrowingLayer, mine).join(cast(GrowingLayer, theirs), places, rows, width)
        lengths = torch.tensor(self.lengths, device=self.mask.device)
        self._mask(lengths, width)
        return places

    def _mask(self, lengths: Tensor, width: int) -> None:
        """Mask all but the last columns of each row, as many as its length."""
        columns = torch.arange(width, 0, -1, device=self.mask.device)
        self.mask = (columns <= lengths[:, None]).to(self.mask)
        self.padded = min(self.lengths) < width

    def _call(self, ids: Tensor, positions: Tensor, count: int = 1) -> Tensor:
        """Return the logits (row, time, vocab) behind the last `count` of the ids."""
        names = self.model.forward_names
        options: dict[str, Any] = {self.model.cache_name: self.cache, "use_cache": True}
        if self.padded:
            options["attention_mask"] = self.mask
        if "position_ids" in names:
            options["position_ids"] = positions
        if "logits_to_keep" in names:
            options["logits_to_keep"] = count
        options |= self.model.adapter_options(self.adapters)
        return self.model.model(ids, **options).logits[:, -count:].float()
