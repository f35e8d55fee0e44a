"""Speculative decoding: the texts of the loop without it, in fewer forwards, off where it fails."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter

import pytest
import torch
from conftest import byte_tokenizer, random_model

from trueline import (
    AdaCD,
    Blend,
    ConfigError,
    Contrast,
    Decoder,
    LanguageModel,
    LinearAlignment,
    Plain,
    Request,
    SamplingParams,
    SelfCD,
    generate,
    load_model,
)
from trueline.engine import speculation
from trueline.engine.batch import Batch
from trueline.engine.speculation import LENGTHS, DraftModel, Lookup, StepCosts, Taken
from trueline.models.adapter import BASE
from trueline.models.prompts import encode
from trueline.types import Method

QUESTIONS = ["Hi", "What is the moon made of?", "Name three birds, please: three birds."]
PRINCIPLE = "Talk like a pirate."
METHODS: list[Method] = [
    Plain(),
    LinearAlignment(PRINCIPLE),
    LinearAlignment(PRINCIPLE, gate=0.6, damping=1.0),
    SelfCD(plausibility=0.1, first_tokens=3),
    AdaCD(first_tokens=5),
    Contrast(guidance=2, negative="Be rude."),
    Blend(((PRINCIPLE, 2.0), ("Be brief.", -1.0))),
]
FEW = pytest.mark.parametrize("lm", ["llama", "gemma3_text"], indirect=True)
"""Classes of models for what does not differ between them; all are tried in one batch."""


class Prophet:
    """Proposes what will come, with a wrong token here and there."""

    def __init__(self, texts, wrong: float = 0.3) -> None:
        self.texts, self.wrong, self.random = texts, wrong, random.Random(0)

    def cost(self):
        return 0.0

    def taken(self, draft):
        return Taken(3.0)

    def propose(self, draft, count):
        seed = draft.ticket.prompt.seed + draft.sample
        ids = self.texts[seed][len(draft.token_ids) :][:count]
        return [t if self.random.random() > self.wrong else 7 for t in ids]


@pytest.fixture
def free(monkeypatch):
    """Every forward costs the same, so that as much as may be is proposed."""
    monkeypatch.setattr(StepCosts, "__call__", lambda self, rows: dict.fromkeys(LENGTHS, 1.0))
    monkeypatch.setattr(DraftModel, "cost", lambda self: 0.01)


@pytest.fixture
def forwards(monkeypatch):
    """The (rows, tokens) of every forward of the loop."""
    seen = []
    forward = Batch.forward

    def counted(self, tokens, idle=()):
        seen.append((len(tokens), len(tokens[0])))
        return forward(self, tokens, idle)

    monkeypatch.setattr(Batch, "forward", counted)
    return seen


def with_source(lm: LanguageModel, source, **options) -> Decoder:
    decoder = Decoder(lm, **options)
    decoder.backend.speculation = speculation.Speculation(lm, source)
    return decoder


def speculating(lm: LanguageModel, source="lookup") -> LanguageModel:
    return LanguageModel(lm.model, lm.tokenizer, lm.name, speculate=source)


def ids_of(completions):
    return [c.token_ids for c in completions]


def mixed(lm, count: int = 12) -> list[Request]:
    """Methods, questions, lengths, temperatures, penalties and n mixed; seeds apart."""
    found = []
    for i in range(count):
        params = SamplingParams(max_new_tokens=5 + 6 * (i % 4), temperature=(i % 3) * 0.6)
        if i % 6 == 2:
            params = dataclasses.replace(params, n=2, repetition_penalty=1.2)
        method = METHODS[i % len(METHODS)]
        found.append(Request(QUESTIONS[i % 3] * (1 + i % 2), method, params, seed=10 * i))
    return found


class TestTheSameTexts:
    @FEW
    @pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
    def test_greedy_alone_and_ragged(self, lm, free, forwards, method):
        """Whatever the rows of a batch accept."""
        params = SamplingParams(max_new_tokens=24)
        given = [Request(q, method, params, seed=i) for i, q in enumerate(QUESTIONS)]
        expected = ids_of(generate(lm, given))
        forwards.clear()
        prophet = Prophet(dict(enumerate(expected)))
        together = with_source(lm, prophet)
        assert ids_of(together.complete([together.encode(r) for r in given])) == expected
        steps = len(forwards)
        assert steps < max(map(len, expected)) - 1, "fewer forwards than tokens"
        for request, ids in zip(given, expected, strict=True):
            alone = with_source(lm, prophet)
            assert ids_of(alone.complete([alone.encode(request)])) == [ids]

    def test_everything_mixed(self, lm, free):
        given = mixed(lm)
        expected = [c for r in given for c in generate(lm, [r])]
        texts = {c.seed: c.token_ids for c in expected}
        for options in ({"batch_size": 16}, {"batch_size": 3, "admission": "each_step"}):
            decoder = with_source(lm, Prophet(texts), **options)
            got = decoder.complete([decoder.encode(r) for r in given])
            assert ids_of(got) == ids_of(expected), options
            assert [c.text for c in got] == [c.text for c in expected]
            assert [c.finish_reason for c in got] == [c.finish_reason for c in expected]

    @FEW
    def test_by_lookup_and_by_draft_models(self, lm, free, forwards):
        torch.manual_seed(1)
        other = copy.deepcopy(lm.model)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(torch.randn_like(p) * 0.02)
        drafts = [LanguageModel(m, lm.tokenizer, "draft") for m in (lm.model, other)]
        given = mixed(lm, 8)
        expected = ids_of(generate(lm, given))
        for source in ("lookup", *drafts):
            forwards.clear()
            assert ids_of(generate(speculating(lm, source), given)) == expected
            if source != "lookup":
                assert any(length > 1 for _, length in forwards)
        given = [Request(f"{c} {c} {c}", SelfCD(), SamplingParams(max_new_tokens=40)) for c in "ab"]
        forwards.clear()
        expected = ids_of(generate(lm, given, batch_size=1))
        plain = len(forwards)
        assert ids_of(generate(speculating(lm), given, batch_size=1)) == expected
        assert len(forwards) <= 2 * plain

    def test_stop_strings_and_streamed_pieces(self, llama, free):
        [whole] = generate(llama, "Hi", sampling=SamplingParams(max_new_tokens=30))
        params = SamplingParams(max_new_tokens=30, stop=(whole.text[7:9],))
        [expected] = generate(llama, "Hi", None, params)
        assert len(expected.token_ids) < len(whole.token_ids)
        decoder = with_source(llama, Prophet({0: whole.token_ids}, wrong=0))
        steps = list(decoder.stream(["Hi"], None, params))
        assert [s.token_id for s in steps] == expected.token_ids
        assert "".join(s.text for s in steps) == expected.text
        assert [s.position for s in steps] == list(range(len(steps)))
        assert [s.finish_reason for s in steps].count("stop") == 1

    def test_logprobs_and_recorded_logits(self, lm, free):
        params = SamplingParams(max_new_tokens=16, temperature=0.8, logprobs=True)
        method = LinearAlignment(PRINCIPLE, damping=1.0)
        request = Request("Hi", method, params, seed=3)
        plain, ahead = Decoder(lm), None
        expected = list(plain.stream([request], record=True))
        ahead = with_source(lm, Prophet({3: [s.token_id for s in expected]}))
        got = list(ahead.stream([request], record=True))
        for a, b in zip(expected, got, strict=True):
            assert (a.token_id, a.position, a.text) == (b.token_id, b.position, b.text)
            assert b.logprob == pytest.approx(a.logprob, abs=1e-4)
            torch.testing.assert_close(b.logits, a.logits, atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
    def test_up_to_the_last_position(self, kind, free):
        lm = LanguageModel(random_model(kind, positions=64), byte_tokenizer(), kind)
        lm.__dict__["eos_token_ids"] = frozenset()
        params = SamplingParams(max_new_tokens=500)
        given = [Request(q, Contrast(1.5, "Be brief."), params, seed=i)
                 for i, q in enumerate(QUESTIONS[:2])]  # fmt: skip
        expected = ids_of(generate(lm, given))
        decoder = with_source(lm, Prophet(dict(enumerate(expected)), wrong=0.1))
        assert ids_of(decoder.complete([decoder.encode(r) for r in given])) == expected
        ahead = LanguageModel(lm.model, lm.tokenizer, kind, speculate=LanguageModel(
            random_model(kind, positions=48), lm.tokenizer, "short"))  # fmt: skip
        ahead.__dict__["eos_token_ids"] = frozenset()
        assert ids_of(generate(ahead, given)) == expected

    def test_turns_are_kept(self, lm, free):
        chat = [{"role": "user", "content": "Hello there, how are you today?"}]
        params = SamplingParams(max_new_tokens=16)
        found = []
        for made in (lambda: Decoder(lm, keep_turns=True), None):
            [first] = generate(lm, [chat], LinearAlignment(PRINCIPLE), params)
            decoder = made() if made else with_source(
                lm, Prophet({0: first.token_ids}), keep_turns=True
            )  # fmt: skip
            own = decoder.complete([decoder.encode(chat, LinearAlignment(PRINCIPLE), params)])
            assert ids_of(own) == [first.token_ids]
            store = decoder.backend.store
            found.append({key: entry[0][0] for key, entry in store.entries.items()})
        assert found[0].keys() == found[1].keys()
        for key, states in found[0].items():
            torch.testing.assert_close(found[1][key], states, atol=1e-4, rtol=1e-3)


def test_sampled_tokens_have_the_combined_distribution(free):
    """Pairs of tokens over 1,500 seeds against exact probabilities; the source is often wrong."""
    lm = LanguageModel(random_model("llama"), byte_tokenizer(), "llama")
    lm.__dict__["eos_token_ids"] = frozenset()
    method = LinearAlignment(PRINCIPLE, ratio=1, candidates=1)
    rows = [encode(lm, c) for c in method.prompts([{"role": "user", "content": "Hi"}])]

    def after(tokens):
        with torch.no_grad():
            z = [lm.model(torch.tensor([r + tokens])).logits[0, -1] / 0.5 for r in rows]
        return method.combine(torch.stack(z)[None])[0].softmax(-1)

    first = after([])
    likely = first.topk(3).indices.tolist()
    exact = {(a, b): float(first[a] * p) for a in likely for b, p in enumerate(after([a])) if p > 0}
    seeds = 1500
    params = SamplingParams(max_new_tokens=3, temperature=0.5)

    class Guess(Prophet):
        def propose(self, draft, count):
            return [self.random.choice(likely)][:count]

    decoder = with_source(lm, Guess({}), batch_size=32)
    prompts = [decoder.encode(Request("Hi", method, params, seed=s)) for s in range(seeds)]
    counts = Counter(tuple(c.token_ids[:2]) for c in decoder.complete(prompts))
    common = {pair: p for pair, p in exact.items() if p * seeds >= 5}
    assert len(common) >= 4
    rest = 1 - sum(common.values())
    chi = sum((counts[pair] - p * seeds) ** 2 / (p * seeds) for pair, p in common.items())
    chi += (seeds - sum(counts[p] for p in common) - rest * seeds) ** 2 / (rest * seeds)
    free_degrees = len(common)
    # The 0.999 quantile of chi squared is below this (Wilson and Hilferty).
    bound = free_degrees * (1 - 2 / (9 * free_degrees) + 3.1 * (2 / (9 * free_degrees)) ** 0.5) ** 3
    assert chi < bound


class TestWhenItPays:
    PARAMS = SamplingParams(max_new_tokens=60)

    def test_off_where_proposals_fail(self, llama, monkeypatch, forwards):
        monkeypatch.setattr(StepCosts, "__call__", lambda self, rows: {1: 1.0, 8: 1.5})
        lm = LanguageModel(llama.model, llama.tokenizer)
        lm.__dict__["eos_token_ids"] = frozenset()

        class Wrong(Lookup):
            def propose(self, draft, count):
                return [7] * count

        decoder = with_source(lm, Wrong())
        decoder.complete([decoder.encode(Request("a b a b a b", Plain(), self.PARAMS))])
        lengths = [length for _, length in forwards]
        assert max(lengths) > 1
        assert set(lengths[len(lengths) // 2 :]) == {1}

    def test_off_where_tokens_cost_as_much_as_steps(self, llama, forwards, monkeypatch):
        dear = {n: 1.0 * n for n in LENGTHS}
        monkeypatch.setattr(StepCosts, "__call__", lambda self, rows: dear)
        lm = speculating(llama)
        [expected] = generate(llama, "Hi", None, self.PARAMS)
        forwards.clear()
        assert generate(lm, "Hi", None, self.PARAMS)[0].token_ids == expected.token_ids
        assert {length for _, length in forwards} == {1}

    def test_what_is_not_checked_is_learned_from(self, llama, monkeypatch, forwards):
        """A text that begins to repeat itself turns it on again."""
        monkeypatch.setattr(StepCosts, "__call__", lambda self, rows: {1: 1.0, 8: 1.7})
        lookup = Lookup()
        monkeypatch.setattr(speculation, "GRAMS", (2,))
        decoder = with_source(llama, lookup)
        prompt = decoder.encode(Request("Hi", Plain(), self.PARAMS))
        tickets = [decoder.add(prompt)]
        decoder.step()
        draft = decoder.backend.rows[0][0]
        text = lookup._text(draft)
        text.fared = {n: Taken(0.1) for n in text.fared}
        shares = []
        draft.token_ids[:] = [50, 60] * 3
        for token in [50, 60] * 8:
            speculator = decoder.backend.speculation
            assert speculator._open == []
            made = speculator.propose([draft], 1)
            shares.append(text.fared[2].share)
            if made:
                break
            draft.token_ids.append(token)
            speculator.learn()
        assert shares[0] < 0.1 < shares[-1]
        assert len(made[draft]) == 7
        decoder.cancel(tickets[0])

    def test_a_draft_model_that_failed_is_tried_again(self, llama, free):
        source = DraftModel(llama, 261)
        decoder = with_source(llama, source)
        ticket = decoder.add(decoder.encode(Request("Hi", Plain(), self.PARAMS)))
        decoder.step()
        draft = decoder.backend.rows[0][0]
        source.taken(draft).taken = 0.0
        assert source.taken(draft).share < 0.01
        draft.token_ids += [9] * speculation.PROBE
        assert source.taken(draft).share > 0.5
        decoder.cancel(ticket)

    def test_costs_are_measured_once_for_a_machine(self, llama, tmp_path, monkeypatch):
        monkeypatch.setenv("TRUELINE_CACHE", str(tmp_path))
        costs = StepCosts(llama)
        first = costs(2)
        assert list(first) == list(LENGTHS)
        assert all(seconds > 0 for seconds in first.values())
        with monkeypatch.context() as patch:
            patch.setattr(StepCosts, "_measure", None)
            assert StepCosts(llama)(2) == first
        (tmp_path / "file").touch()
        monkeypatch.setenv("TRUELINE_CACHE", str(tmp_path / "file"))
        assert StepCosts(llama)(3) == {n: pytest.approx(1 + 0.09 * (n - 1)) for n in LENGTHS}


class TestLookup:
    def test_the_longest_match_the_latest_place_and_a_period(self, llama):
        def proposed(prompt, answer, count=4):
            decoder, lookup = Decoder(llama), Lookup()
            ticket = decoder.add(dataclasses.replace(decoder.encode("Hi"), branches=[prompt]))
            [draft] = speculation_drafts(ticket, llama)
            draft.token_ids += answer
            return lookup.propose(draft, count)

        assert proposed([5, 6, 7, 8, 9], [6, 7]) == [8, 9, 6, 7]
        assert proposed([5, 6, 20, 3, 6, 21, 5], [6]) == [20, 3, 6, 21], "two tokens before one"
        assert proposed([6, 20, 3, 6, 21, 9], [6]) == [21, 9, 6, 21], "the later of two"
        assert proposed([5, 6, 7], [9]) == []
        assert proposed([1], [2, 3, 2, 3]) == [2, 3, 2, 3]

    def test_as_a_search_through_the_text_would(self, llama):
        draw = random.Random(3)
        decoder, lookup = Decoder(llama), Lookup()
        prompt = [draw.randrange(4) for _ in range(40)]
        ticket = decoder.add(dataclasses.replace(decoder.encode("Hi"), branches=[prompt]))
        [draft] = speculation_drafts(ticket, llama)
        for _ in range(60):
            draft.token_ids.append(draw.randrange(4))
            ids = prompt + draft.token_ids
            found = next(
                (ids[i + n] for n in speculation.GRAMS for i in range(len(ids) - n - 1, -1, -1)
                 if ids[i : i + n] == ids[-n:]), None
            )  # fmt: skip
            assert lookup.propose(draft, 1) == ([] if found is None else [found])


def speculation_drafts(ticket, lm):
    from trueline.engine.drafts import begin

    return begin(ticket, lm)


class TestBatch:
    @pytest.mark.parametrize("counts", [[0, 0, 0], [3, 3, 3], [2, 0, 4], [4, 4, 4], [1, 4, 4]])
    def test_what_is_taken_back_was_never_there(self, lm, counts):
        rows, fed = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]], [[20, 21, 22, 23]] * 3
        with torch.inference_mode():
            batch = Batch(lm, rows, [BASE] * 3)
            batch.prefill(None)
            batch.forward(fed)
            batch.keep(counts, 4)
            got = batch.forward([[30], [31], [32]])[:, 0]
            longest = max(len(r) + n + 1 for r, n in zip(rows, counts, strict=True))
            assert batch.cache.get_seq_length() == longest, "no column that no row uses"
            for i, n in enumerate(counts):
                ids = [*rows[i], *fed[i][:n], 30 + i]
                expected = lm.model(torch.tensor([ids])).logits[0, -1]
                torch.testing.assert_close(got[i], expected, atol=1e-4, rtol=1e-3)


def test_names_and_refusals(llama, tmp_path):
    random_model("llama").save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    lm = load_model(tmp_path / "m", speculate=tmp_path / "m")
    assert isinstance(lm.speculate, LanguageModel)
    assert load_model(tmp_path / "m", speculate="lookup").speculate == "lookup"
    other = byte_tokenizer()
    other.add_tokens(["more"])
    with pytest.raises(ConfigError, match='Draft model "d" has another tokenizer than "llama"'):
        speculating(llama, LanguageModel(llama.model, other, "d"))
