"""Packed weights: the same product, never stale, and off where they do not serve."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import random_model
from torch import nn

from trueline.models import packed as linear
from trueline.models.packed import can_pack, pack_weights

pytestmark = pytest.mark.skipif(
    not can_pack(torch.float32), reason="packed weights: a build of torch with oneDNN"
)


@pytest.fixture
def pack_small(monkeypatch):
    monkeypatch.setattr(linear, "MIN_WEIGHTS", {torch.float32: 0, torch.bfloat16: 0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_product_for_all_row_counts(pack_small, dtype, bias):
    if not can_pack(dtype):
        pytest.skip("packed bfloat16: a processor with bfloat16 instructions")
    torch.manual_seed(0)
    module = nn.Linear(48, 80, bias=bias, dtype=dtype)
    own = copy.deepcopy(module)
    assert pack_weights(module) == 1
    with torch.inference_mode():
        for shape in ((1, 1, 48), (2, 1, 48), (3, 48), (16, 1, 48), (4, 9, 48)):
            x = torch.randn(shape, dtype=dtype)
            tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
            torch.testing.assert_close(module(x), own(x), **tolerance)


def test_a_whole_model_gives_the_same_logits(pack_small):
    model = random_model("llama")
    ids = torch.arange(40).reshape(5, 8)
    with torch.inference_mode():
        expected = model(ids).logits
        packed = copy.deepcopy(model)
        assert pack_weights(packed) == sum(type(m) is nn.Linear for m in model.modules())
        torch.testing.assert_close(packed(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_changed_weights_are_noticed(pack_small):
    module = nn.Linear(16, 16)
    pack_weights(module)
    x = torch.randn(8, 16)
    with torch.no_grad():
        before = module(x)
        module.weight.mul_(2)
        after = module(x)
        torch.testing.assert_close(after, nn.functional.linear(x, module.weight, module.bias))
        assert not torch.allclose(before, after)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_weights_of_their_own(pack_small, clone):
    module = nn.Linear(16, 16)
    pack_weights(module)
    x = torch.randn(8, 16)
    with torch.no_grad():
        expected = module(x)
        other = clone(module)
        other.weight.zero_()
        torch.testing.assert_close(other(x), other.bias.expand(8, -1))
        torch.testing.assert_close(module(x), expected)


def test_training_uses_torchs_own_product(pack_small):
    module = nn.Linear(16, 16)
    pack_weights(module)
    module(torch.randn(8, 16)).sum().backward()
    assert module.weight.grad is not None


def test_large_models_and_other_modules_are_left_alone(pack_small, monkeypatch):
    class Special(nn.Linear):
        pass

    assert pack_weights(Special(16, 16)) == 0
    monkeypatch.setattr(linear, "MAX_BYTES", 100)
    assert pack_weights(nn.Linear(16, 16)) == 0
    assert pack_weights(nn.Linear(16, 16), force=True) == 1
