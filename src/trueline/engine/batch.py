"""The rows of one forward: ids, mask, positions and cache, for any number of prompt branches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trueline.engine.cache import PrefixStore, new_cache
from trueline.models.load import LanguageModel
from trueline.models.prompts import pad_left

if TYPE_CHECKING:
    from torch import Tensor


class Batch:
    """The rows of one forward: cache, mask, positions."""

    def __init__(self, model: LanguageModel, rows: list[list[int]], adapters: list[bool]) -> None:
        self.model, self.rows, self.adapters = model, rows, adapters
        self.cache = new_cache(model.text_config.num_hidden_layers)
        self.ids, self.mask = pad_left(rows, model.pad_token_id, model.device)
        self.positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        self.padded = len({len(ids) for ids in rows}) > 1

    def prefill(self, store: PrefixStore | None) -> Tensor:
        """Run the prompts and return the logits (row, vocab) of their last tokens."""
        cached = store.fill(self.rows, self.adapters) if store is not None else None
        if cached is not None:
            self.cache = cached
        start = self.cache.get_seq_length()
        logits = self._call(self.ids[:, start:], self.positions[:, start:])
        self.positions = self.positions[:, -1:]
        return logits

    def forward(self, tokens: list[int]) -> Tensor:
        """Feed one token to every row and return the next logits (row, vocab)."""
        ids = torch.tensor(tokens, device=self.mask.device)[:, None]
        self.positions = self.positions + 1
        if self.padded:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self._call(ids, self.positions)

    def select(self, rows: list[int]) -> None:
        """Keep the given rows, which may repeat."""
        index = torch.tensor(rows)  # on the CPU: layers may lie on different devices
        self.cache.batch_select_indices(index)
        self.mask, self.positions = self.mask[index], self.positions[index]
        self.adapters = [self.adapters[row] for row in rows]

    def _call(self, ids: Tensor, positions: Tensor) -> Tensor:
        names = self.model.forward_names
        options: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        if self.padded:
            options["attention_mask"] = self.mask
        if "position_ids" in names:
            options["position_ids"] = positions
        if "logits_to_keep" in names:
            options["logits_to_keep"] = 1
        if not all(self.adapters):
            active = self.model.model.active_adapter
            options["adapter_names"] = [active if on else "__base__" for on in self.adapters]
        return self.model.model(ids, **options).logits[:, -1].float()
