"""The store of prefixes by hand: what it keeps, what it forgets, which columns a row gets."""

from __future__ import annotations

import torch

from trueline.engine.cache import PrefixStore, new_cache


def filled(store: PrefixStore, adapter: str, *ids: int) -> list[torch.Tensor]:
    """Put one row of random keys and values into the store, and return them."""
    cache = new_cache(1)
    generator = torch.Generator().manual_seed(sum(ids))
    pair = [torch.randn(1, 2, len(ids), 4, generator=generator) for _ in range(2)]
    cache.update(pair[0], pair[1], 0)
    store.put(adapter, ids, cache, 0)
    return pair


def test_as_many_as_its_size_are_kept_and_the_oldest_goes_first():
    store = PrefixStore(size=2)
    for ids in ((1, 2), (3, 4)):
        filled(store, "a", *ids)
    assert list(store.entries) == [("a", (1, 2)), ("a", (3, 4))]
    filled(store, "a", 5, 6)
    assert list(store.entries) == [("a", (3, 4)), ("a", (5, 6))]


def test_turns_with_the_adapter_off_are_not_forgotten_for_turns_with_it_on():
    store = PrefixStore()
    for on in ("a", "b"):
        filled(store, on, 1, 2)
    store.drop_shorter("a", [1, 2, 3])
    assert list(store.entries) == [("b", (1, 2))]


def test_a_row_that_shares_one_id_gets_its_one_column():
    store = PrefixStore()
    long, short = filled(store, "a", 1, 2, 3, 4), filled(store, "a", 7)
    cache = store.fill([[1, 2, 3, 4, 5], [7, 8]], ["a", "a"])
    assert cache is not None
    for part, whole in enumerate((cache.layers[0].keys, cache.layers[0].values)):
        assert whole.shape == (2, 2, 4, 4)
        torch.testing.assert_close(whole[0], long[part][0], atol=0, rtol=0)
        torch.testing.assert_close(whole[1, :, 3:], short[part][0], atol=0, rtol=0)
        assert not whole[1, :, :3].any()
