"""One table of contract tests that every method passes, and each one's numbers by another route."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trueline import (
    METHODS,
    AdaCD,
    Blend,
    ConfigError,
    Contrast,
    LinearAlignment,
    Plain,
    SelfCD,
    make_method,
)
from trueline.methods._ops import nucleus, plausible, with_system
from trueline.methods.linear_alignment import dual_direction

CHAT = [{"role": "user", "content": "Why?"}]
EXAMPLES = [
    Plain(),
    Plain(principle="Be brief."),
    LinearAlignment("Be brief."),
    LinearAlignment("Be brief.", epsilon=3.0, norm=2),
    LinearAlignment("Be brief.", epsilon=3.0, norm=1.5, candidates=1),
    LinearAlignment("Be brief.", epsilon=3.0, norm=math.inf, candidates=0.5),
    LinearAlignment("Be brief.", gate=0.4, damping=1.0, mask_temperature=0.5),
    SelfCD(),
    SelfCD(alpha=1.2, plausibility=0.1, first_tokens=3),
    AdaCD(),
    Contrast(guidance=1.7, principle="Be brief.", negative="Ramble."),
    Contrast(base=True),
    Blend((("Be brief.", 2.0), ("Rhyme.", -0.5), ("Be kind.", 0.0))),
]


def random_logits(method, batch=5, vocab=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    branches = len(method.prompts(CHAT))
    return torch.randn(batch, branches, vocab, generator=generator) * 3


@pytest.mark.parametrize("method", EXAMPLES, ids=repr)
class TestContract:
    def test_is_frozen_hashable_and_in_the_table(self, method):
        assert METHODS[method.name] is type(method)
        assert hash(method) == hash(type(method)(**vars(method)))
        with pytest.raises(AttributeError):
            method.name = "x"

    def test_prompts_keep_the_callers_chat(self, method):
        chat = [{"role": "system", "content": "Own."}, *CHAT]
        for messages in method.prompts(chat):
            assert messages[0]["content"].startswith("Own.")
            assert messages[1:] == CHAT
        assert chat[0]["content"] == "Own.", "the caller's messages are not changed"

    def test_logits_and_logprobs_give_the_same_softmax(self, method):
        z = random_logits(method)
        a, b = method.combine(z).softmax(-1), method.combine(z.log_softmax(-1)).softmax(-1)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    def test_rows_do_not_see_each_other(self, method):
        z = random_logits(method)
        whole = method.combine(z)
        for i in range(len(z)):
            torch.testing.assert_close(method.combine(z[i : i + 1])[0], whole[i])

    def test_input_is_left_as_it_was_and_some_token_stays(self, method):
        z = random_logits(method)
        before = z.clone()
        out = method.combine(z)
        assert torch.equal(z, before)
        assert out.isfinite().any(-1).all()
        assert not out.isnan().any()

    def test_equal_branches_leave_the_model_as_it_is(self, method):
        z = random_logits(method)[:, :1].expand(-1, len(method.prompts(CHAT)), -1)
        out = method.combine(z.contiguous())
        kept = out.isfinite()
        torch.testing.assert_close(out[kept], z[:, 0][kept], atol=1e-4, rtol=1e-4)
        assert torch.equal(out.argmax(-1), z[:, 0].argmax(-1))

    def test_branch_marks_exist(self, method):
        branches = range(len(method.prompts(CHAT)))
        assert method.rest_branch in branches
        assert set(method.base_branches) <= set(branches)


class TestLinearAlignment:
    @given(st.floats(-3, 6), st.integers(0, 1000))
    @settings(max_examples=40, deadline=None)
    def test_ratio_form_by_hand(self, ratio, seed):
        method = LinearAlignment("x", ratio=ratio, candidates=1)
        z = random_logits(method, seed=seed)
        expected = [
            [p + ratio * (p - q) for p, q in zip(*branches, strict=True)]
            for branches in z.double().tolist()
        ]
        torch.testing.assert_close(
            method.combine(z).double(), torch.tensor(expected).double(), atol=1e-4, rtol=1e-4
        )

    def test_candidates_are_those_of_the_principled_branch(self):
        z = torch.tensor([[[2.0, 1.0, 0.0, -5.0], [0.0, 0.0, 9.0, 9.0]]])
        # softmax of the first row: 0.665, 0.245, 0.090, 0.001
        for top_p, kept in ((0.6, 1), (0.67, 2), (0.8, 2), (0.92, 3), (1, 4)):
            out = LinearAlignment("x", ratio=0, candidates=top_p).combine(z)
            assert out.isfinite().sum() == kept

    def test_closed_form_is_the_best_step_of_its_norm(self):
        generator = torch.Generator().manual_seed(0)
        d = torch.randn(1, 9, generator=generator)
        g = d - d.mean()
        for norm in (1.3, 2.0, 4.0, math.inf):
            step = dual_direction(d, norm)
            assert step.norm(p=norm).item() == pytest.approx(1, abs=1e-5)
            best = (g * step).sum()
            for _ in range(300):
                other = torch.randn(1, 9, generator=generator)
                assert best >= (g * other / other.norm(p=norm)).sum() - 1e-6

    def test_norm_two_and_infinity(self):
        d = torch.tensor([[3.0, -1.0, -2.0]])
        torch.testing.assert_close(dual_direction(d, 2), d / d.norm())
        assert dual_direction(d, math.inf).tolist() == [[1, -1, -1]]
        assert dual_direction(torch.full((1, 4), 7.0), 2).tolist() == [[0] * 4]


class TestGate:
    """Where the principle-prompted branch is sure, less of the step is taken."""

    forms = pytest.mark.parametrize("form", [{"ratio": 2.0}, {"epsilon": 4.0}], ids=str)

    def made(self, form, **options):
        return LinearAlignment("x", candidates=1, **form, **options)

    @forms
    @pytest.mark.parametrize(("gate", "damping"), [(0.45, 0.0), (1.0, 1.0), (0.6, 0.5), (1, 3.0)])
    def test_by_hand(self, form, gate, damping):
        """In floats, row by row: the step from z_p, times what the gate lets through."""
        method = self.made(form, gate=gate, damping=damping)
        z = random_logits(method, batch=12)
        whole = self.made(form).combine(z).tolist()
        shut = 0
        for row, far, got in zip(z.tolist(), whole, method.combine(z).tolist(), strict=True):
            mass = [math.exp(value) for value in row[0]]
            sure = max(mass) / math.fsum(mass)
            share = 0.0 if sure > gate else (1 - sure) ** damping
            shut += share == 0
            wanted = [p + share * (f - p) for p, f in zip(row[0], far, strict=True)]
            assert got == pytest.approx(wanted, abs=1e-4)
        assert gate == 1 or 0 < shut < 12, "rows on both sides of the gate"

    @forms
    def test_open_is_the_whole_step_and_shut_the_prompt(self, form):
        z = random_logits(self.made(form))
        whole = LinearAlignment("x", **form).combine(z)
        assert torch.equal(LinearAlignment("x", **form, gate=1, damping=0).combine(z), whole)
        for shut in ({"gate": 0}, {"damping": 1e6}):
            assert torch.equal(self.made(form, **shut).combine(z), z[:, 0])
        # Above every confidence a gate is open too.
        assert torch.equal(LinearAlignment("x", **form, gate=1 - 1e-6).combine(z), whole)

    @given(st.integers(0, 10_000), st.tuples(st.floats(0, 1), st.floats(0, 1)),
           st.tuples(st.floats(0, 5), st.floats(0, 5)))  # fmt: skip
    @settings(max_examples=60, deadline=None)
    def test_a_gate_that_opens_further_lets_more_through(self, seed, gates, dampings):
        z = random_logits(SelfCD(), seed=seed)
        (low, high), (soft, hard) = sorted(gates), sorted(dampings)

        def step(gate, damping):
            method = self.made({"ratio": 2.0}, gate=gate, damping=damping)
            return (method.combine(z) - z[:, 0]).norm(dim=-1)

        assert (step(low, hard) <= step(high, hard) + 1e-5).all()
        assert (step(high, hard) <= step(high, soft) + 1e-5).all()
        assert (step(high, soft) <= step(1.0, 0.0) + 1e-5).all()

    def test_a_certain_branch_stays_as_it_is(self):
        z = torch.tensor([[[0.0, 200.0, 0.0], [50.0, 0.0, 10.0]]])
        for damping in (0.3, 1.0, 2.5):
            out = self.made({"ratio": 5.0}, damping=damping).combine(z)
            assert torch.equal(out, z[:, 0])


class TestMaskTemperature:
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
    @pytest.mark.parametrize("own", [0.5, 1.0, 3.0])
    def test_candidates_and_gate_read_the_branch_at_it(self, temperature, own):
        """The logits that were not divided, divided by its own temperature."""
        method = LinearAlignment("x", ratio=1.0, gate=0.6, damping=1.0, mask_temperature=own)
        z = random_logits(method, batch=12)
        got = method.combine_at(z / temperature, temperature)
        seen = (z[:, 0].double() / own).softmax(-1)
        keep = nucleus(z[:, 0].double() / own, 0.8)
        sure = seen.amax(-1, keepdim=True)
        share = (1 - sure) * (sure <= 0.6)
        z_p, z_0 = z.double().unbind(1)
        wanted = ((z_p + share * (z_p - z_0)) / temperature).masked_fill(~keep, -math.inf)
        torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-4)

    def test_without_one_it_is_that_of_the_sampling(self):
        z = random_logits(SelfCD())
        loose, own = LinearAlignment("x"), LinearAlignment("x", mask_temperature=0.5)
        assert torch.equal(loose.combine_at(z / 0.5, 0.5), own.combine_at(z / 0.5, 0.5))
        assert not torch.equal(
            loose.combine_at(z / 0.5, 0.5).isfinite(), loose.combine(z).isfinite()
        )

    def test_the_releases_step(self):
        """Its mask at temperature 0.5 and its argmax, with a sort, beside greedy decoding here."""
        z = random_logits(SelfCD(), batch=200)
        method = LinearAlignment("x", ratio=3.0, mask_temperature=0.5)
        moved = 0
        for (z_p, z_0), chosen in zip(z, method.combine(z).argmax(-1), strict=True):
            mass, order = (z_p / 0.5).softmax(-1).sort(descending=True)
            kept = order[(mass.cumsum(-1) - mass) < 0.8]
            probs = ((4 * z_p - 3 * z_0) / 0.5).softmax(-1)
            assert chosen == kept[probs[kept].argmax()]
            moved += int(chosen != z_p.argmax())
        assert moved > 10


class TestSelfCD:
    def test_is_linear_alignment_backwards(self):
        z = random_logits(SelfCD())
        backwards = LinearAlignment("x", ratio=-2.5, candidates=1)
        assert torch.equal(SelfCD(alpha=2.5).combine(z), backwards.combine(z))

    def test_plausibility_is_of_the_plain_branch(self):
        z = torch.tensor([[[9.0, 0.0, 0.0], [0.0, math.log(0.5), math.log(0.05)]]])
        out = SelfCD(plausibility=0.1).combine(z)
        assert out.isfinite().tolist() == [[True, True, False]]


class TestAdaCD:
    def by_hand(self, z_p, z_0, ratio=4.5, threshold=0.9, beta=0.01):
        """The authors' description, one row, with an explicit sort."""
        p_p, p_0 = z_p.softmax(-1), z_0.softmax(-1)
        rank = z_0.argsort(descending=True).tolist().index(int(z_p.argmax())) + 1
        real = 1 / rank >= threshold and p_0.max() >= threshold * p_p.max()
        z = z_p + (ratio if real else -ratio) * (z_p - z_0)
        return torch.where(p_0 >= beta * p_0.max(), z, torch.tensor(-math.inf))

    @pytest.mark.parametrize("seed", range(20))
    def test_by_hand(self, seed):
        z = random_logits(AdaCD(), batch=8, seed=seed)
        z[:4, 1] = z[:4, 0] + 0.1 * z[:4, 1]  # rows in which both branches agree
        expected = torch.stack([self.by_hand(*row) for row in z])
        torch.testing.assert_close(AdaCD().combine(z), expected, atol=1e-4, rtol=1e-4)

    def test_both_signs_occur(self):
        z_p = torch.tensor([4.0, 0.0, 0.0])
        refusal = AdaCD().combine(torch.stack([z_p, z_p * 1.1])[None])
        comply = AdaCD().combine(torch.stack([z_p, z_p.flip(0)])[None])
        assert refusal.argmax() == 0
        assert comply.argmax() == 2


class TestBlend:
    def test_one_principle_is_linear_alignment(self):
        z = random_logits(SelfCD())
        aligned = LinearAlignment("x", ratio=1.5).combine(z)
        blended = Blend((("x", 2.5),)).combine(z.flip(1))
        torch.testing.assert_close(blended, aligned, atol=1e-4, rtol=1e-4)

    def test_by_hand(self):
        blend = Blend((("a", 2.0), ("b", -0.5)), candidates=1)
        z = random_logits(blend)
        z_0, z_a, z_b = z.unbind(1)
        expected = z_0 + 2 * (z_a - z_0) - 0.5 * (z_b - z_0)
        torch.testing.assert_close(blend.combine(z), expected, atol=1e-4, rtol=1e-4)

    def test_candidates_are_a_union_of_positive_branches(self):
        far = -20.0
        z = torch.tensor([[[0, 0, 0, 0], [5, far, far, far], [far, 5, far, far], [far, far, 5, 0]]])
        kept = Blend((("a", 1.0), ("b", 1.0), ("c", -1.0))).combine(z.float()).isfinite()
        assert kept.tolist() == [[True, True, False, False]]


class TestMasks:
    @given(st.integers(0, 10_000), st.floats(0.05, 0.999), st.sampled_from([0.1, 1.0, 5.0]))
    @settings(max_examples=80, deadline=None)
    def test_nucleus_by_sorting(self, seed, top_p, sharpness):
        vocab = 50 if seed % 2 else 700  # the second has more tokens than are looked at first
        z = torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed)) * sharpness
        for row, keep in zip(z.double().softmax(-1), nucleus(z, top_p), strict=True):
            # A token is in while the mass before it is below top_p; among tokens as likely as each
            # other, and on the border itself, rounding decides.
            after = row[:, None] - row
            least = (row[:, None] * (after > 1e-7)).sum(0)
            most = (row[:, None] * (after > -1e-7)).sum(0) - row
            kept = set(keep.nonzero().flatten().tolist())
            assert set((most < top_p - 1e-5).nonzero().flatten().tolist()) <= kept
            assert kept <= set((least < top_p + 1e-5).nonzero().flatten().tolist())
            assert row[list(kept)].sum() >= top_p - 1e-5

    def test_nucleus_keeps_one_at_least(self):
        assert nucleus(torch.tensor([[9.0, 0, 0], [0, 0, 0]]), 0.01).sum(-1).tolist() == [1, 1]

    def test_plausible_by_probability(self):
        z = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * 2
        p = z.softmax(-1)
        assert torch.equal(plausible(z, 0.2), p >= 0.2 * p.max(-1, keepdim=True).values)


class TestSystemText:
    def test_joins_the_callers_own(self):
        own = [{"role": "system", "content": "Own."}, *CHAT]
        assert with_system(own, "More.")[0]["content"] == "Own.\n\nMore."
        assert with_system(CHAT, "More.") == [{"role": "system", "content": "More."}, *CHAT]
        assert with_system(own, None) == own


@pytest.mark.parametrize(
    ("name", "options", "fragment"),
    [
        ("linear-aligment", {}, 'Did you mean "linear-alignment"'),
        ("linear-alignment", {}, "needs `principle`"),
        ("linear-alignment", {"principle": " "}, "`principle` is empty"),
        ("linear-alignment", {"principle": "x", "ratio": math.nan}, "`ratio` must be a finite"),
        ("linear-alignment", {"principle": "x", "ratio": "2"}, "`ratio` must be a finite"),
        ("linear-alignment", {"principle": "x", "candidates": 0}, r"in \(0, 1\], got 0"),
        ("linear-alignment", {"principle": "x", "candidates": 1.5}, r"in \(0, 1\], got 1.5"),
        ("linear-alignment", {"principle": "x", "epsilon": -1}, "`epsilon` must be"),
        ("linear-alignment", {"principle": "x", "norm": 1}, "`norm` must be"),
        ("linear-alignment", {"principle": "x", "gate": 1.1}, r"`gate` must be .* \[0, 1\]"),
        ("linear-alignment", {"principle": "x", "damping": -1}, "`damping` must be"),
        ("linear-alignment", {"principle": "x", "mask_temperature": 0}, "`mask_temperature` must"),
        ("linear-alignment", {"principle": "x", "alpha": 1}, "belongs to self-cd"),
        ("self-cd", {"alhpa": 1}, 'Did you mean "alpha"'),
        ("self-cd", {"first_tokens": 0}, "`first_tokens` must be a whole number"),
        ("self-cd", {"plausibility": 2}, "`plausibility`"),
        ("self-cd", {"safety_prompt": ""}, "`safety_prompt` is empty"),
        ("ada-cd", {"threshold": 0}, "`threshold`"),
        ("contrast", {}, "branches are equal"),
        ("contrast", {"negative": ""}, "`negative` is empty"),
        ("contrast", {"base": True, "guidance": math.inf}, "`guidance`"),
        ("blend", {"principles": ()}, "`principles` is empty"),
        ("blend", {"principles": ("abc",)}, "pairs of"),
        ("blend", {"principles": (("a", math.nan),)}, "weight of 'a'"),
    ],
)
def test_bad_options_are_named(name, options, fragment):
    with pytest.raises(ConfigError, match=fragment):
        make_method(name, options)
