"""Batches of prompts, each decoded as if it were the first."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trueline.types import Completion

if TYPE_CHECKING:
    from trueline.engine.cache import PrefixStore
    from trueline.engine.decoding import Decoder, Prompt, Step


def each_batch(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    size: int,
    on_step: Callable[[Step], None],
    *,
    first: int = 0,
) -> Iterator[list[list[Completion]]]:
    """Yield the completions of each prompt from the `first`, `size` prompts at a time."""
    prompts = common_prefixes(prompts, max(size, 2))
    for start in range(first, len(prompts), size):
        batch = prompts[start : start + size]
        settle(decoder.store, batch)
        done = iter(decoder.collect(batch, on_step=on_step))
        yield [[next(done) for _ in range(p.sampling.n)] for p in batch]


def settle(store: PrefixStore, prompts: Sequence[Prompt]) -> None:
    """Leave in the store the shared prefixes of these prompts, in their order, or nothing.

    Keys and values taken from the store differ in the last bit from computed ones. With a store
    that depends on the batch alone, a resumed run gives the bytes of an unbroken one.
    """
    kept: dict[Any, Any] = {}
    for p in prompts:
        for branch, prefix in enumerate(p.prefixes):
            key = (branch not in p.method.base_branches, prefix)
            if prefix and key not in store.entries:
                store.entries = {}
                return
            if prefix:
                kept[key] = store.entries[key]
    store.entries = kept


def common_prefixes(prompts: Sequence[Prompt], least: int) -> list[Prompt]:
    """Return the prompts without the prefixes that fewer than `least` of them share."""
    from trueline.engine.decoding import MIN_PREFIX

    used = Counter(prefix for p in prompts for prefix in set(p.prefixes))
    common = {prefix for prefix, n in used.items() if n >= least and len(prefix) >= MIN_PREFIX}
    return [
        dataclasses.replace(p, prefixes=tuple(f if f in common else () for f in p.prefixes))
        for p in prompts
    ]
