"""One token a row: filters against transformers' own, draws against the distribution."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trueline import ConfigError, SamplingParams
from trueline.engine.sampling import sample, uniforms
from trueline.methods._ops import nucleus


def random_logits(seed=0, batch=4, vocab=40):
    return torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("seed", range(5))
def test_filters_are_those_of_transformers_in_their_order(seed):
    z = random_logits(seed)
    expected = z
    for warper in (TopKLogitsWarper(12), TopPLogitsWarper(0.85), MinPLogitsWarper(0.05)):
        expected = warper(None, expected)
    params = SamplingParams(temperature=1, top_k=12, top_p=0.85, min_p=0.05)
    draws = torch.linspace(0, 0.9999, 2000, dtype=torch.float64)
    for row in range(len(z)):
        many = z[row].expand(2000, -1)
        got = set(sample(many, params, draws).tolist())
        kept = expected[row].softmax(-1) > 1e-3
        assert set(kept.nonzero().flatten().tolist()) <= got
        assert got <= set((expected[row] > -math.inf).nonzero().flatten().tolist())


def test_a_draw_inverts_the_cumulative_distribution():
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    draws = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.999999], dtype=torch.float64)
    got = sample(p.log().expand(6, -1), SamplingParams(temperature=1), draws)
    assert got.tolist() == [0, 0, 2, 2, 3, 3]


def test_a_draw_of_almost_one_takes_the_last_token_with_mass():
    z = torch.tensor([[0.0, 0.0, -math.inf]])
    draw = torch.tensor([1.0], dtype=torch.float64)  # what rounding can make of 1 - 1e-17
    assert sample(z, SamplingParams(temperature=1), draw).tolist() == [1]


def test_frequencies_are_the_probabilities():
    z = torch.tensor([1.0, 0.0, -1.0])
    draws = uniforms(3, 20_000)
    got = sample(z.expand(20_000, -1), SamplingParams(temperature=1), draws)
    for token, p in enumerate(z.softmax(-1).tolist()):
        assert (got == token).float().mean().item() == pytest.approx(p, abs=0.012)


def test_greedy_takes_the_largest():
    z = random_logits()
    assert torch.equal(sample(z, SamplingParams(), None), z.argmax(-1))


def test_draws_depend_on_seed_and_position_only():
    assert torch.equal(uniforms(1, 5), uniforms(1, 9)[:5])
    assert not torch.equal(uniforms(1, 5), uniforms(2, 5))


def test_all_bits_of_a_seed_count_and_its_sign():
    old = torch.rand(4, generator=torch.Generator().manual_seed(2**32 - 1), dtype=torch.float64)
    assert torch.equal(uniforms(2**32 - 1, 4), old), "seeds of 32 bits draw as torch does"
    seeds = [0, 1, -1, 2**31, 2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63), 2**40, 2**40 + 2**33]
    drawn = [tuple(uniforms(seed, 8).tolist()) for seed in seeds]
    assert len(set(drawn)) == len(seeds)
    for seed, draws in zip(seeds, drawn, strict=True):
        assert draws == tuple(uniforms(seed, 8).tolist())
        assert draws[:3] == tuple(uniforms(seed, 3).tolist())
        assert 0 <= min(draws) <= max(draws) < 1
    assert uniforms(2**50, 20_000).mean().item() == pytest.approx(0.5, abs=0.01)


def test_seeds_from_a_hash_do_not_collide():
    """70,000 of 64 bits: modulo 2^32 about half of a collision was to be expected."""
    import hashlib

    seeds = [
        int.from_bytes(hashlib.blake2b(str(i).encode(), digest_size=8).digest(), "big") - 2**63
        for i in range(120_000)
    ]
    low: dict[int, int] = {}
    pairs = [(low[s % 2**32], s) for s in seeds if low.setdefault(s % 2**32, s) != s]
    assert pairs, "some of these agree in their lower 32 bits"
    for a, b in pairs:
        assert not torch.equal(uniforms(a, 4), uniforms(b, 4))


def test_one_string_is_one_stop():
    assert SamplingParams(stop="abc").stop == ("abc",)
    assert SamplingParams(stop=["a", "bc"]).stop == ("a", "bc")


def test_greedy_has_one_completion():
    with pytest.raises(ConfigError, match="`n` must be 1 where `temperature` is 0, got 3"):
        SamplingParams(n=3)
    assert SamplingParams(n=3, temperature=0.1).n == 3


def test_the_nucleus_ends_where_the_mass_before_reaches_top_p():
    z = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert nucleus(z, 0.5).tolist() == [[True, False, False]]
    assert nucleus(z, 0.5001).sum() == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-320),
        ("temperature", 9e-7),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("n", 0),
        ("stop", ("",)),
    ],
)
def test_bad_values_are_named_with_what_we_got(field, value):
    with pytest.raises(ConfigError, match=f"`{field}` must be"):
        SamplingParams(**{field: value})
