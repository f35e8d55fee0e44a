"""Traces against the definitions, written out as loops over a small vocabulary."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import byte_tokenizer, random_model

from trueline import (
    AdaCD,
    Contrast,
    DataError,
    Decoder,
    LanguageModel,
    LinearAlignment,
    Plain,
    Prompt,
    Request,
    SamplingParams,
    SelfCD,
    Step,
    Ticket,
    generate,
)
from trueline.engine.trace import (
    TokenTexts,
    kl_divergence,
    read_jsonl,
    record,
    trace_step,
    write_jsonl,
)
from trueline.methods._ops import with_system

NAMES = "abcd"
COMBINED = [1.0, -math.inf, 0.5, -2.0]
BRANCHES = [[0.0, 2.0, 1.0, -1.0], [1.0, 0.0, -0.5, 0.25]]
QUESTION = "Why is it so?"
TICKET = Ticket(0, Prompt([[1], [2]]))
SHORT = SamplingParams(max_new_tokens=12)


def make_step(token: int, combined=COMBINED, branches=BRANCHES, position=0) -> Step:
    logits, mixed = torch.tensor(branches), torch.tensor(combined)
    return Step(TICKET, 0, position, token, NAMES[token], logits=logits, combined=mixed)


def trace(step: Step, method=None, top: int = 2):
    return trace_step(step, method or SelfCD(), NAMES.__getitem__, top=top)


def softmax(z: list[float]) -> list[float]:
    weights = [math.exp(x) for x in z]
    return [w / sum(weights) for w in weights]


def test_numbers_of_a_step_are_those_of_the_definitions():
    token = trace(make_step(0))
    p = softmax(COMBINED)
    assert token.logprob == pytest.approx(math.log(p[0]))
    assert token.entropy == pytest.approx(-sum(x * math.log(x) for x in p if x))
    assert [b.branch for b in token.branches] == [0, 1]
    for branch, z in zip(token.branches, BRANCHES, strict=True):
        q = softmax(z)
        assert branch.logprob == pytest.approx(math.log(q[0]))
        kl = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x)
        assert branch.kl == pytest.approx(kl)
        distance = sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
        assert branch.total_variation == pytest.approx(distance)
    assert token.kl == token.branches[0].kl


def test_alternatives_are_the_likeliest_and_none_without_mass():
    token = trace(make_step(0), top=4)
    p, q = softmax(COMBINED), softmax(BRANCHES[0])
    assert [(a.token, a.token_id) for a in token.alternatives] == [("a", 0), ("c", 2), ("d", 3)]
    assert [a.probability for a in token.alternatives] == pytest.approx([p[0], p[2], p[3]])
    assert [a.token for a in token.branches[0].alternatives] == ["b", "c", "a", "d"]
    assert token.branches[0].alternatives[0].probability == pytest.approx(q[1])
    assert [a.token for a in trace(make_step(0), top=1).branches[1].alternatives] == ["a"]


def test_flipped_is_what_the_first_branch_alone_would_not_take():
    assert trace(make_step(0)).flipped
    assert trace(make_step(2)).flipped
    assert not trace(make_step(1, combined=BRANCHES[0])).flipped


def test_equal_distributions_are_no_movement():
    token = trace(make_step(1, combined=[z + 7 for z in BRANCHES[0]]))
    assert token.kl == pytest.approx(0, abs=1e-12)
    assert token.kl >= 0
    assert token.branches[0].total_variation == pytest.approx(0, abs=1e-7)


def test_a_branch_that_rules_out_the_choice_is_infinitely_far():
    token = trace(make_step(0, branches=[[-math.inf, 0.0, 0.0, 0.0], BRANCHES[1]]))
    assert token.kl == math.inf
    assert token.branches[0].logprob == -math.inf
    assert math.isfinite(token.branches[1].kl)


def test_kl_of_a_certain_choice_is_its_surprise():
    p = torch.tensor([0.0, -math.inf])
    q = torch.tensor([0.25, 0.75]).log()
    assert kl_divergence(p, q) == pytest.approx(math.log(4))


def test_after_its_first_tokens_a_method_has_the_rest_branch_alone():
    method = AdaCD(first_tokens=3)
    alone = [BRANCHES[1]]
    assert [b.branch for b in trace(make_step(0, position=2), method).branches] == [0, 1]
    rest = trace(make_step(0, BRANCHES[1], alone, position=3), method)
    assert [b.branch for b in rest.branches] == [1]
    assert not rest.flipped


def test_a_step_without_logits_is_refused():
    with pytest.raises(ValueError, match="record=True"):
        trace(Step(TICKET, 0, 0, 1, "b"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("sampling", [SHORT, SamplingParams(max_new_tokens=12, temperature=0.7)])
def test_a_recording_is_what_generate_gives(name, sampling, request):
    model = request.getfixturevalue(name)
    method = LinearAlignment(principle="Be brief.", ratio=1.5)
    options = {**sampling.__dict__, "logprobs": True}
    seen = []
    recording = record(Decoder(model), QUESTION, method, sampling, seed=5, on_token=seen.append)
    wanted = generate(model, [Request(QUESTION, method, SamplingParams(**options), 5)])[0]
    assert recording.text == wanted.text
    assert recording.finish_reason == wanted.finish_reason
    assert [t.token_id for t in recording.tokens] == wanted.token_ids
    assert [t.position for t in recording.tokens] == list(range(len(wanted.token_ids)))
    assert "".join(t.text for t in recording.tokens) == wanted.text
    assert [t.logprob for t in recording.tokens] == pytest.approx(wanted.logprobs, abs=1e-4)
    before = [t.branches[0].logprob for t in recording.tokens]
    assert before == pytest.approx(wanted.branch_logprobs, abs=1e-4)
    assert seen == recording.tokens


def test_comparisons_are_every_prompt_alone(llama):
    method = SelfCD(safety_prompt="Be safe.")
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": QUESTION}]
    recording = record(Decoder(llama), chat, method, SHORT)
    assert [(c.branch, c.system) for c in recording.comparisons] == [
        (0, "Be kind.\n\nBe safe."),
        (1, "Be kind."),
    ]
    wanted = generate(llama, [with_system(chat, "Be safe."), chat], Plain(), SHORT)
    assert [c.text for c in recording.comparisons] == [c.text for c in wanted]


def test_a_method_without_a_plain_branch_is_compared_with_the_plain_prompt_too(llama):
    method = Contrast(principle="Be brief.", negative="Ramble.")
    recording = record(Decoder(llama), QUESTION, method, SHORT)
    assert [c.branch for c in recording.comparisons] == [None, 0, 1]
    assert recording.comparisons[0].text == generate(llama, QUESTION, Plain(), SHORT)[0].text


def test_a_branch_with_the_adapter_off_is_compared_so():
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = LanguageModel(peft.get_peft_model(random_model("llama"), config), byte_tokenizer())
    recording = record(Decoder(tuned), QUESTION, Contrast(base=True), SHORT)
    assert [(c.branch, c.adapter) for c in recording.comparisons] == [(0, True), (1, False)]
    on = generate(tuned, QUESTION, Plain(), SHORT)[0].text
    with tuned.model.disable_adapter():
        off = generate(tuned, QUESTION, Plain(), SHORT)[0].text
    assert [c.text for c in recording.comparisons] == [on, off]
    assert on != off


def test_plain_decoding_moves_nothing(llama):
    tokens = record(Decoder(llama), QUESTION, None, SHORT).tokens
    assert [t.kl for t in tokens] == [0.0] * len(tokens)
    assert not any(t.flipped for t in tokens)


def test_texts_keep_spaces_and_name_what_is_no_text():
    tokenizer = byte_tokenizer()
    texts = TokenTexts(tokenizer)
    space, letter = tokenizer(" z", add_special_tokens=False)["input_ids"]
    half = tokenizer("é", add_special_tokens=False)["input_ids"][0]
    assert texts(space) == " "
    assert texts(letter) == "z"
    assert texts(1) == "<|end|>"
    assert texts(half) == tokenizer.convert_ids_to_tokens(half)
    assert texts(10**6) == "<1000000>"


def test_jsonl_round_trip(tmp_path, llama):
    tokens = record(Decoder(llama), QUESTION, SelfCD(), SHORT).tokens
    tokens.append(trace(make_step(0, branches=[[-math.inf, 0.0, 0.0, 0.0], BRANCHES[1]])))
    path = tmp_path / "trace.jsonl"
    write_jsonl(path, tokens)
    assert read_jsonl(path) == tokens
    last = json.loads(path.read_text().splitlines()[-1], parse_constant=pytest.fail)
    assert last["branches"][0]["kl"] == "inf"


@pytest.mark.parametrize("line", ["{}", "[1]", "no json", '{"token": 1, "branches": 3}'])
def test_a_bad_row_is_named(tmp_path, line):
    path = tmp_path / "trace.jsonl"
    write_jsonl(path, [trace(make_step(0))])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"trace.jsonl:2: not a row of a trace"):
        read_jsonl(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nothing.jsonl: cannot be read"):
        read_jsonl(tmp_path / "nothing.jsonl")


def test_a_trace_says_what_gate_and_mask_left_out():
    """Against the equations: w = [max p <= gate]; what the mask leaves out has no mass."""
    method = LinearAlignment(principle="p", ratio=2, candidates=0.7, gate=0.6)
    sure, unsure = torch.tensor([3.0, 0, 0, 0]), torch.tensor([1.0, 0.9, 0.2, -3])
    for z_p, gate in ((sure, 0.0), (unsure, 1.0)):
        assert (float(z_p.softmax(-1).max()) <= 0.6) == bool(gate)
        logits = torch.stack([z_p, torch.zeros(4)])
        step = make_step(0)
        step = replace(step, logits=logits, combined=method.combine(logits[None])[0])
        found = trace_step(step, method, str)
        assert found.gate == gate
        kept = {a.token_id: a.combined for a in found.branches[0].alternatives}
        p = step.combined.softmax(-1)
        assert [kept[i] for i in range(4)] == pytest.approx(p.tolist())
        assert kept[3] == 0
    open_method = LinearAlignment(principle="p", damping=1.0)
    found = trace_step(step, open_method, str)
    assert found.gate == pytest.approx(1 - float(unsure.softmax(-1).max()))
    assert trace_step(step, LinearAlignment(principle="p"), str).gate is None
