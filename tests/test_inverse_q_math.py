"""Inverse-Q*: rewards and losses against brute force over every sequence of a small vocabulary."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import check_shapes
from torch.nn.functional import log_softmax

from trueline.methods import inverse_q
from trueline.methods.linear_alignment import LinearAlignment

VOCAB, TIME, BETA = 4, 3, 0.3
STATES = [s for n in range(TIME) for s in itertools.product(range(VOCAB), repeat=n)]
SEQUENCES = list(itertools.product(range(VOCAB), repeat=TIME))
SAMPLED = {"imitation": inverse_q.imitation_loss, "advantage": inverse_q.advantage_loss}

for _name in ("token_logprobs", "floored", "token_reward", "reverse_kl"):
    setattr(inverse_q, _name, check_shapes(getattr(inverse_q, _name)))


def tables(seed=0, scale=1.0):
    """Logits of policy, teacher and reference in every state."""
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(len(STATES), VOCAB, generator=generator, dtype=torch.float64)
        for _ in range(3)
    ]


def states_of(sequence):
    return torch.tensor([STATES.index(sequence[:t]) for t in range(TIME)])


def logprob(logits, sequence):
    """log p of each token, by a loop over its softmax."""
    states = states_of(sequence).tolist()
    return torch.stack(
        [
            logits[s][y] - torch.stack([logits[s][v].exp() for v in range(VOCAB)]).sum().log()
            for s, y in zip(states, sequence, strict=True)
        ]
    )


def expected_gradient(loss, theta, draws=None):
    """Gradient of `loss(sequence)` averaged over all sequences, drawn from theta or `draws`."""
    weights = theta.detach() if draws is None else draws
    total = torch.zeros_like(theta)
    for sequence in SEQUENCES:
        value = loss(sequence)
        (gradient,) = torch.autograd.grad(value, theta)
        total += logprob(weights, sequence).sum().exp() * gradient
    return total


def sampled(function, theta, teacher, reference, **options):
    def loss(sequence):
        policy = inverse_q.token_logprobs(theta[states_of(sequence)], torch.tensor(sequence))
        rows = [policy, logprob(teacher, sequence), logprob(reference, sequence)]
        mask = torch.ones(1, TIME)
        return function(*(r[None] for r in rows), mask, beta=BETA, **options)[0]

    return loss


def full(theta, teacher, **options):
    def loss(sequence):
        states = states_of(sequence)
        mask = torch.ones(1, TIME)
        return inverse_q.kl_loss(theta[states][None], teacher[states][None], mask, **options)[0]

    return loss


@pytest.mark.parametrize(("name", "constant"), [("imitation", 2 * BETA**2), ("advantage", BETA)])
def test_expected_gradients_agree_up_to_the_constant(name, constant):
    theta, teacher, reference = tables()
    theta.requires_grad_()
    kl = expected_gradient(full(theta, teacher), theta)
    found = expected_gradient(sampled(SAMPLED[name], theta, teacher, reference), theta)
    assert kl.abs().max() > 0.01
    torch.testing.assert_close(found, constant * kl, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", SAMPLED)
def test_old_samples_are_corrected_to_fresh_ones(name):
    """Within the clip, weighing by pi/pi_old gives the fresh gradient where the states agree."""
    theta, teacher, reference = tables()
    old = theta.clone()
    old[0] += 0.05 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    theta.requires_grad_()
    one = (torch.arange(VOCAB)[:, None], torch.ones(VOCAB, 1))

    def loss(draws):
        policy = inverse_q.token_logprobs(theta[0].expand(VOCAB, -1), one[0][:, 0])[:, None]
        rows = [log_softmax(z[0], -1)[:, None] for z in (teacher, reference)]
        total = 0
        for y in range(VOCAB):
            ratios = None if draws is None else log_softmax(draws[0], -1)[y].view(1, 1)
            value, _ = SAMPLED[name](
                *(r[y : y + 1] for r in (policy, *rows)),
                torch.ones(1, 1),
                beta=BETA,
                old_logprobs=ratios,
                clip=0.9,
            )
            who = theta.detach() if draws is None else draws
            total = total + log_softmax(who[0], -1)[y].exp() * value
        return torch.autograd.grad(total, theta)[0]

    torch.testing.assert_close(loss(old), loss(None), atol=1e-12, rtol=1e-9)


def test_weights_are_clipped():
    reward, old = torch.tensor([[-2.0, -1.0]]), torch.tensor([[-3.0, -0.5]])
    policy = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    zero = torch.zeros(1, 2)
    mask, options = torch.ones(1, 2), {"beta": 1.0, "old_logprobs": old, "clip": 0.2}
    value, _ = inverse_q.imitation_loss(policy, reward, zero, mask, **options)
    # weights e^2 -> 1.2 and e^-1.5 -> 0.8; distances 1 and -1
    assert value.item() == pytest.approx((1.2 * 1 + 0.8 * 1) / 2)
    policy = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    better = torch.tensor([[1.0, -1.0]])
    value, _ = inverse_q.advantage_loss(policy, better, zero, mask, **options)
    value.backward()
    # A = (2, 1): min(e^2 2, 1.2 2) = 2.4 stands still, min(e^-1.5, 0.8) = e^-1.5 does not
    assert value.item() == pytest.approx(-(2.4 + math.exp(-1.5)) / 2)
    torch.testing.assert_close(policy.grad, torch.tensor([[0.0, -math.exp(-1.5) / 2]]))


def test_a_sample_of_the_teacher_moves_both_sampled_losses_alike():
    theta, teacher, reference = tables()
    theta.requires_grad_()
    found = [
        expected_gradient(sampled(f, theta, teacher, reference), theta, draws=teacher)
        for f in SAMPLED.values()
    ]
    torch.testing.assert_close(found[0], 2 * BETA * found[1], atol=1e-12, rtol=1e-9)
    theta = teacher.clone().requires_grad_()
    still = expected_gradient(
        sampled(SAMPLED["imitation"], theta, teacher, reference), theta, teacher
    )
    assert still.abs().max() < 1e-12


def test_the_reward_is_the_optimal_advantage():
    """With Q of a horizon problem by backward induction: beta log pi*/pi_S = Q - V."""
    _, _, reference = tables(5)
    generator = torch.Generator().manual_seed(8)
    gain = {s: torch.randn(VOCAB, generator=generator, dtype=torch.float64) for s in STATES}
    log_s = log_softmax(reference, -1)
    value = dict.fromkeys(SEQUENCES, 0.0)
    optimal = torch.zeros_like(reference)
    q = {}
    for state in reversed(STATES):
        q[state] = gain[state] + torch.tensor([float(value[(*state, v)]) for v in range(VOCAB)])
        soft = log_s[STATES.index(state)] + q[state] / BETA
        value[state] = BETA * torch.logsumexp(soft, -1)
        optimal[STATES.index(state)] = soft
    for state in STATES:
        row = STATES.index(state)
        found = inverse_q.token_reward(log_softmax(optimal[row], -1), log_s[row], BETA)
        torch.testing.assert_close(found, q[state] - value[state])


def test_the_reward_of_linear_alignment_is_the_contrast_up_to_a_constant():
    z = torch.randn(3, 2, 11, generator=torch.Generator().manual_seed(1))
    star = LinearAlignment("Be kind.", ratio=1.5, candidates=1).combine(z)
    found = inverse_q.token_reward(star.log_softmax(-1), z[:, 1].log_softmax(-1), 0.1)
    # beta (1 + ratio) (z_p - z_0), whose mean over y ~ pi* differs by the log-normaliser alone
    contrast = 0.1 * 2.5 * (z[:, 0] - z[:, 1])
    gap = found - contrast
    torch.testing.assert_close(gap, gap[:, :1].expand_as(gap), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*SAMPLED, "kl"])
def test_the_fixed_point_is_the_teacher(name):
    """At the teacher nothing moves; from elsewhere plain descent arrives there."""
    theta, teacher, reference = tables()
    theta = theta.requires_grad_()

    def loss_of(theta):
        if name == "kl":
            return full(theta, teacher)
        return sampled(SAMPLED[name], theta, teacher, reference)

    there = (teacher + 0.7).clone().requires_grad_()
    assert expected_gradient(loss_of(there), there).abs().max() < 1e-12
    if name != "advantage":
        assert float(loss_of(there)(SEQUENCES[5]).detach()) == pytest.approx(0, abs=1e-15)
        assert all(float(loss_of(theta)(s).detach()) >= -1e-15 for s in SEQUENCES)
    rate = {"imitation": 1 / (2 * BETA**2), "advantage": 1 / BETA, "kl": 1.0}[name]
    state = torch.zeros(VOCAB, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        p = log_softmax(state.detach(), -1).exp()
        total = 0
        for y in range(VOCAB):
            one = torch.tensor([[y]])
            policy = inverse_q.token_logprobs(state.view(1, 1, -1), one)
            rows = [
                inverse_q.token_logprobs(z[0].view(1, 1, -1), one) for z in (teacher, reference)
            ]
            if name == "kl":
                value, _ = inverse_q.kl_loss(state.view(1, 1, -1), teacher[0].view(1, 1, -1))
            else:
                value, _ = SAMPLED[name](policy, *rows, torch.ones(1, 1), beta=BETA)
            total = total + p[y] * value
        (gradient,) = torch.autograd.grad(total, state)
        state = (state - 2 * rate * gradient).detach().requires_grad_()
    torch.testing.assert_close(
        log_softmax(state, -1), log_softmax(teacher[0], -1), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("trash", [7.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*SAMPLED, "kl"])
def test_a_masked_token_changes_nothing(name, trash):
    theta, teacher, reference = (t[:6].view(2, 3, VOCAB).float() for t in tables())
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])

    def run(dirt):
        policy = theta.clone()
        parts = [policy, teacher.clone(), reference.clone()]
        if dirt is not None:
            for part in parts:
                part[mask == 0] = dirt
        leaf = parts[0].requires_grad_()
        if name == "kl":
            value, metrics = inverse_q.kl_loss(leaf, parts[1], mask)
        else:
            tokens = torch.tensor([[0, 1, 2], [3, 2, 1]])
            rows = [inverse_q.token_logprobs(part, tokens) for part in parts]
            old = rows[0].detach() - 0.01
            value, metrics = SAMPLED[name](*rows, mask, beta=BETA, old_logprobs=old)
        value.backward()
        return value, leaf.grad, metrics

    clean, dirty = run(None), run(trash)
    assert clean[0] == dirty[0]
    keep = mask.bool()
    assert torch.equal(clean[1][keep], dirty[1][keep])
    assert clean[2] == dirty[2]
    if name == "kl":
        assert (dirty[1][~keep] == 0).all()


def test_the_mean_is_over_unmasked_tokens_and_parts_add_up():
    policy, teacher, reference = (t[:6, 0].view(2, 3) for t in tables())
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    options = {"beta": BETA}
    whole, metrics = inverse_q.imitation_loss(policy, teacher, reference, mask, **options)
    by_hand = [BETA**2 * (policy[i] - teacher[i]) ** 2 for i in [(0, 0), (0, 1), (0, 2), (1, 0)]]
    assert float(whole) == pytest.approx(float(sum(by_hand)) / 4)
    reward = [BETA * (teacher[i] - reference[i]) for i in [(0, 0), (0, 1), (0, 2), (1, 0)]]
    assert float(metrics["reward"]) == pytest.approx(float(sum(reward)) / 4)
    parts = [
        inverse_q.imitation_loss(
            policy[i : i + 1], teacher[i : i + 1], reference[i : i + 1], mask[i : i + 1],
            count=torch.tensor(4), **options,
        )[0]
        for i in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts), whole)
    nothing, empty = inverse_q.imitation_loss(policy, teacher, reference, mask * 0, **options)
    assert nothing == 0
    assert empty["reward"] == 0


@pytest.mark.parametrize("top_k", [None, 2])
def test_log_probabilities_stand_for_logits(top_k):
    theta, teacher, _ = (t.view(1, -1, VOCAB) for t in tables())
    value, _ = inverse_q.kl_loss(theta, teacher, top_k=top_k)
    same, _ = inverse_q.kl_loss(theta.log_softmax(-1), teacher.log_softmax(-1) - 3, top_k=top_k)
    torch.testing.assert_close(value, same)
    tokens = torch.randint(VOCAB, theta.shape[:-1])
    torch.testing.assert_close(
        inverse_q.token_logprobs(theta, tokens),
        inverse_q.token_logprobs(theta.log_softmax(-1), tokens),
    )


def naive_kl(policy, teacher):
    p = policy.exp() / policy.exp().sum(-1, keepdim=True)
    q = teacher.exp() / teacher.exp().sum(-1, keepdim=True)
    return (p * (p / q).log()).sum(-1)


def test_the_divergence_and_its_gradient_are_those_of_autograd():
    theta, teacher, _ = tables(scale=2.0)
    theta.requires_grad_()
    weights = torch.linspace(-1, 2, len(STATES), dtype=torch.float64)
    value = (weights * inverse_q.reverse_kl(theta, teacher)).sum()
    naive = (weights * naive_kl(theta, teacher)).sum()
    torch.testing.assert_close(value, naive)
    ours, theirs = (torch.autograd.grad(v, theta)[0] for v in (value, naive))
    torch.testing.assert_close(ours, theirs)
    half = inverse_q.reverse_kl(theta.bfloat16(), teacher.bfloat16())
    torch.testing.assert_close(half.double(), naive_kl(theta, teacher), atol=0.02, rtol=0.05)


def test_top_k_with_its_tail_is_a_lower_bound_that_grows_to_the_whole():
    generator = torch.Generator().manual_seed(2)
    policy, teacher = (torch.randn(9, 12, generator=generator).double() for _ in range(2))
    values = [float(inverse_q.kl_loss(policy, teacher, top_k=k)[0]) for k in range(1, 13)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert values[0] > 0
    assert values[-1] == pytest.approx(float(naive_kl(policy, teacher).mean()))
    # One row by hand: two singles and a bucket.
    p, q = policy[0].softmax(-1), teacher[0].softmax(-1)
    first, second = teacher[0].argsort(descending=True)[:2].tolist()
    cells = [(p[first], q[first]), (p[second], q[second])]
    cells.append((1 - p[first] - p[second], 1 - q[first] - q[second]))
    by_hand = sum(float(a * (a / b).log()) for a, b in cells)
    assert float(inverse_q.kl_loss(policy[:1], teacher[:1], top_k=2)[0]) == pytest.approx(by_hand)


def test_the_floor_makes_a_masked_teacher_finite():
    z = torch.randn(5, 2, 30, generator=torch.Generator().manual_seed(4)) * 3
    star = LinearAlignment("Be kind.", ratio=2, candidates=0.7).combine(z)
    reference = z[:, 1]
    assert star.isneginf().any()
    assert inverse_q.kl_loss(reference, star)[0] == math.inf
    log_q = inverse_q.floored(star, reference, 0.01)
    # By hand, on probabilities.
    mixed = 0.99 * star.softmax(-1) + 0.01 * reference.softmax(-1)
    torch.testing.assert_close(log_q, mixed.log(), atol=1e-4, rtol=1e-4)
    reward = inverse_q.token_reward(log_q, reference.log_softmax(-1), 0.1)
    assert reward.min() >= 0.1 * math.log(0.01) - 1e-5
    policy = reference.clone().requires_grad_()
    value, _ = inverse_q.kl_loss(policy, log_q)
    value.backward()
    assert value.isfinite()
    assert policy.grad.isfinite().all()
    assert torch.equal(inverse_q.floored(star, reference, 0), star.log_softmax(-1))
