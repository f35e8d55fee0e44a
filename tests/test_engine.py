"""The scheduler and its batch: who joins gets the tokens that it would get alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from conftest import CHATML, byte_tokenizer, random_model

from trueline import (
    AdaCD,
    Blend,
    ConfigError,
    Contrast,
    DataError,
    Decoder,
    LanguageModel,
    LinearAlignment,
    ModelError,
    Plain,
    Prompt,
    Request,
    SamplingParams,
    SelfCD,
    generate,
    load_model,
)
from trueline.engine.batch import Batch
from trueline.engine.cache import PrefixStore
from trueline.engine.protocol import Continuation
from trueline.engine.scheduler import PATIENCE, SOON, Scheduler
from trueline.engine.torch_backend import TorchBackend
from trueline.models.adapter import BASE
from trueline.models.prompts import encode

QUESTIONS = ["Hi", "What is the moon made of, and what is it for?", "Name three birds, please."]
PRINCIPLE = "Talk like a pirate."
METHODS = [
    Plain(),
    LinearAlignment(PRINCIPLE),
    SelfCD(plausibility=0.1, first_tokens=3),
    AdaCD(first_tokens=5),
    Contrast(guidance=2, negative="Be rude."),
    Blend(((PRINCIPLE, 2.0), ("Be brief.", -1.0))),
]


def requests(count: int = 12) -> list[Request]:
    """Methods of one to three branches, questions, lengths, temperatures and n mixed."""
    found = []
    for i in range(count):
        params = SamplingParams(max_new_tokens=3 + 5 * (i % 4), temperature=(i % 3) * 0.8)
        if i % 6 == 2:
            params = dataclasses.replace(params, n=2, repetition_penalty=1.2)
        found.append(Request(QUESTIONS[i % 3] * (1 + i % 2), METHODS[i % 6], params, seed=i))
    return found


def ids_of(completions) -> list[list[int]]:
    return [c.token_ids for c in completions]


def alone(lm: LanguageModel, request: Request) -> list[list[int]]:
    return ids_of(generate(lm, [request]))


def arrive(decoder: Decoder, given: list[Request], every: int) -> dict[int, list[list[int]]]:
    """Add a request every so many steps while the others are under way; return their tokens."""
    tickets, waiting = {}, list(enumerate(given))
    found: dict[int, list[list[int]]] = {i: [[] for _ in range(_n(r))] for i, r in waiting}
    for count in itertools.count():
        if waiting and count % every == 0:
            i, request = waiting.pop(0)
            tickets[decoder.add(decoder.encode(request))] = i
        steps = decoder.step()
        for step in steps:
            own = found[tickets[step.ticket]][step.sample]
            assert step.position == len(own)
            own.append(step.token_id)
        if not steps and not waiting:
            return found


def _n(request: Request) -> int:
    return request.sampling.n


class TestJoining:
    @pytest.mark.parametrize("every", [1, 2, 5])
    def test_the_tokens_are_those_of_the_request_alone(self, lm, every):
        given = requests()
        decoder = Decoder(lm, batch_size=5, admission="each_step")
        found = arrive(decoder, given, every)
        for i, request in enumerate(given):
            assert found[i] == alone(lm, request), i

    @pytest.mark.parametrize("size", [1, 3, 8])
    def test_refilled_batches_give_the_same_texts(self, lm, size):
        given = requests()
        expected = [tokens for request in given for tokens in alone(lm, request)]
        assert ids_of(generate(lm, given, batch_size=size, refill=True)) == expected

    def test_gemma3_beyond_its_window(self):
        lm = LanguageModel(random_model("gemma3_text"), byte_tokenizer(), "gemma3")
        given = [dataclasses.replace(r, messages=r.messages * 2) for r in requests(8)]
        found = arrive(Decoder(lm, batch_size=4, admission="each_step"), given, 2)
        assert [found[i] for i in range(8)] == [alone(lm, request) for request in given]
        # Its random weights repeat themselves: the numbers show more than the tokens.
        params = SamplingParams(max_new_tokens=24, temperature=1.0, logprobs=True)
        given = [Request(q * 2, METHODS[i], params, seed=i) for i, q in enumerate(QUESTIONS * 2)]
        joined = generate(lm, given, batch_size=2, refill=True)
        for got, request in zip(joined, given, strict=True):
            [expected] = generate(lm, [request])
            assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-4)

    def test_with_an_adapter_off_in_some_branches(self, tuned):
        methods = [Contrast(base=True, guidance=2), Plain(), LinearAlignment(PRINCIPLE)]
        params = SamplingParams(max_new_tokens=9)
        given = [Request(QUESTIONS[i % 3], methods[i % 3], params) for i in range(6)]
        found = arrive(Decoder(tuned, batch_size=3, admission="each_step"), given, 2)
        assert [found[i] for i in range(6)] == [alone(tuned, request) for request in given]

    def test_a_row_at_the_last_position_beside_one_that_begins(self):
        for kind in ("llama", "gpt2"):
            lm = LanguageModel(random_model(kind, positions=64), byte_tokenizer(), kind)
            lm.__dict__["eos_token_ids"] = frozenset()
            params = SamplingParams(max_new_tokens=500)
            given = [Request(q, Plain(), params) for q in ("Hi", "x" * 40, "Why?", "y" * 30) * 3]
            found = arrive(Decoder(lm, batch_size=3, admission="each_step"), given, 7)
            assert [found[i] for i in range(12)] == [alone(lm, request) for request in given]
            assert ids_of(generate(lm, given, batch_size=3, refill=True)) == [
                ids for i in range(12) for ids in found[i]
            ]

    def test_a_row_that_waits_at_the_last_position_grows_no_longer(self):
        """One place of 16 is not worth a prefill for two: the row of who ended there waits."""
        lm = LanguageModel(random_model("gpt2", positions=64), byte_tokenizer(), "gpt2")
        lm.__dict__["eos_token_ids"] = frozenset()
        given = [Request("x" * 54, Plain(), SamplingParams(max_new_tokens=500))]
        given += [Request("Hi", Plain(), SamplingParams(max_new_tokens=20 + i)) for i in range(17)]
        found = ids_of(generate(lm, given, batch_size=16, refill=True))
        assert len(found[0]) < 12
        assert found == [ids for request in given for ids in alone(lm, request)]

    def test_columns_that_no_row_uses_are_dropped(self, llama, monkeypatch):
        """Else the oldest row's length would grow with the run."""
        widths = []
        call = Batch._call

        def spy(self, ids, positions, count=1):
            logits = call(self, ids, positions, count)
            widths.append(self.cache.get_seq_length())
            return logits

        monkeypatch.setattr(Batch, "_call", spy)
        params = SamplingParams(max_new_tokens=10)
        decoder = Decoder(llama, batch_size=2, admission="each_step")
        arrive(decoder, [Request("Hi", Plain(), params)] * 30, 5)
        assert max(widths) <= 2 * (len(encode(llama, [{"role": "user", "content": "Hi"}])) + 10)


@pytest.fixture(scope="module")
def tuned() -> LanguageModel:
    """A random Llama with an adapter that changes its answers."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(random_model("llama"), config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return LanguageModel(model, byte_tokenizer(CHATML), "tuned")


class TestAdmission:
    def test_when_empty_waits_for_the_whole_batch(self, llama):
        decoder = Decoder(llama, batch_size=2)
        lengths = (2, 5, 3)
        tickets = [
            decoder.add(decoder.encode("Hi", None, SamplingParams(max_new_tokens=n)))
            for n in lengths
        ]
        llama.__dict__["eos_token_ids"] = frozenset()
        try:
            seen = [[s.ticket.number for s in steps] for steps in iter(decoder.step, [])]
        finally:
            del llama.__dict__["eos_token_ids"]
        assert seen == [[0, 1]] * 2 + [[1]] * 3 + [[2]] * 3
        assert [ticket.number for ticket in tickets] == [0, 1, 2]

    def test_each_step_begins_all_that_wait_or_an_eighth(self):
        scheduler = Scheduler(16, "each_step")
        prompt = Prompt([[1]])
        first = [scheduler.add(prompt, False, True) for _ in range(16)]
        assert scheduler.admit() == first
        one = scheduler.add(prompt, False, True)
        assert scheduler.admit() == []
        scheduler.end(first[0])
        begun = [scheduler.admit() for _ in range(PATIENCE + 1)]
        assert begun == [[]] * PATIENCE + [[one]], "one of 16 is held back for others to come"
        three = [scheduler.add(prompt, False, True) for _ in range(3)]
        scheduler.end(first[1])
        assert scheduler.admit() == [], "one place of 16 is not worth a prefill for one of three"
        scheduler.end(first[2])
        assert scheduler.admit() == three[:2], "an eighth of the places"
        for ticket in [*first[3:12], three[0]]:
            scheduler.end(ticket)
        assert scheduler.admit() == [three[2]], "fewer than half are taken: at once"

    def test_free_places_are_kept_while_requests_come(self):
        scheduler = Scheduler(4, "each_step")
        assert not scheduler.refills
        ticket = scheduler.add(Prompt([[1]]), False, True)
        assert scheduler.admit() == [ticket]
        assert [scheduler.admit() or scheduler.refills for _ in range(SOON)] == [
            *[True] * (SOON - 2), False, False,
        ]  # fmt: skip
        other = Scheduler(4)
        other.add(Prompt([[1]]), False, True)
        assert not other.refills, "a batch that is bit-stable"

    def test_bad_options(self, llama):
        with pytest.raises(ConfigError, match='"when_empty" or "each_step", got .always.'):
            Decoder(llama, admission="always")
        with pytest.raises(ConfigError, match="`batch_size` must be"):
            Decoder(llama, batch_size=0)
        with pytest.raises(DataError, match="no tokens"):
            Decoder(llama).add(Prompt([[]]))


class TestCancelling:
    def test_the_others_go_on(self, lm):
        params = SamplingParams(max_new_tokens=12)
        given = [Request(q, m, params) for q, m in zip(QUESTIONS, METHODS, strict=False)]
        decoder = Decoder(lm, batch_size=2, admission="each_step")
        tickets = [decoder.add(decoder.encode(r)) for r in given]
        found = {ticket: [] for ticket in tickets}
        for count in itertools.count():
            if count == 3:
                decoder.cancel(tickets[1])
            if not (steps := decoder.step()):
                break
            for step in steps:
                found[step.ticket].append(step.token_id)
        assert len(found[tickets[1]]) == 3
        assert [found[tickets[0]]] == alone(lm, given[0])
        assert [found[tickets[2]]] == alone(lm, given[2]), "it took the place"
        decoder.cancel(tickets[0])
        assert decoder.step() == []

    def test_waiting_and_twice(self, llama):
        decoder = Decoder(llama, batch_size=1)
        first, second = (decoder.add(decoder.encode(q)) for q in ("Hi", "Why?"))
        for _ in range(2):
            decoder.cancel(second)
        assert {s.ticket for steps in iter(decoder.step, []) for s in steps} == {first}

    def test_who_stops_listening_leaves_nothing_under_way(self, llama):
        decoder = Decoder(llama)
        stream = decoder.stream(["Hi", "Why?"])
        next(stream)
        stream.close()
        assert decoder.step() == []

    def test_two_listeners_each_get_their_own(self, llama):
        params = SamplingParams(max_new_tokens=6)
        expected = ids_of(generate(llama, ["Hi", "Why?"], None, params))
        decoder = Decoder(llama)
        both = [decoder.stream([q], None, params) for q in ("Hi", "Why?")]
        found = [[], []]
        for pair in itertools.zip_longest(*both):
            for own, step in zip(found, pair, strict=True):
                if step is not None:
                    own.append(step.token_id)
        assert found == expected

    def test_after_an_error_in_a_step_the_engine_is_empty_and_works(self, llama):
        broken = LanguageModel(copy.deepcopy(llama.model), llama.tokenizer, "broken")
        decoder = Decoder(broken)
        decoder.add(decoder.encode("Hi"))
        weight = broken.model.lm_head.weight
        kept = weight.detach().clone()
        torch.nn.init.constant_(weight, float("nan"))
        with pytest.raises(Exception, match="not finite"):
            decoder.step()
        with torch.no_grad():
            weight.copy_(kept)
        assert decoder.step() == []
        assert ids_of(decoder.complete([decoder.encode("Hi")])) == alone(llama, Request("Hi"))


class TestPrefixes:
    def test_what_came_before_changes_no_bit(self, llama):
        params = SamplingParams(max_new_tokens=6, logprobs=True)
        systems = [f"You are a kind assistant with the number {n}." for n in (1, 1, 1, 1, 2, 12)]
        given = [
            [{"role": "system", "content": s}, {"role": "user", "content": q}]
            for s, q in zip(systems, QUESTIONS * 2, strict=True)
        ]
        fresh, used = Decoder(llama), Decoder(llama)
        for text in ("You are a kind assistant with the number 12.", "You are a kind"):
            chat = [{"role": "system", "content": text}, {"role": "user", "content": "Hi"}]
            used.complete([used.encode(chat, SelfCD(), params)])
        assert used.backend.store.entries, "the past left something"
        pair = [d.complete([d.encode(c, SelfCD(), params) for c in given]) for d in (fresh, used)]
        assert [c.logprobs for c in pair[0]] == [c.logprobs for c in pair[1]]

    def test_only_prefixes_that_many_requests_share_are_computed_apart(self, llama):
        decoder = Decoder(llama)
        shared, own = [(5, 6, 7, 8, n) for n in range(2)]
        prompts = [Prompt([[*shared, 9]], prefixes=(shared,))] * 4
        decoder.complete([*prompts, Prompt([[*own, 9]], prefixes=(own,))])
        assert list(decoder.backend.store.entries) == [(BASE, shared)]

    def test_the_adapter_is_part_of_the_key(self, tuned):
        """Its keys and values off the adapter are others: two entries, and the right one each."""
        system = [{"role": "system", "content": "You are a kind and helpful assistant."}]
        chat = [*system, {"role": "user", "content": "Hi"}]
        params = SamplingParams(max_new_tokens=8)
        decoder = Decoder(tuned)
        both = decoder.encode(chat, Contrast(base=True, guidance=2), params)
        plain = decoder.encode(chat, Plain(), params)
        apart = Decoder(tuned, share_prefixes=False)
        expected = [ids_of(apart.complete([p])) for p in (both, plain)]
        for _ in range(2):
            assert [ids_of(decoder.complete([p])) for p in (both, plain)] == expected
        assert [name for name, _ in decoder.backend.store.entries] == ["__base__", "default"]
        store = decoder.backend.store
        ids = next(key[1] for key in store.entries)
        for name in ("default", BASE, BASE, "default"):
            assert store.longest(name, ids)[0] is store.entries[name, ids]

    def test_bounded_by_number_and_by_bytes(self, llama):
        batch = Batch(llama, [[5, 6, 7, 8]], [BASE])
        batch.prefill(None)
        one = PrefixStore()
        one.put(BASE, [5, 6, 7, 8], batch.cache, 0)
        few = PrefixStore(max_bytes=2 * one.nbytes)
        for n in range(5):
            few.put(BASE, [n, 6, 7, 8], batch.cache, 0)
        assert [ids[0] for _, ids in few.entries] == [3, 4]
        assert few.knows((BASE, (3, 6, 7, 8)))
        few.put(BASE, [9, 6, 7, 8], batch.cache, 0)
        assert [ids[0] for _, ids in few.entries] == [3, 9], "the least recently used goes"
        none = PrefixStore(max_bytes=one.nbytes - 1)
        none.put(BASE, [5, 6, 7, 8], batch.cache, 0)
        assert not none.entries

    def test_system_texts_are_not_remembered_for_ever(self, llama):
        decoder = Decoder(llama)
        for n in range(300):
            decoder.encode(
                [{"role": "system", "content": f"{n}"}, {"role": "user", "content": "a"}]
            )
        assert decoder.backend._prefix_of.cache_info().currsize <= 256


def test_adapters_off_are_kept_apart_where_a_batch_is_cut(tuned):
    """`select` and `join` move the switch of each row with its keys and values."""
    rows = [encode(tuned, [{"role": "user", "content": q}]) for q in QUESTIONS]
    batch = Batch(tuned, rows, ["default", BASE, "default"])
    with torch.inference_mode():
        batch.prefill(None)
        batch.select([1, 2])
        other = Batch(tuned, rows[:2], [BASE, "default"])
        other.prefill(None)
        assert batch.join(other, [0]) == [0, 2]
    assert batch.adapters == [BASE, "default", "default"]


class TestChoice:
    def test_settings_are_each_requests_own_under_one_method(self, llama):
        settings = [
            SamplingParams(max_new_tokens=8, temperature=t, top_k=k)
            for t, k in ((0.0, 0), (1.5, 0), (0.3, 3), (1.5, 2))
        ]
        given = [Request("Hi", SelfCD(), params, seed=4) for params in settings]
        found = ids_of(generate(llama, given))
        assert found == [tokens for request in given for tokens in alone(llama, request)]
        assert len(set(map(tuple, found))) == 4

    def test_the_repetition_penalty_counts_the_first_branch(self, lm):
        """Against a loop: tokens of the first prompt and of the answer, not of other branches."""
        method = Contrast(guidance=1.5, principle="Aaaa bbbb.", negative="Zzzz yyyy.")
        chats = method.prompts([{"role": "user", "content": "Hi"}])
        rows, answer = [encode(lm, chat) for chat in chats], []
        for _ in range(8):
            with torch.no_grad():
                z = torch.stack([lm.model(torch.tensor([r + answer])).logits[0, -1] for r in rows])
            combined = method.combine(z[None])[0]
            for token in set(rows[0] + answer):
                score = combined[token]
                combined[token] = score / 3 if score > 0 else score * 3
            answer.append(int(combined.argmax()))
            if answer[-1] in lm.eos_token_ids:
                break
        params = SamplingParams(max_new_tokens=8, repetition_penalty=3.0)
        assert generate(lm, "Hi", method, params)[0].token_ids == answer

    def test_a_row_that_is_known_whole_still_computes_its_last_token(self, llama):
        ids = [5, 6, 7, 8, 9]
        batch = Batch(llama, [ids], [BASE])
        with torch.inference_mode():
            expected = batch.prefill(None)
            store = PrefixStore()
            store.put(BASE, ids, batch.cache, 0)
            cache = store.fill([ids, ids], [BASE, BASE])
            again = Batch(llama, [ids, ids], [BASE, BASE]).prefill(store)
        assert cache.get_seq_length() == 4
        torch.testing.assert_close(again, expected.expand(2, -1), atol=1e-5, rtol=1e-4)

    def test_what_was_not_finite_is_named(self, llama, tuned):
        broken = LanguageModel(copy.deepcopy(tuned.model), tuned.tokenizer, "broken")
        for name, p in broken.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(p, float("nan"))
        with pytest.raises(ModelError, match="or its adapter's, are broken"):
            generate(broken, "Hi")

        class Endless:
            name = "endless"

            def prompts(self, messages):
                return [list(messages)]

            def combine(self, logits):
                return logits[:, 0] * float("inf")

        with pytest.raises(ModelError, match='Method "endless" made logits'):
            generate(llama, "Hi", Endless())


class TestTemperature:
    @pytest.mark.parametrize("norm", [1.5, 2, float("inf")])
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_the_closed_form_goes_to_greedy(self, kind, norm, request):
        lm = request.getfixturevalue(kind)
        method = LinearAlignment(PRINCIPLE, epsilon=6.0, norm=norm, candidates=1)
        greedy = ids_of(generate(lm, QUESTIONS, method, SamplingParams(max_new_tokens=8)))
        for temperature in (1e-4, 1e-6):
            params = SamplingParams(max_new_tokens=8, temperature=temperature)
            assert ids_of(generate(lm, QUESTIONS, method, params)) == greedy
        plain = ids_of(generate(lm, QUESTIONS, None, SamplingParams(max_new_tokens=8)))
        assert greedy != plain, "the step moves something"

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    def test_a_mask_at_a_temperature_of_its_own_goes_to_greedy(self, kind, request):
        """At the sampling's own a low temperature leaves the prompt's own token alone."""
        lm = request.getfixturevalue(kind)

        def decoded(temperature, **options):
            params = SamplingParams(max_new_tokens=8, temperature=temperature)
            return ids_of(generate(lm, QUESTIONS, LinearAlignment(PRINCIPLE, **options), params))

        greedy = decoded(0.0)
        for temperature in (1e-4, 1e-6):
            assert decoded(temperature, mask_temperature=1.0) == greedy
        prompt = ids_of(generate(lm, QUESTIONS, Plain(PRINCIPLE), SamplingParams(max_new_tokens=8)))
        assert decoded(1e-4) == prompt != greedy
        soft = {"mask_temperature": 0.7, "damping": 1.0, "ratio": 4.0}
        assert decoded(1e-5, **soft) == decoded(0.0, **soft)

    def test_every_temperature_divides_the_same_logits(self, llama):
        """The closed form at T, by hand: the whole of z* over T, its step from z itself."""
        method = LinearAlignment(PRINCIPLE, epsilon=6.0, norm=2, candidates=1)
        for temperature in (0.25, 0.5, 2.0):
            params = SamplingParams(max_new_tokens=3, temperature=temperature, logprobs=True)
            [got] = generate(llama, [Request("Hi", seed=3)], method, params)
            rows = [encode(llama, c) for c in method.prompts([{"role": "user", "content": "Hi"}])]
            for t, token in enumerate(got.token_ids):
                with torch.no_grad():
                    z_p, z_0 = (
                        llama.model(torch.tensor([r + got.token_ids[:t]])).logits[0, -1]
                        for r in rows
                    )
                d = z_p - z_0
                d = d - d.mean()
                expected = ((z_0 + 6 * d / d.norm()) / temperature).log_softmax(-1)[token]
                assert got.logprobs[t] == pytest.approx(expected.item(), abs=1e-4)


class TestOwnMethods:
    def test_a_plain_class_with_a_name_prompts_and_combine(self, lm):
        class Halfway:
            name = "halfway"

            def prompts(self, messages):
                system = {"role": "system", "content": PRINCIPLE}
                return [[system, *messages], list(messages)]

            def combine(self, logits):
                return logits.mean(1)

        found = ids_of(generate(lm, QUESTIONS, Halfway(), SamplingParams(max_new_tokens=8)))
        same = LinearAlignment(PRINCIPLE, ratio=-0.5, candidates=1)
        assert found == ids_of(generate(lm, QUESTIONS, same, SamplingParams(max_new_tokens=8)))

    def test_a_method_that_cannot_be_hashed(self, llama):
        @dataclass
        class Mine:
            name = "mine"
            text: list[str]

            def prompts(self, messages):
                return [list(messages)]

            def combine(self, logits):
                return logits[:, 0]

        params = SamplingParams(max_new_tokens=4)
        found = generate(llama, QUESTIONS, Mine(["a"]), params)
        assert ids_of(found) == ids_of(generate(llama, QUESTIONS, Plain(), params))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A model's folder, and three adapters on different modules of it."""
    peft, home = pytest.importorskip("peft"), tmp_path_factory.mktemp("adapters")
    base = random_model("llama")
    base.save_pretrained(home / "base")
    byte_tokenizer(CHATML).save_pretrained(home / "base")
    targets = {"one": ["q_proj", "v_proj"], "two": ["down_proj"], "three": ["q_proj"]}
    for seed, (name, modules) in enumerate(targets.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=2 + seed, target_modules=modules, task_type="CAUSAL_LM", init_lora_weights=False
        )
        peft.get_peft_model(random_model("llama"), config).save_pretrained(home / name)
    return home


class TestAdaptersByName:
    NAMES = ("one", "two", "three")

    def model(self, home, **options):
        return load_model(home / "base", dtype="float32", **options)

    def all(self, home):
        return self.model(home, adapters={name: home / name for name in self.NAMES})

    @pytest.mark.parametrize("seed", range(3))
    def test_each_request_gets_what_its_adapter_gives_alone(self, adapters, seed):
        """Methods, numbers of branches and adapters mixed; requests join and leave at random."""
        methods = [Plain(), LinearAlignment(PRINCIPLE), SelfCD(), Contrast(base=True, guidance=2)]
        alone, every = {}, self.all(adapters)
        requests = []
        for i in range(24):
            name, method = (None, *self.NAMES)[i % 4], methods[(i // 4) % 4]
            if name is None and method is methods[3]:
                method = Plain()
            params = SamplingParams(4 + i % 9, temperature=0.9 * (i % 2))
            requests.append(Request(QUESTIONS[i % 3], method, params, i, name))
        for name in (None, *self.NAMES):
            own = self.model(adapters, adapter=name and adapters / name)
            for i, request in enumerate(requests):
                if request.adapter == name:
                    given = dataclasses.replace(request, adapter=None)
                    [alone[i]] = ids_of(generate(own, [given]))
        chance = random.Random(seed)
        backend = TorchBackend(every, batch_size=9, admission="each_step")
        order, running, found = chance.sample(range(24), 24), {}, {}
        while order or running:
            for _ in range(min(len(order), chance.randint(0, 4))):
                number = order.pop()
                running[backend.add(backend.encode(requests[number]))] = number
            for step in backend.step():
                found.setdefault(running[step.ticket], []).append(step.token_id)
                if step.finish_reason:
                    del running[step.ticket]
        assert found == alone
        assert ids_of(generate(every, requests)) == [alone[i] for i in range(24)]
        assert len({tuple(alone[i]) for i in (0, 1, 2, 3)}) == 4

    def test_one_may_be_on_for_those_who_name_none(self, adapters):
        both = self.model(adapters, adapter=adapters / "one", adapters={"b": adapters / "two"})
        given = [Request("Hi"), Request("Hi", adapter="b"), Request("Hi")]
        first = generate(self.model(adapters, adapter=adapters / "one"), "Hi")
        second = generate(self.model(adapters, adapter=adapters / "two"), "Hi")
        assert ids_of(generate(both, given)) == ids_of([*first, *second, *first])

    def test_prefixes_of_one_adapter_are_not_anothers(self, adapters):
        every, system = self.all(adapters), {"role": "system", "content": "You are very kind."}
        chat = [system, {"role": "user", "content": "Hi"}]
        decoder = Decoder(every)
        for name in (None, *self.NAMES, None):
            [got] = decoder.complete([decoder.encode(Request(chat, adapter=name))])
            own = self.model(adapters, adapter=name and adapters / name)
            assert got.token_ids == generate(own, [chat])[0].token_ids
        assert {name for name, _ in decoder.backend.store.entries} == {BASE, *self.NAMES}

    def test_scoring_is_of_the_model_that_names_none(self, adapters):
        item = Continuation([[5, 6, 7]], [8, 9])
        [got] = Decoder(self.all(adapters)).score([item])
        [own] = Decoder(self.model(adapters)).score([item])
        torch.testing.assert_close(got, own)

    def test_what_cannot_be_is_refused(self, adapters, tmp_path):
        every = self.all(adapters)
        with pytest.raises(ConfigError, match='no adapter "onne". Did you mean "one"?'):
            generate(every, [Request("Hi", adapter="onne")])
        with pytest.raises(ConfigError, match='no adapter "default"'):
            generate(every, [Request("Hi", adapter="default")])
        with pytest.raises(ModelError, match="has no adapter. Pass"):
            generate(every, "Hi", Contrast(base=True))
        for wrong in (
            {"a.b": "x"},
            {"q_proj": adapters / "one"},
            {"default": "x"},
            {1: "x"},
            {"a": 1},
            ["a"],
        ):
            with pytest.raises(ConfigError, match="dapter"):
                load_model(adapters / "base", adapters=wrong)
        import peft

        config = peft.LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
        peft.get_peft_model(random_model("llama"), config).save_pretrained(tmp_path)
        with pytest.raises(ModelError, match="cannot run side by side: .*DoRA"):
            self.model(adapters, adapters={"dora": tmp_path, "one": adapters / "one"})
