"""The loop, held against `generate` of transformers and against a naive loop with no cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import CHATML, byte_tokenizer, random_model
from transformers import DynamicCache

from trueline import (
    AdaCD,
    Blend,
    Contrast,
    DataError,
    Decoder,
    LanguageModel,
    LinearAlignment,
    ModelError,
    Plain,
    Request,
    SamplingParams,
    SelfCD,
    generate,
)
from trueline.engine.batch import Batch
from trueline.methods._ops import with_system
from trueline.models.prompts import encode

QUESTIONS = ["Hi", "What is the moon made of?", "Name three birds, please."]
PRINCIPLE = "Talk like a pirate."
SHORT = SamplingParams(max_new_tokens=12)


def by_generate(lm: LanguageModel, question: str, system: str | None = None) -> list[int]:
    """What transformers gives for this prompt, greedily."""
    chat = with_system([{"role": "user", "content": question}], system)
    ids = torch.tensor([encode(lm, chat)])
    mask = torch.ones_like(ids)
    out = lm.model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def by_hand(lm: LanguageModel, question: str, method, new: int = 12) -> list[int]:
    """The method with one full forward a branch and token: no cache, no padding, no batch."""
    chats = method.prompts([{"role": "user", "content": question}])
    rows, answer = [encode(lm, chat) for chat in chats], []
    with torch.no_grad():
        while len(answer) < new and (not answer or answer[-1] not in lm.eos_token_ids):
            logits = [lm.model(torch.tensor([row + answer])).logits[0, -1] for row in rows]
            if method.first_tokens is not None and len(answer) >= method.first_tokens:
                z = logits[method.rest_branch]
            else:
                z = method.combine(torch.stack(logits)[None])[0]
            answer.append(int(z.argmax()))
    return answer


def two_contexts(lm: LanguageModel, question: str, method, positions: int) -> list[int]:
    """The method with a cache for each of two prompts, until the longer one is full."""
    feeds = [encode(lm, chat) for chat in method.prompts([{"role": "user", "content": question}])]
    longest, answer = max(map(len, feeds)), []
    caches = [DynamicCache(config=lm.model.config) for _ in feeds]
    while longest + len(answer) <= positions:
        with torch.no_grad():
            states = [
                lm.model(torch.tensor([ids]), **{lm.cache_name: cache}, use_cache=True)
                for ids, cache in zip(feeds, caches, strict=True)
            ]
        logits = torch.stack([state.logits[0, -1] for state in states])
        answer.append(int(method.combine(logits[None])[0].argmax()))
        feeds = [[answer[-1]]] * 2
    return answer


def ids_of(completions) -> list[list[int]]:
    return [c.token_ids for c in completions]


class TestReproducesGenerate:
    """Where a method is one of its branches, the tokens are those of `generate`."""

    @pytest.mark.parametrize(
        ("method", "system"),
        [
            (Plain(), None),
            (Plain(principle=PRINCIPLE), PRINCIPLE),
            (LinearAlignment(PRINCIPLE, ratio=0), PRINCIPLE),
            (LinearAlignment(PRINCIPLE, ratio=0, candidates=1), PRINCIPLE),
            (LinearAlignment(PRINCIPLE, ratio=-1, candidates=1), None),
            (LinearAlignment(PRINCIPLE, epsilon=0, candidates=1), None),
            (SelfCD(alpha=0), SelfCD().safety_prompt),
            (SelfCD(alpha=1), None),
            (Contrast(guidance=0, principle=PRINCIPLE, negative="Be rude."), "Be rude."),
            (Contrast(guidance=1, principle=PRINCIPLE, negative="Be rude."), PRINCIPLE),
            (Blend(((PRINCIPLE, 0.0),), candidates=1), None),
            (Blend(((PRINCIPLE, 1.0), ("Be brief.", 0.0))), PRINCIPLE),
        ],
        ids=repr,
    )
    def test_token_for_token(self, lm, method, system):
        expected = [by_generate(lm, q, system) for q in QUESTIONS]
        assert ids_of(generate(lm, QUESTIONS, method, SHORT)) == expected


METHODS = [
    LinearAlignment(PRINCIPLE),
    LinearAlignment(PRINCIPLE, epsilon=9.0, norm=3),
    SelfCD(),
    SelfCD(plausibility=0.1, first_tokens=3),
    AdaCD(first_tokens=4),
    Contrast(guidance=2, negative="Be rude."),
    Blend(((PRINCIPLE, 2.0), ("Be brief.", -1.0))),
]


class TestEqualsTheNaiveLoop:
    @pytest.mark.parametrize("method", METHODS, ids=repr)
    def test_batched_and_alone(self, lm, method):
        expected = [by_hand(lm, q, method) for q in QUESTIONS]
        assert ids_of(generate(lm, QUESTIONS, method, SHORT)) == expected
        assert [ids_of(generate(lm, [q], method, SHORT))[0] for q in QUESTIONS] == expected

    def test_methods_and_settings_mixed_in_one_batch(self, lm):
        requests = [
            Request(QUESTIONS[i % 3], method, dataclasses.replace(SHORT, max_new_tokens=4 + i))
            for i, method in enumerate([*METHODS, Plain()])
        ]
        expected = [by_hand(lm, r.messages, r.method, r.sampling.max_new_tokens) for r in requests]
        assert ids_of(generate(lm, requests)) == expected


class TestSampling:
    def test_same_seed_same_text_whatever_the_batch(self, lm):
        params = SamplingParams(max_new_tokens=10, temperature=1.3, top_p=0.95)
        method = LinearAlignment(PRINCIPLE, ratio=1, candidates=0.99)
        requests = [Request(q, seed=7 + i) for i, q in enumerate(QUESTIONS * 2)]
        together = ids_of(generate(lm, requests, method, params))
        alone = [ids_of(generate(lm, [r], method, params))[0] for r in requests]
        assert together == alone == ids_of(generate(lm, requests, method, params, batch_size=2))
        assert together[0] != together[3], "another seed gives another text"

    def test_sample_j_is_drawn_with_seed_plus_j(self, llama):
        params = SamplingParams(max_new_tokens=8, temperature=1.5, n=3)
        many = generate(llama, [Request("Hi", seed=4), Request("Why?", seed=9)], SelfCD(), params)
        one = dataclasses.replace(params, n=1)
        expected = [
            generate(llama, [Request(q, seed=s + j)], SelfCD(), one)[0].token_ids
            for q, s in (("Hi", 4), ("Why?", 9))
            for j in range(3)
        ]
        assert ids_of(many) == expected
        assert [c.seed for c in many] == [4, 5, 6, 9, 10, 11]

    def test_repetition_penalty_is_that_of_transformers(self, lm):
        ids = torch.tensor([encode(lm, [{"role": "user", "content": "Hi"}])])
        expected = lm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=1.7,
        )[0, ids.shape[1] :].tolist()
        params = SamplingParams(max_new_tokens=12, repetition_penalty=1.7)
        assert generate(lm, "Hi", sampling=params)[0].token_ids == expected

    def test_logprobs_before_and_after_the_method(self, llama):
        params = SamplingParams(max_new_tokens=5, temperature=0.7, logprobs=True)
        method = LinearAlignment(PRINCIPLE, ratio=1.5, candidates=1)
        [got] = generate(llama, [Request("Hi", seed=3)], method, params)
        rows = [encode(llama, c) for c in method.prompts([{"role": "user", "content": "Hi"}])]
        after, before = [], []
        for t, token in enumerate(got.token_ids):
            with torch.no_grad():
                z_p, z_0 = (
                    llama.model(torch.tensor([r + got.token_ids[:t]])).logits[0, -1] / 0.7
                    for r in rows
                )
            after.append((2.5 * z_p - 1.5 * z_0).log_softmax(-1)[token].item())
            before.append(z_p.log_softmax(-1)[token].item())
        assert got.logprobs == pytest.approx(after, abs=1e-4)
        assert got.branch_logprobs == pytest.approx(before, abs=1e-4)


class TestEnds:
    def test_limit_of_positions_ends_with_length(self):
        for kind in ("llama", "gpt2"):
            lm = LanguageModel(random_model(kind, positions=48), byte_tokenizer(), kind)
            lm.__dict__["eos_token_ids"] = frozenset()
            prompt = len(encode(lm, [{"role": "user", "content": "Hi"}]))
            [got] = generate(lm, "Hi", sampling=SamplingParams(max_new_tokens=500))
            # The last token needs no position of its own.
            assert len(got.token_ids) == 48 - prompt + 1
            assert got.finish_reason == "length"
            long = LinearAlignment("word " * 7, candidates=1)
            [got] = generate(lm, "Hi", long, SamplingParams(max_new_tokens=500))
            assert len(got.token_ids) == 48 - max(got.prompt_tokens) + 1

    @pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "gpt2"])
    def test_two_contexts_up_to_the_last_position(self, kind):
        """Branches of unequal length, no longer one beyond the limit; batched, alone, refilled."""
        lm = LanguageModel(random_model(kind, positions=64), byte_tokenizer(), kind)
        lm.__dict__["eos_token_ids"] = frozenset()
        params = SamplingParams(max_new_tokens=500)
        methods = [LinearAlignment(PRINCIPLE, ratio=1, candidates=1), Contrast(1.5, "Be brief.")]
        requests = [Request(q, m, params) for m in methods for q in QUESTIONS]
        expected = [two_contexts(lm, r.messages, r.method, 64) for r in requests]
        got = generate(lm, requests)
        assert ids_of(got) == expected
        assert {max(c.prompt_tokens) + len(c.token_ids) for c in got} == {65}
        assert [ids_of(generate(lm, [r]))[0] for r in requests] == expected
        assert ids_of(generate(lm, requests, batch_size=4, refill=True)) == expected

    def test_too_long_is_refused_with_both_numbers(self):
        lm = LanguageModel(random_model("llama", positions=48), byte_tokenizer(), "small")
        with pytest.raises(DataError, match=r"59 tokens.*48 positions"):
            generate(lm, ["Hi", "x" * 56])

    def test_end_of_text_stops_one_request_and_not_the_other(self, llama):
        endless, ended = (LanguageModel(llama.model, llama.tokenizer) for _ in range(2))
        endless.__dict__["eos_token_ids"] = frozenset()
        free = ids_of(generate(endless, QUESTIONS, sampling=SHORT))
        end = free[0][2]
        ended.__dict__["eos_token_ids"] = frozenset([end])
        expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
        assert ids_of(generate(ended, QUESTIONS, sampling=SHORT)) == expected

    def test_finished_requests_and_dropped_branches_leave_the_batch(self, llama, monkeypatch):
        shapes = record_shapes(monkeypatch)
        lm = LanguageModel(llama.model, llama.tokenizer)
        lm.__dict__["eos_token_ids"] = frozenset()
        short, long = (SamplingParams(max_new_tokens=n) for n in (2, 5))
        requests = [
            Request("Hi", Plain(), short),
            Request("Why?", SelfCD(first_tokens=3), long),
        ]
        list(Decoder(lm, share_prefixes=False).stream(requests))
        # prefill 1 + 2 rows, then both, then the second alone, then without its second branch
        assert [rows for rows, _ in shapes] == [3, 3, 2, 1, 1]


def record_shapes(monkeypatch) -> list[tuple[int, int]]:
    """Return a list that every forward of the loop adds its (rows, columns) to."""
    shapes: list[tuple[int, int]] = []
    call = Batch._call

    def counted(self, ids, positions, count=1):
        shapes.append(tuple(ids.shape))
        return call(self, ids, positions, count)

    monkeypatch.setattr(Batch, "_call", counted)
    return shapes


class TestSharedPrefixes:
    def test_same_tokens_and_less_work(self, lm, monkeypatch):
        method = LinearAlignment("Speak in the manner of an old sailor, always.", candidates=1)
        requests = [Request(q) for q in QUESTIONS]
        plain = Decoder(lm, share_prefixes=False)
        sharing = Decoder(lm)
        expected = ids_of(plain.complete([plain.encode(r, method, SHORT) for r in requests]))
        prompts = [sharing.encode(r, method, SHORT) for r in requests]
        assert ids_of(sharing.complete(prompts)) == expected
        assert len(sharing.backend.store.entries) == 1, "one system prompt, computed once"
        shapes = record_shapes(monkeypatch)
        assert ids_of(sharing.complete(prompts)) == expected
        longest = max(len(ids) for p in prompts for ids in p.branches)
        assert shapes[0][1] < longest - 40, "the system prompt is not computed again"

    def test_next_turn_computes_only_what_is_new(self, lm, monkeypatch):
        chat = [{"role": "user", "content": "Hello there, how are you today?"}]
        decoder = Decoder(lm, keep_turns=True)
        method = LinearAlignment(PRINCIPLE)
        decoder.complete([decoder.encode(chat, method, SHORT)])
        chat += [{"role": "assistant", "content": "Well."}, {"role": "user", "content": "Why?"}]
        expected = ids_of(generate(lm, [chat], method, SHORT))
        prompt = decoder.encode(chat, method, SHORT)
        shapes = record_shapes(monkeypatch)
        assert ids_of(decoder.complete([prompt])) == expected
        # the answer differs from what was decoded, so that it and the new question are computed
        new = len("Well.") + len("Why?") + 4
        assert shapes[0] == (2, new)

    def test_a_longer_turn_replaces_the_shorter_one(self, llama):
        decoder = Decoder(llama, keep_turns=True)
        chat = [{"role": "user", "content": "Hello there, how are you today?"}]
        for _ in range(3):
            answer = decoder.complete([decoder.encode(chat, LinearAlignment(PRINCIPLE), SHORT)])[0]
            chat += [
                {"role": "assistant", "content": answer.text.strip("\ufffd") or "Well."},
                {"role": "user", "content": "Why?"},
            ]
        assert len(decoder.backend.store.entries) <= 6


def test_logits_that_are_not_finite_are_an_error(llama):
    import copy

    broken = LanguageModel(copy.deepcopy(llama.model), llama.tokenizer, "broken")
    torch.nn.init.constant_(broken.model.lm_head.weight, float("nan"))
    for params in (SHORT, SamplingParams(temperature=1.0)):
        with pytest.raises(ModelError, match="not finite"):
            generate(broken, "Hi", sampling=params)


class TestStreaming:
    def test_pieces_join_to_the_text(self, lm):
        whole = generate(lm, QUESTIONS, SelfCD(), SHORT)
        texts = [""] * 3
        for step in Decoder(lm).stream(QUESTIONS, SelfCD(), SHORT):
            texts[step.ticket.number] += step.text
        assert texts == [c.text for c in whole]

    def test_recorded_logits_are_those_of_the_branches(self, llama):
        method = SelfCD(alpha=2)
        chats = method.prompts([{"role": "user", "content": "Hi"}])
        ids: list[int] = []
        for step in Decoder(llama).stream(["Hi"], method, SHORT, record=True):
            with torch.no_grad():
                expected = [
                    llama.model(torch.tensor([encode(llama, c) + ids])).logits[0, -1] for c in chats
                ]
            torch.testing.assert_close(step.logits, torch.stack(expected), atol=1e-4, rtol=1e-4)
            z = 2 * expected[1] - expected[0]
            torch.testing.assert_close(step.combined, z, atol=1e-3, rtol=1e-3)
            ids.append(step.token_id)


class TestRealModels:
    @pytest.mark.parametrize(
        ("name", "raw"), [("craftgpt-5m", False), ("stories260K", True)], ids=lambda v: str(v)
    )
    def test_identities(self, shared, name, raw):
        from trueline import load_model

        lm = load_model(shared / "models" / name, raw=raw, dtype="float32")
        questions = ["hello there", "tell me about the sun"]
        system = "be kind"
        for method, text in (
            (Plain(), None),
            (SelfCD(alpha=0, safety_prompt=system), system),
            (SelfCD(alpha=1, safety_prompt=system), None),
            (LinearAlignment(system, ratio=0), system),
            (Contrast(guidance=0, principle=system, negative="be rude"), "be rude"),
            (Contrast(guidance=1, principle=system, negative="be rude"), system),
        ):
            expected = [by_generate(lm, q, text) for q in questions]
            assert ids_of(generate(lm, questions, method, SHORT)) == expected
        method = LinearAlignment(system)
        expected = [by_hand(lm, q, method) for q in questions]
        assert ids_of(generate(lm, questions, method, SHORT)) == expected


class TestAdapters:
    def test_second_branch_runs_with_the_adapter_off(self, llama):
        import copy

        peft = pytest.importorskip("peft")
        base = copy.deepcopy(llama.model)
        tuned = peft.get_peft_model(
            copy.deepcopy(llama.model),
            peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        )
        torch.manual_seed(1)
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
        lm = LanguageModel(tuned, byte_tokenizer(CHATML), "tuned")
        plain = LanguageModel(base, byte_tokenizer(CHATML), "base")
        tuned_ids = [by_generate(lm, q) for q in QUESTIONS]
        base_ids = [by_generate(plain, q) for q in QUESTIONS]
        assert tuned_ids != base_ids
        for guidance, expected in ((1, tuned_ids), (0, base_ids)):
            method = Contrast(base=True, guidance=guidance)
            assert ids_of(generate(lm, QUESTIONS, method, SHORT)) == expected
