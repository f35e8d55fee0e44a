"""The back end on vLLM: the tokens of our own loop, whatever vLLM does with a request's branches.

Needs vLLM, which has an environment of its own: `make vllm`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import random
import re
import shutil
import types
import warnings

import pytest
import torch

from trueline import (
    AdaCD,
    Blend,
    ConfigError,
    Contrast,
    Decoder,
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
from trueline.engine.protocol import Continuation
from trueline.engine.scoring import score
from trueline.engine.vllm.groups import KEY, REPORTS, Mixer, Plan, Share

WHY = "vLLM is not installed here; `make vllm` makes it an environment and runs its tests"
pytest.importorskip("vllm", reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # vLLM's own, while it is imported
    from trueline.engine.vllm.processors import GroupProcessor, GroupProcessorV2
    from trueline.engine.vllm.scheduler import GroupError, check_config

PRINCIPLE = "Talk like a pirate."
QUESTIONS = ("Hi", "What is the moon made of, and what is it for?", "How do I kill a process?")
METHODS = (
    Plain(),
    LinearAlignment(PRINCIPLE),
    SelfCD(plausibility=0.1, first_tokens=3),
    AdaCD(first_tokens=5),
    Contrast(guidance=2, negative="Be rude."),
    Blend(((PRINCIPLE, 2.0), ("Be brief.", -1.0))),
    LinearAlignment("Be brief. " * 12, ratio=3, gate=0.9),
)
TIGHT = {
    "enforce_eager": True,
    "max_model_len": 320,
    "block_size": 32,
    "num_gpu_blocks_override": 20,  # 19 of 32 tokens: a few requests at a time
    "max_num_seqs": 12,
    "max_num_batched_tokens": 24,  # every prompt is computed in chunks
}
ROOMY = {"enforce_eager": True, "block_size": 32, "kv_cache_memory_bytes": 64 << 20}


def mixed(count: int) -> list[Request]:
    """Methods of one to three branches, prompts, temperatures, lengths and n, all mixed."""
    found = []
    for i in range(count):
        params = SamplingParams(
            max_new_tokens=1 + 5 * (i % 5), temperature=(i % 3) * 0.6, logprobs=i % 2 == 0
        )
        if i % 6 == 2:
            params = dataclasses.replace(params, n=2, repetition_penalty=1.2)
        if i % 6 == 4:
            params = dataclasses.replace(params, top_p=0.9, top_k=50)
        question = " ".join([QUESTIONS[i % 3]] * (1 + i % 5))
        found.append(Request(question, METHODS[i % 7], params, seed=i - 3))
    return found


def check_equal(found, expected) -> None:
    """Same tokens and reasons to end, log-probabilities within rounding."""
    for i, (ours, own) in enumerate(zip(found, expected, strict=True)):
        assert ours.token_ids == own.token_ids, i
        assert (ours.text, ours.finish_reason) == (own.text, own.finish_reason)
        assert (ours.seed, ours.prompt_tokens) == (own.seed, own.prompt_tokens)
        for mine, its in zip(
            (ours.logprobs, ours.branch_logprobs), (own.logprobs, own.branch_logprobs), strict=True
        ):
            assert mine == (None if its is None else pytest.approx(its, abs=1e-3))


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.fixture(scope="module")
def tight():
    model = load_model("tiny", engine="vllm", engine_options=TIGHT)
    Decoder(model)  # starts it
    return model


@pytest.fixture(scope="module")
def expected(tiny):
    return generate(tiny, mixed(64))


@pytest.fixture(scope="module")
def adapters(made_once):
    """Two adapters with something in them."""

    def make(folder):
        for i, name in enumerate(("first", "second")):
            put_lora(load_model("tiny").model, folder / name, seed=i, rank=(4, 12)[i])

    return made_once("vllm-adapters", make)


def put_lora(model, folder, *, seed, rank):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    tuned = get_peft_model(model, config)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    tuned.save_pretrained(folder)


def check_empty(model) -> None:
    """Nothing is under way or set aside any more, and nothing was ever torn apart."""
    backend, scheduler = model.running, model.running.scheduler
    assert scheduler.split_steps == 0
    assert (scheduler.places, scheduler.blocks) == (0, 0)
    assert [scheduler.parties, list(scheduler.lobby), scheduler.joining] == [{}, [], []]
    assert backend.flights == {}
    assert not REPORTS


class TestEqual:
    def test_64_mixed_requests_in_a_small_cache_by_chunks(self, tight, expected):
        assert len({c.text for c in expected}) > 30
        check_equal(generate(tight, mixed(64)), expected)
        check_empty(tight)

    @pytest.mark.parametrize("every", [1, 3])
    def test_staggered_arrivals(self, tight, tiny, every):
        given, decoder = mixed(18), Decoder(tight)
        tokens, left = {}, list(enumerate(given))
        for count in itertools.count():
            if left and count % every == 0:
                i, request = left.pop(0)
                tokens[decoder.add(decoder.encode(request))] = i, []
            steps = decoder.step()
            for step in steps:
                tokens[step.ticket][1].append((step.sample, step.position, step.token_id))
            if not (steps or left):
                break
        own = [c.token_ids for c in generate(tiny, given)]
        for i, found in tokens.values():
            for sample in range(given[i].sampling.n):
                ids = own[sum(r.sampling.n for r in given[:i]) + sample]
                assert [t for s, _, t in sorted(found) if s == sample] == ids
        check_empty(tight)

    def test_cancelled_requests_leave_the_others_alone(self, tight, expected):
        given, decoder = mixed(24), Decoder(tight)
        tickets = [decoder.add(decoder.encode(r)) for r in given]
        found, gone = {t: [] for t in tickets}, set()
        for count in itertools.count():
            if count % 2 == 0 and count // 2 < len(tickets) and (count // 2) % 3 == 1:
                gone.add(tickets[count // 2])
                decoder.cancel(tickets[count // 2])
            steps = decoder.step()
            for step in steps:
                assert step.ticket not in gone
                found[step.ticket].append((step.sample, step.position, step.token_id))
            if not steps:
                break
        own = iter(c.token_ids for c in expected)
        for request, ticket in zip(given, tickets, strict=True):
            wanted = [next(own) for _ in range(request.sampling.n)]
            if ticket not in gone:
                tokens = [[t for s, _, t in sorted(found[ticket]) if s == j] for j in range(2)]
                assert tokens[: request.sampling.n] == wanted
        assert len(gone) == 8
        check_empty(tight)

    def test_stop_strings_end_every_branch(self, tight, tiny):
        params = SamplingParams(max_new_tokens=30, stop=("moon", "the"))
        given = [Request(q, m, params) for q in QUESTIONS[1:] for m in METHODS[:4]]
        own = generate(tiny, given)
        assert {c.finish_reason for c in own} == {"stop"}
        check_equal(generate(tight, given), own)
        check_empty(tight)

    def test_a_branch_of_one_token_waits_for_the_others(self, tight, tiny):
        rows = ([5], list(range(10, 90))), ([7], [9]), (list(range(20, 60)), [11])
        params = SamplingParams(max_new_tokens=6, logprobs=True)
        method = Contrast(guidance=2, negative="-")
        prompts = [Prompt([list(b) for b in r], method, params) for r in rows]
        long = [Prompt([list(range(5, 150))], sampling=params)] * 2
        both = [*long, *prompts, *long]
        check_equal(Decoder(tight).complete(both), Decoder(tiny).complete(both))
        check_empty(tight)

    def test_prefixes_are_computed_once(self, tight):
        decoder = Decoder(tight)
        request = Request(QUESTIONS[1], LinearAlignment("Be brief. " * 20), SamplingParams(2))
        decoder.complete([decoder.encode(request)])
        manager = tight.running.scheduler.kv_cache_manager
        hits = []
        compute = manager.get_computed_blocks

        def watched(member):
            blocks, count, *rest = compute(member)
            hits.append(count)
            return blocks, count, *rest

        manager.get_computed_blocks = watched
        try:
            decoder.complete([decoder.encode(request)])
        finally:
            manager.get_computed_blocks = compute
        assert max(hits) >= 64

    def test_the_last_position_of_the_model(self, tmp_path):
        folder = tmp_path / "short"
        shutil.copytree(load_model("tiny").folder, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
        params = SamplingParams(max_new_tokens=100, temperature=1.5, logprobs=True)
        given = [Request("Name some birds.", m, params, seed=i) for i, m in enumerate(METHODS[:5])]
        own = generate(load_model(folder), given)
        assert {"length"} <= {c.finish_reason for c in own}
        model = load_model(folder, engine="vllm", engine_options=ROOMY)
        check_equal(generate(model, given), own)
        check_empty(model)


class TestAdapters:
    @pytest.fixture(scope="class")
    def both(self, adapters):
        named = {name: adapters / name for name in ("first", "second")}
        options = {"adapter": adapters / "second", "adapters": named}
        return (
            load_model("tiny", **options),
            load_model("tiny", engine="vllm", engine_options=ROOMY, **options),
        )

    def test_adapters_and_the_base_branch_mix(self, both):
        torch_model, model = both
        params = SamplingParams(max_new_tokens=12, logprobs=True)
        given = [
            Request(QUESTIONS[i % 3], method, params, adapter=adapter)
            for adapter in (None, "first", "second")
            for i, method in enumerate([*METHODS[:4], Contrast(base=True, guidance=2.5)])
        ]
        own = generate(torch_model, given)
        assert len({c.text for c in own}) > 8
        check_equal(generate(model, given), own)
        check_empty(model)

    def test_without_an_adapter_the_base_branch_is_refused(self, tight):
        with pytest.raises(ModelError, match="has no adapter"):
            generate(tight, "Hi", Contrast(base=True))
        assert not Decoder(tight).backend.supports(Contrast(base=True))

    def test_likelihoods_with_the_adapter_off(self, both):
        items = [Continuation([[1, 5, 9, 200]] * 2, [40, 41, 42], (True, False))]
        [own], [found] = (list(score(m, items)) for m in both)
        assert (own[:, 0] - own[:, 1]).abs().max() > 0.1
        assert found == pytest.approx(own, abs=1e-3)


class TestScoring:
    def test_logits_of_given_tokens(self, tight, tiny):
        decoder = Decoder(tiny)
        items = []
        for i, request in enumerate(mixed(9)):
            branches = decoder.encode(request).branches
            items.append(Continuation(branches, list(range(30 + i, 40 + 3 * i))))
        own, found = (list(score(m, items, rows=6)) for m in (tiny, tight))
        for a, b in zip(own, found, strict=True):
            assert a.shape == b.shape
            assert torch.allclose(a, b, atol=1e-3)
        check_empty(tight)

    def test_steps_of_others_wait_for_them(self, tight, tiny):
        decoder = Decoder(tight)
        request = Request(QUESTIONS[1], METHODS[1], SamplingParams(12))
        ticket = decoder.add(decoder.encode(request))
        [z] = decoder.score([Continuation([[1, 2, 3]], [4, 5, 6, 7])])
        tokens = [step.token_id for step in decoder.follow([ticket])]
        assert z.shape[:2] == (4, 1)
        assert tokens == generate(tiny, [request])[0].token_ids

    def test_traces_carry_the_logits(self, tight, tiny):
        request = Request(QUESTIONS[1], METHODS[1], SamplingParams(8))
        own, found = (
            [(s.logits, s.combined) for s in Decoder(m).stream([request], record=True)]
            for m in (tiny, tight)
        )
        for a, b in zip(own, found, strict=True):
            assert torch.allclose(a[0], b[0], atol=1e-3)
            assert torch.allclose(a[1], b[1], atol=1e-3)


class TestFailsClosed:
    @pytest.fixture
    def own(self):
        return load_model("tiny", engine="vllm", engine_options=TIGHT)

    def test_a_group_that_is_torn_apart_ends_in_an_error(self, own, monkeypatch):
        decoder = Decoder(own)
        monkeypatch.setattr(own.running.scheduler, "_hold", lambda: None)
        with pytest.raises(GroupError, match="1 of the 2 branches"):
            decoder.complete([decoder.encode(Request(QUESTIONS[1] * 3, METHODS[1]))])
        assert own.running.scheduler.split_steps == 1
        with pytest.raises(ModelError, match="has ended"):
            decoder.complete([decoder.encode(Request("Hi"))])

    def test_a_token_that_no_method_chose_is_an_error(self, own, monkeypatch):
        decoder = Decoder(own)
        monkeypatch.setattr(Mixer, "lots", lambda *_: [])
        with pytest.raises(ModelError, match="not chosen"):
            decoder.complete([decoder.encode(Request("Hi", METHODS[1]))])

    def test_a_preemption_is_an_error(self, own, monkeypatch):
        decoder = Decoder(own)
        scheduler = own.running.scheduler
        monkeypatch.setattr(scheduler, "capacity", 10**6)  # admits whoever comes
        numbers = random.Random(0)
        rows = [[[numbers.randrange(3, 2000) for _ in range(40)] for _ in "ab"] for _ in range(6)]
        items = [Continuation(branches, [7] * 120) for branches in rows]
        with pytest.raises(GroupError, match="would preempt"):
            list(decoder.score(items, rows=12))

    def test_logits_that_are_not_finite(self, tight):
        @dataclasses.dataclass(frozen=True)
        class Broken(Plain):
            def combine(self, logits):
                return logits[:, 0] * float("nan")

        with pytest.raises(ModelError, match="not finite"):
            generate(tight, "Hi", Broken())
        check_empty(tight)


class TestRefused:
    def test_what_cannot_fit_is_refused_before_it_waits(self, tight):
        with pytest.raises(ConfigError, match="blocks of 32 tokens; vLLM's cache has 19"):
            generate(tight, "Hi", METHODS[1], SamplingParams(max_new_tokens=290))
        many = Blend(tuple((f"Be {i}.", 1.0) for i in range(12)))
        with pytest.raises(ConfigError, match="13 branches, and vLLM runs 12"):
            generate(tight, "Hi", many, SamplingParams(max_new_tokens=1))
        check_empty(tight)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"speculative_config": {"method": "ngram"}}, "drafts of its own row"),
            ({"pipeline_parallel_size": 2}, "micro-batches"),
            ({"data_parallel_size": 2}, "one engine a replica"),
            ({"scheduling_policy": "priority"}, "order each branch"),
            ({"logits_processors": []}, "Leave it out"),
            ({"max_num_seq": 3}, 'Did you mean "max_num_seqs"'),
        ],
    )
    def test_options_that_break_groups(self, options, text):
        model = load_model("tiny", engine="vllm", engine_options=options)
        with pytest.raises(ConfigError, match=re.escape(text)):
            Decoder(model)

    def test_the_scheduler_refuses_them_itself(self, tight):
        config = copy.deepcopy(tight.running.engine.vllm_config)
        config.parallel_config.data_parallel_size = 2
        with pytest.raises(ConfigError, match="data parallelism"):
            check_config(config)

    def test_several_samples_of_one_engine_request(self, tight):
        from vllm import SamplingParams as EngineParams

        share = Share(Plan("g", 1, Plain(), SamplingParams(), 0, 4), 0)
        for wrong in ({"n": 2, "temperature": 1.0}, {"temperature": 0.7}):
            params = EngineParams(extra_args={KEY: share}, **wrong)
            with pytest.raises(ValueError, match="n > 1|temperature"):
                GroupProcessor.validate_params(params)
        with pytest.raises(ValueError, match="Trueline's own"):
            GroupProcessor.validate_params(EngineParams(extra_args={KEY: "mine"}))

    def test_what_needs_a_forward(self, tight):
        with pytest.raises(ModelError, match="leave out --engine"):
            tight.model(torch.ones(1, 2, dtype=torch.long))


class TestWithTwoStepsUnderWay:
    """Asynchronous scheduling, which vLLM turns off on a CPU: the scheduler alone, fed by hand."""

    LENGTHS = (((40, 9), 6), ((3, 90, 30), 12), ((70,), 4), ((25, 26), 9), ((1, 50), 7))

    def run(self, own, ends: dict[str, int]) -> tuple[dict[str, list[int]], int]:
        """Return the tokens of every engine request, and how many steps ran ahead of another."""
        from vllm import SamplingParams as EngineParams
        from vllm.v1.outputs import ModelRunnerOutput
        from vllm.v1.request import Request as EngineRequest

        scheduler, found, ahead = own.running.scheduler, {}, 0
        hasher = own.running.engine.engine_core.engine_core.request_block_hasher
        for i, (lengths, tokens) in enumerate(self.LENGTHS):
            method = METHODS[(0, 1, 5)[len(lengths) - 1]]
            plan = Plan(f"a{i}", len(lengths), method, SamplingParams(), 0, tokens)
            for k, length in enumerate(lengths):
                params = EngineParams(
                    max_tokens=tokens, stop_token_ids=[2], extra_args={KEY: Share(plan, k)}
                )
                ids = list(range(10, 10 + length))
                name = f"a{i}-{k}"
                scheduler.add_request(EngineRequest(name, ids, params, None, block_hasher=hasher))
                found[f"a{i}-{k}"] = []
        under_way = []
        while scheduler.has_unfinished_requests() or under_way:
            output = scheduler.schedule()
            names = list(output.num_scheduled_tokens)
            # After the step is planned a member that samples has nothing left to compute.
            samples = [n for n in names if not scheduler.requests[n].is_prefill_chunk]
            if names or not under_way:
                under_way.append((output, names, samples))
            ahead += len(under_way) == 2
            if len(under_way) == 2 or not names:
                output, names, samples = under_way.pop(0)
                tokens = []
                for name in names:
                    group = name.split("-")[0]
                    count = len(found[name])
                    ended = found[name][-1:] == [2]
                    if name in samples and not ended:
                        found[name].append(2 if ends.get(group) == count else 100 + count)
                    tokens.append([found[name][-1] if found[name] else 7] * (name in samples))
                rows = {name: row for row, name in enumerate(names)}
                scheduler.update_from_output(
                    output, ModelRunnerOutput(names, rows, sampled_token_ids=tokens)
                )
        return found, ahead

    @pytest.mark.parametrize("ends", [{}, {"a0": 2, "a1": 0, "a3": 5}])
    def test_members_stay_in_step(self, tight, ends):
        found, ahead = self.run(tight, ends)
        for i, (lengths, tokens) in enumerate(self.LENGTHS):
            own = [found[f"a{i}-{k}"] for k in range(len(lengths))]
            wanted = [100 + n for n in range(tokens)]
            if (end := ends.get(f"a{i}")) is not None:
                wanted = [*wanted[:end], 2]
            assert own == [wanted] * len(lengths)
        assert ahead > 10
        assert tight.running.scheduler.split_steps == 0


def test_the_processor_of_model_runner_v2_by_its_interface():
    """Fed by hand, as that runner would: slots, rows in any order, and chunks of prompts."""
    import numpy as np
    from vllm import SamplingParams as EngineParams
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    prompts = types.SimpleNamespace(np=np.array([5, 9, 4, 30, 0, 0]))
    states = types.SimpleNamespace(device=torch.device("cpu"), prompt_len=prompts)
    processor = GroupProcessorV2(None, states)
    plan = Plan("v", 2, METHODS[1], SamplingParams(8), 0, 8)
    other = Plan("w", 1, Plain(), SamplingParams(8), 0, 8)
    for slot, share in ((0, Share(plan, 0)), (2, Share(plan, 1)), (3, Share(other, 0))):
        assert processor.add_request(slot, EngineParams(extra_args={KEY: share}))
    assert not processor.add_request(1, EngineParams())
    z = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    before = z.clone()
    empty = torch.empty(0)
    slots = np.array([2, 1, 3, 0])
    # Slot 3 has computed 20 of its 30 prompt tokens; 0 and 2 are at their second token.
    context = LogitsContext(empty, empty, slots, empty, empty, empty, np.array([5, 9, 20, 6]))
    assert processor.apply(z, context) is z
    token = int(METHODS[1].combine(before[[3, 0]][None]).argmax())
    assert z[[0, 3]].argmax(-1).tolist() == [token, token]
    assert torch.equal(z[1:3], before[1:3])


class TestCommand:
    def test_generate_answers_and_files(self, tmp_path, capsys):
        from trueline.cli import main

        options = [f"--engine-option={k}={json.dumps(v)}" for k, v in ROOMY.items()]
        own = ["--method", "linear-alignment", "--principle", PRINCIPLE, "--max-new-tokens", "12"]
        texts = {}
        rows = [json.dumps({"id": i, "prompt": q}) for i, q in enumerate(QUESTIONS)]
        (tmp_path / "in.jsonl").write_text("\n".join(rows))
        for engine in ("torch", "vllm"):
            more = ["--engine", engine, *(options if engine == "vllm" else [])]
            main(["generate", QUESTIONS[1], "--json", *own, *more])
            single = json.loads(capsys.readouterr().out)["token_ids"]
            output = tmp_path / f"{engine}.jsonl"
            files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(output)]
            main(["generate", *files, *own, *more])
            found = [json.loads(line) for line in output.read_text().splitlines()]
            texts[engine] = single, [(r["id"], r["token_ids"]) for r in found]
        assert texts["vllm"] == texts["torch"]
        assert json.loads((tmp_path / "vllm.jsonl.run.json").read_text())

    def test_what_is_wrong_is_one_line(self, capsys):
        from trueline.cli import main

        for more, text in (
            (["--engine", "vllm", "--engine-option", "max_num_seqs"], "NAME=VALUE"),
            (["--engine-option", "max_num_seqs=3"], "vLLM's"),
            (["--engine", "vllm", "--device", "cpu"], "`device` is PyTorch's"),
        ):
            assert main(["generate", "Hi", *more]) == 2
            assert text in capsys.readouterr().err
