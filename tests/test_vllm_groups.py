"""Groups of rows: what the back end on vLLM chooses, without vLLM."""

from __future__ import annotations

import pytest
import torch

from trueline import Contrast, LinearAlignment, ModelError, Plain, SamplingParams, SelfCD
from trueline.engine.sampling import choose_tokens, uniforms
from trueline.engine.vllm.groups import FORCED, REPORTS, Mixer, Plan, Report, Share

VOCAB = 40
METHODS = (Plain(), LinearAlignment("Be brief."), SelfCD(first_tokens=2), Contrast(2, "a", "b"))


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def plan(name: str, method, **more) -> Plan:
    branches = len(method.prompts([{"role": "user", "content": "?"}]))
    settings = {"sampling": SamplingParams(8, 0.7), "seed": 3, "tokens": 8} | more
    return Plan(name, branches, method, **settings)


def test_each_group_gets_the_token_that_it_would_get_alone():
    """Whatever the order of the rows: they lie anywhere in vLLM's batch."""
    plans = [plan(f"g{i}", METHODS[i % 4], seed=i) for i in range(9)]
    shares = [Share(p, k) for p in plans for k in range(p.branches)]
    order = torch.randperm(len(shares), generator=torch.Generator().manual_seed(1)).tolist()
    rows = {row: shares[i] for row, i in enumerate(order)}
    z = logits(len(rows))
    given, at, mixer = z.clone(), dict.fromkeys(rows, 1), Mixer(torch.device("cpu"))
    mixer.mix(z, mixer.lots(rows, at), at)
    for p in plans:
        own = sorted((s.branch, row) for row, s in rows.items() if s.plan is p)
        places = [row for _, row in own]
        draws = uniforms(p.seed, 8)[1:2]
        [token] = choose_tokens(
            p.method, p.sampling, given[places][None], (), draws, contrasted=True
        ).tokens
        assert z[places].argmax(-1).tolist() == [token] * p.branches
        assert (z[places] == FORCED).sum() == p.branches


def test_rows_of_a_group_that_is_not_all_there_stay_as_they_are():
    both = plan("g", METHODS[1])
    z, mixer = logits(2), Mixer(torch.device("cpu"))
    before = z.clone()
    rows = {0: Share(both, 1)}
    mixer.mix(z, mixer.lots(rows, {0: 0}), {0: 0})
    assert torch.equal(z, before)


def test_after_its_first_tokens_the_rest_branch_is_alone():
    method = METHODS[2]
    p = plan("g", method, sampling=SamplingParams(8))
    assert [p.limit(k) for k in range(2)] == [8, 2]
    z, mixer = logits(1), Mixer(torch.device("cpu"))
    top = int(z[0].argmax())
    mixer.mix(z, mixer.lots({0: Share(p, method.rest_branch)}, {0: 2}), {0: 2})
    assert int(z[0].argmax()) == top
    assert z[0, top] == FORCED


def test_a_repetition_penalty_sees_the_prompt_and_what_was_chosen_before():
    params = SamplingParams(8, repetition_penalty=1e6)
    p = plan("g", Plain(), sampling=params, prompt=(1, 2))
    mixer, tokens = Mixer(torch.device("cpu")), []
    for position in range(6):
        z = logits(1).abs_()
        # A chunk of a prompt is chosen from too; the position counts once.
        for _ in range(2):
            again = z.clone()
            mixer.mix(again, mixer.lots({0: Share(p, 0)}, {0: position}), {0: position})
        tokens.append(int(again[0].argmax()))
    best = logits(1).abs_()[0]
    best[[1, 2]] = 0
    assert tokens == best.topk(6).indices.tolist()


def test_given_tokens_are_taken_and_the_logits_kept():
    p = plan("g", METHODS[1], sampling=SamplingParams(3), forced=(7, 8, 9), tokens=3)
    REPORTS["g"] = report = Report(record=1)
    try:
        mixer = Mixer(torch.device("cpu"))
        rows = {0: Share(p, 0), 1: Share(p, 1)}
        for position in range(3):
            z = logits(2, position)
            before = z.clone()
            at = dict.fromkeys(rows, position)
            mixer.mix(z, mixer.lots(rows, at), at)
            chosen = report.take(position)
            assert chosen.token == 7 + position
            assert torch.equal(chosen.extra["logits"], before)
            assert z.argmax(-1).tolist() == [7 + position] * 2
        assert report.take(0) is None
    finally:
        REPORTS.clear()


def test_where_nobody_hears_a_report_broken_logits_are_an_error():
    z, mixer = logits(1), Mixer(torch.device("cpu"))
    z[:] = float("nan")
    rows = {0: Share(plan("g", Plain()), 0)}
    with pytest.raises(ModelError, match="not finite"):
        mixer.mix(z, mixer.lots(rows, {0: 0}), {0: 0})
