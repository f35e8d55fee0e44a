"""Fast products: the same numbers whichever way they take, never stale, the choice remembered."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from conftest import random_model
from torch import nn

from trueline.models import packed, products
from trueline.models.packed import pack_weights
from trueline.models.products import PACKED, TORCH, TRANSPOSED, can_pack, fastest, machine, measure

WAYS = [TORCH, TRANSPOSED, *([PACKED] if can_pack(torch.float32) else [])]


@pytest.fixture
def small(monkeypatch):
    """Matrices of any size take part."""
    monkeypatch.setattr(packed, "MIN_WEIGHTS", {torch.float32: 0, torch.bfloat16: 0})


@pytest.fixture(params=WAYS)
def way(request, small, monkeypatch):
    """Every product goes this way."""
    monkeypatch.setattr(packed, "fastest", lambda *_, **__: request.param)
    return request.param


class Clock(dict):
    """Seconds of each way, and the row counts that were asked for."""

    def __init__(self, said):
        super().__init__(said)
        self.asked = []

    def measure(self, weight, rows):
        self.asked.append(rows)
        return dict(self)


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """A machine of its own, on which the clock says what the test puts into it."""
    monkeypatch.setenv("TRUELINE_CACHE", str(tmp_path))
    said = Clock({TORCH: 1.0, TRANSPOSED: 2.0, PACKED: 3.0})
    monkeypatch.setattr(products, "measure", said.measure)
    yield said
    products._machine.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_product_for_all_row_counts(way, dtype, bias):
    if way == PACKED and not can_pack(dtype):
        pytest.skip("packed bfloat16: a processor with bfloat16 instructions")
    torch.manual_seed(0)
    module = nn.Linear(48, 80, bias=bias, dtype=dtype)
    own = copy.deepcopy(module)
    assert pack_weights(module) == 1
    with torch.inference_mode():
        for shape in ((1, 1, 48), (2, 1, 48), (3, 48), (48,), (16, 1, 48), (4, 9, 48), (0, 48)):
            x = torch.randn(shape, dtype=dtype)
            tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
            torch.testing.assert_close(module(x), own(x), **tolerance)
            assert module(x).is_contiguous()


def test_a_whole_model_gives_the_same_logits(way):
    model = random_model("llama")
    ids = torch.arange(40).reshape(5, 8)
    with torch.inference_mode():
        expected = model(ids).logits
        fast = copy.deepcopy(model)
        assert pack_weights(fast) == sum(type(m) is nn.Linear for m in model.modules())
        torch.testing.assert_close(fast(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_changed_weights_are_noticed(way):
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
def test_copies_have_weights_of_their_own(way, clone):
    module = nn.Linear(16, 16)
    pack_weights(module)
    x = torch.randn(8, 16)
    with torch.no_grad():
        expected = module(x)
        other = clone(module)
        other.weight.zero_()
        torch.testing.assert_close(other(x), other.bias.expand(8, -1))
        torch.testing.assert_close(module(x), expected)


def test_training_uses_torchs_own_product(way):
    module = nn.Linear(16, 16)
    pack_weights(module)
    module(torch.randn(8, 16)).sum().backward()
    assert module.weight.grad is not None


def test_large_models_pack_nothing_and_other_modules_are_left_alone(small, monkeypatch):
    class Special(nn.Linear):
        pass

    assert pack_weights(Special(16, 16)) == 0
    monkeypatch.setattr(packed, "MAX_BYTES", 100)
    large, forced = nn.Linear(16, 16), nn.Linear(16, 16)
    assert pack_weights(large) == pack_weights(forced, force=True) == 1
    assert (large.forward.may_pack, forced.forward.may_pack) == (False, True)


class TestChoice:
    WEIGHT = torch.randn(40, 24)

    @pytest.mark.parametrize(
        ("times", "may_pack", "expected"),
        [
            ((1.0, 0.5, 0.7), True, TRANSPOSED),
            ((1.0, 0.9, 0.7), True, PACKED),
            ((1.0, 0.9, 0.7), False, TRANSPOSED),
            ((1.0, 0.97, 0.96), True, TORCH),  # a tie
            ((1.0, 1.5, 1.2), True, TORCH),
        ],
    )
    def test_the_least_time_wins_and_ties_are_torchs(self, clock, times, may_pack, expected):
        if not can_pack(torch.float32):
            pytest.skip("packed weights: a build of torch with oneDNN")
        clock.update(zip((TORCH, TRANSPOSED, PACKED), times, strict=True))
        assert fastest(self.WEIGHT, 2, may_pack=may_pack) == expected

    def test_one_clock_decides_for_ever(self, clock):
        """The next process multiplies as this one did, whatever its clock would say."""
        clock[TRANSPOSED] = 0.5
        assert fastest(self.WEIGHT, 2) == TRANSPOSED
        clock[TRANSPOSED] = 2.0
        products._machine.cache_clear()
        assert fastest(self.WEIGHT, 2) == TRANSPOSED
        assert clock.asked == [2]
        # Another process was faster to write its time: both go by the first line.
        other = machine()
        other.known.clear()
        case = ("float32", "40 x 24", 2)
        assert other.times(case, lambda: dict(clock))[TRANSPOSED] == 0.5

    def test_each_shape_dtype_row_count_and_machine_for_itself(self, clock):
        fastest(self.WEIGHT, 1)
        fastest(self.WEIGHT, 2)
        fastest(self.WEIGHT, 5)
        fastest(self.WEIGHT, 6)
        fastest(self.WEIGHT, 1000)
        assert clock.asked == [1, 2, 6, 128]
        fastest(self.WEIGHT.T.contiguous(), 2)
        fastest(self.WEIGHT.bfloat16(), 2)
        assert clock.asked[4:] == [2, 2]
        rows = [json.loads(line) for line in machine().path.read_text().splitlines()]
        assert [(r["dtype"], r["shape"], r["rows"]) for r in rows[-2:]] == [
            ("float32", "24 x 40", 2),
            ("bfloat16", "40 x 24", 2),
        ]
        rows = [row | {"processor": "another"} for row in rows]
        machine().path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        products._machine.cache_clear()
        fastest(self.WEIGHT, 1)
        assert len(clock.asked) == 7, "another machine's times do not count"

    def test_a_file_that_a_kill_tore(self, clock):
        clock[TRANSPOSED] = 0.5
        fastest(self.WEIGHT, 2)
        path = machine().path
        path.write_bytes(b'{"torn\n[]\n\xff\n' + path.read_bytes())
        products._machine.cache_clear()
        clock[TRANSPOSED] = 2.0
        assert fastest(self.WEIGHT, 2) == TRANSPOSED

    def test_where_nothing_can_be_kept_a_rule_decides(self, clock, tmp_path, monkeypatch):
        """Else the same run again could multiply otherwise."""
        (tmp_path / "file").touch()
        monkeypatch.setenv("TRUELINE_CACHE", str(tmp_path / "file"))
        clock[TRANSPOSED] = 0.1
        large = torch.zeros(1000, 500)
        packs = PACKED if can_pack(torch.float32) else TORCH
        assert [fastest(large, rows) for rows in (1, 3, 4, 64)] == [TORCH, TORCH, packs, packs]
        assert fastest(large, 64, may_pack=False) == fastest(self.WEIGHT, 64) == TORCH

    def test_the_clock_itself(self):
        """Ways that do more work take longer, and the user's random numbers stay theirs."""
        state = torch.get_rng_state()
        few, many = (measure(torch.randn(256, n), 2) for n in (64, 2048))
        torch.randn(3)
        assert set(few) == set(WAYS)
        assert all(0 < few[way] < many[way] for way in WAYS)
        torch.set_rng_state(state)
        measure(self.WEIGHT, 1)
        assert torch.equal(torch.get_rng_state(), state)
