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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", math.inf),
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
