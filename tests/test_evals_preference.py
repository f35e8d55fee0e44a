"""Preference metrics against naive loops, hand counts and another optimiser."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trueline import Blend, Contrast, LinearAlignment, Plain, SelfCD, generate
from trueline.errors import ConfigError, DataError
from trueline.evals.datasets import PersonalQuestion, PreferencePair, load_pairs
from trueline.evals.pairwise import compare, length_controlled, win_rates
from trueline.evals.preference import (
    PERSONAL_SAMPLING,
    first_letter,
    implicit_rewards,
    personal_accuracy,
    personal_choices,
    personal_principle,
    personal_prompt,
    reward_accuracy,
)
from trueline.models.prompts import encode

QUESTIONS = [
    PersonalQuestion("Tea or milk?", ("Tea.", "Milk!"), ("a cook", "a child"), "1"),
    PersonalQuestion("Where to?", ("Home", "The sea, at dawn"), ("a cook", "a sailor"), "2"),
]


def method_for(principle):
    return LinearAlignment(principle, ratio=1.0, candidates=1)


def chat(text):
    return [{"role": "user", "content": text}]


PAIRS = [
    PreferencePair(chat("Why?"), "Because.", "I will not say more than that", "1"),
    PreferencePair(
        [*chat("Hi"), {"role": "assistant", "content": "Yes?"}, *chat("Tell me a lot")],
        "No",
        "Once there was a king",
        "2",
    ),
    PreferencePair(chat("A question that is rather long, is it not?"), "x", "y", "3"),
]


def naive_logprob(model, messages, text):
    """One row, no padding: the sum over the bytes of the answer."""
    prompt, ids = encode(model, messages), model.tokenizer(text)["input_ids"]
    with torch.no_grad():
        z = model.model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
    return sum(float(z[len(prompt) + i - 1, t]) for i, t in enumerate(ids))


@pytest.mark.parametrize("method", [method_for("Be kind."), SelfCD(), Contrast(negative="Lie.")])
def test_implicit_rewards_equal_a_loop(lm, method):
    for size in (3, 16):
        found = implicit_rewards(lm, method, PAIRS, batch_size=size)
        for row, pair in zip(found, PAIRS, strict=True):
            first, second = method.prompts(pair.messages)
            for value, text in zip(row, (pair.chosen, pair.rejected), strict=True):
                expected = naive_logprob(lm, first, text) - naive_logprob(lm, second, text)
                assert value == pytest.approx(expected, abs=2e-3)


def test_implicit_rewards_of_a_blend_are_the_weighted_sum(llama):
    blend = Blend((("Be kind.", 2.0), ("Be brief.", -0.5)))
    found = implicit_rewards(llama, blend, PAIRS)
    parts = [implicit_rewards(llama, method_for(p), PAIRS) for p in ("Be kind.", "Be brief.")]
    np.testing.assert_allclose(found, 2 * parts[0] - 0.5 * parts[1], atol=2e-3)


def test_implicit_rewards_need_two_branches_that_fit(gpt2):
    with pytest.raises(ConfigError, match=r'"plain" has 1 branch; an'):
        implicit_rewards(gpt2, Plain(), PAIRS)
    long = PreferencePair(chat("a"), "x" * 600, "y", "9")
    with pytest.raises(DataError, match=r'Pair "9": .*512'):
        implicit_rewards(gpt2, SelfCD(), [long])
    found = implicit_rewards(gpt2, SelfCD(), [PAIRS[0], long, PAIRS[2]], skip_long=True)
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(
        found[[0, 2]], implicit_rewards(gpt2, SelfCD(), [PAIRS[0], PAIRS[2]]), atol=2e-3
    )
    assert reward_accuracy(found).skipped == 1
    with pytest.raises(DataError, match="No pair"):
        reward_accuracy(found[[1]])


def test_reward_accuracy_by_hand():
    result = reward_accuracy([[2, 1], [0, 3], [5, 1], [np.nan, np.nan]])
    assert result.accuracy.value == pytest.approx(2 / 3)
    assert result.margin.value == pytest.approx((1 - 3 + 4) / 3)
    assert (result.accuracy.n, result.skipped) == (3, 1)
    assert reward_accuracy([[1, 1], [2, 1]]).accuracy.value == 0.75


@pytest.mark.parametrize(
    ("text", "index"),
    [("A. Tea", 0), (" b) milk", 1), ("(C)", 2), ('"D"', 3), ("E", -1), ("Answer: A", -1),
     ("", -1), ("Because", -1), ("a", 0), ("1", -1)],
)  # fmt: skip
def test_first_letter(text, index):
    assert first_letter(text) == index


def test_first_letter_knows_how_many_options_there_are():
    assert first_letter("C", 2) == -1


def test_personal_prompts_name_question_and_options():
    assert "Tea or milk?\n\nA. Tea.\nB. Milk!\n" in personal_prompt(QUESTIONS[0])
    assert "a sailor" in personal_principle("a sailor")


def test_personal_choices_by_letter(llama):
    found = personal_choices(llama, QUESTIONS, method_for, batch_size=3)
    assert found.shape == (2, 2)
    for i, question in enumerate(QUESTIONS):
        for j, user in enumerate(question.users):
            method = method_for(personal_principle(user))
            text = generate(llama, personal_prompt(question), method, PERSONAL_SAMPLING)[0].text
            assert found[i, j] == first_letter(text, 2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_personal_choices_by_log_probability(kind, request):
    """At one token a letter, the method's distribution is z_p + ratio (z_p - z_0) itself."""
    model = request.getfixturevalue(kind)
    found = personal_choices(model, QUESTIONS, method_for, by="logprob")
    letters = [model.tokenizer(x)["input_ids"][0] for x in "AB"]
    for i, question in enumerate(QUESTIONS):
        for j, user in enumerate(question.users):
            branches = method_for(personal_principle(user)).prompts(chat(personal_prompt(question)))
            with torch.no_grad():
                z_p, z_0 = (
                    model.model(torch.tensor([encode(model, b)])).logits[0, -1] for b in branches
                )
            assert found[i, j] == int((2 * z_p - z_0)[letters].argmax())


def test_personal_choices_check_their_arguments(llama):
    with pytest.raises(ConfigError, match="letter"):
        personal_choices(llama, QUESTIONS, method_for, by="word")
    odd = PersonalQuestion("?", ("a", "b", "c"), ("x", "y", "z"), "3")
    with pytest.raises(DataError, match="equally many users"):
        personal_choices(llama, [*QUESTIONS, odd], method_for)


def test_personal_accuracy_reads_the_diagonal_of_users():
    # rows: questions, columns: users; user j wants answer j
    assert personal_accuracy([[0, 1, 2, 3], [1, 1, -1, 0]]).value == pytest.approx(5 / 8)


class Scripted:
    """A judge that prefers what a function says."""

    def __init__(self, verdict):
        self.verdict, self.criteria = verdict, []

    def pairwise(self, prompts, first, second, criterion="default"):
        self.criteria.append(criterion)
        return [self.verdict(a, b) for a, b in zip(first, second, strict=True)]


def test_both_orders_cancel_a_position_bias():
    always_first = Scripted(lambda a, b: "A")
    result = compare(always_first, ["p"] * 4, ["x"] * 4, ["y"] * 4)
    assert result.win_rate.value == 0.5
    assert (result.wins, result.losses, result.ties, result.inconsistent) == (0, 0, 4, 4)
    by_word = Scripted(lambda a, b: "A" if "good" in a else "B" if "good" in b else "tie")
    result = compare(by_word, ["p"] * 3, ["good", "so", "good"], ["so", "so", "so"], criterion="c")
    assert result.win_rate.value == pytest.approx(2.5 / 3)
    assert (result.wins, result.ties, result.inconsistent) == (2, 1, 0)
    assert by_word.criteria == ["c", "c"]


def test_win_rates_by_hand():
    #        win  loss  turned  half  unreadable
    forward = ["A", "B", "A", "A", None]
    backward = ["B", "A", "A", "tie", "B"]
    result = win_rates(forward, backward)
    assert result.win_rate.value == pytest.approx((1 + 0 + 0.5 + 0.75) / 4)
    assert (result.wins, result.losses, result.ties) == (2, 1, 1)
    assert (result.inconsistent, result.unreadable) == (1, 1)
    assert result.length_controlled is None
    with pytest.raises(DataError, match="No pair"):
        win_rates([None], ["A"])


def test_length_controlled_undoes_a_taste_for_length():
    """Outcomes drawn from the model of the paper itself: theta 0.5, phi 2, the first is longer."""
    rng = np.random.default_rng(0)
    d = rng.normal(1.0, 1.0, 4000)
    x = np.tanh(d / d.std())
    y = rng.random(4000) < 1 / (1 + np.exp(-(0.5 + 2 * x)))
    found = length_controlled(y, d, samples=100)
    assert y.mean() > 0.75
    assert found.value == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.03)
    assert found.low < found.value < found.high
    turned = length_controlled(~y, -d, samples=2)
    assert turned.value == pytest.approx(1 - found.value, abs=1e-6)


def test_length_controlled_by_another_optimiser():
    y = np.array([1, 0.5, 0, 1, 1, 0.75, 0, 0.25])
    d = np.array([5.0, 2, -3, 8, -2, 1, 0, -6])
    x, ridge = torch.tensor(np.tanh(d / d.std())), 0.1
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12)

    def loss():
        optimiser.zero_grad()
        z = w[0] + w[1] * x
        value = torch.nn.functional.binary_cross_entropy_with_logits(
            z, torch.tensor(y), reduction="mean"
        )
        value = value + 0.5 * ridge * w[1] ** 2 + 0.5e-6 * w[0] ** 2
        value.backward()
        return value

    optimiser.step(loss)
    expected = float(w[0].detach().sigmoid())
    assert length_controlled(y, d, ridge=ridge, samples=2).value == pytest.approx(
        expected, abs=1e-5
    )


def test_length_controlled_edges():
    # Equal lengths change nothing; winning always stays finite.
    assert length_controlled([1, 0, 1, 1], [3, 3, 3, 3]).value == pytest.approx(0.75, abs=1e-4)
    assert 0.99 < length_controlled([1, 1, 1], [1, -2, 5], samples=20).value <= 1
    with pytest.raises(DataError, match="1 length differences for 2 outcomes"):
        length_controlled([1, 0], [1])


def test_hh_pairs_on_a_real_model(shared):
    from trueline import load_model

    model = load_model(shared / "models" / "craftgpt-5m", dtype="float32")
    pairs = load_pairs(shared / "data" / "preference" / "hh_harmless_base_test.jsonl")[:200]
    method = LinearAlignment("be kind.")
    rewards = implicit_rewards(model, method, pairs, skip_long=True)
    result = reward_accuracy(rewards)
    assert result.accuracy.n + result.skipped == 200
    assert result.accuracy.n >= 5
    assert np.isfinite(rewards[~np.isnan(rewards)]).all()
