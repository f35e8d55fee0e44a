"""Teacher-forced log-probabilities and quality against naive loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import trueline.engine.scoring
from trueline import AdaCD, Contrast, LinearAlignment, SamplingParams, SelfCD, generate
from trueline.engine.protocol import Continuation
from trueline.engine.scoring import combined, score
from trueline.errors import DataError, ModelError
from trueline.evals.likelihood import (
    label_logprobs,
    method_logprobs,
    response_ids,
    response_logprobs,
)
from trueline.evals.quality import distinct, perplexity, repetition_rate, text_quality
from trueline.models.prompts import encode

USER = [
    [{"role": "user", "content": text}]
    for text in ("Hi", "What is the moon made of, and why?", "A b c")
]
TEXTS = ["Yes.", "No, never at all", "x"]


def naive(model, prompt, response):
    """One row, one forward a token, nothing padded, positions as the model counts them."""
    values, ids = [], list(prompt)
    for token in response:
        with torch.no_grad():
            z = model.model(torch.tensor([ids])).logits[0, -1].double()
        values.append(float(z.log_softmax(-1)[token]))
        ids.append(token)
    return values


def test_response_logprobs_equal_a_loop(lm):
    prompts = [encode(lm, chat) for chat in USER]
    responses = [response_ids(lm, chat, t) for chat, t in zip(USER, TEXTS, strict=True)]
    for size in (1, 2, 16):
        found = response_logprobs(lm, prompts, responses, batch_size=size)
        for values, prompt, response in zip(found, prompts, responses, strict=True):
            np.testing.assert_allclose(values, naive(lm, prompt, response), atol=2e-4)


@pytest.mark.parametrize(
    "method",
    [
        LinearAlignment("Be kind and brief.", ratio=1.5, candidates=1),
        LinearAlignment("Be kind.", ratio=2, candidates=0.9),
        SelfCD(alpha=1.5, first_tokens=2),
        AdaCD(first_tokens=3),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_method_logprobs_equal_those_of_the_decoder(kind, method, request):
    model = request.getfixturevalue(kind)
    sampling = SamplingParams(max_new_tokens=6, temperature=1.0, logprobs=True)
    completions = generate(model, USER, method, sampling)
    for size in (2, 16):
        found = method_logprobs(
            model, method, USER, [c.token_ids for c in completions], batch_size=size
        )
        for values, completion in zip(found, completions, strict=True):
            np.testing.assert_allclose(values, completion.logprobs, atol=2e-4)


def test_tokens_far_behind_the_first_ones_are_the_rest_branchs():
    """A window that begins beyond `first_tokens` holds no combined position at all."""
    logits = torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(0))
    method = SelfCD(alpha=1.5, first_tokens=2)
    both = combined(method, logits)
    torch.testing.assert_close(both[:2], method.combine(logits[:2]))
    torch.testing.assert_close(both[2:], logits[2:, 0])
    for first in (2, 3, 6):
        torch.testing.assert_close(combined(method, logits, first), logits[:, 0])


def test_score_keeps_the_order_and_runs_equal_rows_once(llama, monkeypatch):
    items = [
        Continuation([[5, 6], [5, 6, 7]], [8, 9]),
        Continuation([[5, 6]], [8, 10]),
        Continuation([[5, 6, 7, 8, 9]], [11]),
    ]
    sizes = []
    forced = trueline.engine.scoring.forced_logits

    def spy(model, prompts, continuations, **options):
        sizes.append(len(prompts))
        return forced(model, prompts, continuations, **options)

    monkeypatch.setattr(trueline.engine.scoring, "forced_logits", spy)
    for rows in (1, 2, 16):
        found = list(score(llama, items, rows=rows))
        for item, logits in zip(items, found, strict=True):
            for k, branch in enumerate(item.branches):
                with torch.no_grad():
                    z = llama.model(torch.tensor([[*branch, *item.tokens[:-1]]])).logits[0]
                torch.testing.assert_close(
                    logits[:, k], z[-len(item.tokens) :], atol=1e-4, rtol=1e-4
                )
    assert sizes == [2, 1, 1, 2, 1, 3]


def test_response_ids_follow_the_template(llama):
    assert llama.tokenizer.decode(response_ids(llama, USER[0], "Yes.")) == "Yes."
    template = llama.tokenizer.chat_template
    try:
        llama.tokenizer.chat_template = (
            "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
            "{% else %} {{ m['content'] }}{% endif %}{% endfor %}"
        )
        assert llama.tokenizer.decode(response_ids(llama, USER[0], "Yes.")) == " Yes."
    finally:
        llama.tokenizer.chat_template = template


def test_label_logprobs_equal_a_loop(gpt2):
    labels = ["complied", "partial", "full"]
    found = label_logprobs(gpt2, USER, labels, batch_size=4)
    for row, chat in zip(found, USER, strict=True):
        prompt = encode(gpt2, chat)
        sums = [sum(naive(gpt2, prompt, response_ids(gpt2, chat, label))) for label in labels]
        expected = np.exp(sums - np.logaddexp.reduce(sums))
        np.testing.assert_allclose(np.exp(row), expected, atol=1e-4)
    np.testing.assert_allclose(np.exp(found).sum(1), 1)


def test_labels_that_a_method_rules_out_are_nan(llama):
    method = LinearAlignment("Be kind.", candidates=1e-6)
    allowed = generate(llama, "Hi", method, SamplingParams(max_new_tokens=1))[0].token_ids[0]
    label = "A" if llama.tokenizer.decode([allowed]) != "A" else "B"
    assert np.isnan(label_logprobs(llama, USER[:1], [label], method=method)).all()


def test_too_long_and_empty_rows_are_errors(llama):
    with pytest.raises(DataError, match="positions"):
        response_logprobs(llama, [[5] * 300], [[5] * 300])
    with pytest.raises(DataError, match="at least one token"):
        response_logprobs(llama, [[5]], [[]])
    assert len(response_logprobs(llama, [[5] * 256], [[6] * 257])[0]) == 257
    with pytest.raises(ModelError, match="no adapter"):
        method_logprobs(llama, Contrast(base=True), USER[:1], [[5]])


def test_perplexity_by_brute_force(gpt2):
    completions = [[70, 71, 72], [], [90] * 5]
    found = perplexity(gpt2, USER, completions)
    for i in (0, 2):
        values = naive(gpt2, encode(gpt2, USER[i]), completions[i])
        assert found[i] == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-3)
    assert math.isnan(found[1])
    quality = text_quality(completions, model=gpt2, prompts=USER)
    pooled = [v for i in (0, 2) for v in naive(gpt2, encode(gpt2, USER[i]), completions[i])]
    assert quality.perplexity == pytest.approx(math.exp(-np.mean(pooled)), rel=1e-3)
    assert quality.length.value == pytest.approx(8 / 3)


def test_distinct_and_repetition_by_hand():
    assert distinct(["abab", "ab"], 1) == 2 / 6
    assert distinct(["abab", "ab"], 2) == 2 / 4  # ab ba ab | ab
    assert math.isnan(distinct(["a"], 2))
    # abcd bcda cdab dabc abcd: five 4-grams, one of them again
    assert repetition_rate("abcdabcd") == pytest.approx(1 / 5)
    assert repetition_rate("aaaaaaaaaa") == pytest.approx(6 / 7)
    assert repetition_rate("abc") == 0
    assert text_quality(["abcd"]).perplexity is None
