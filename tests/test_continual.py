"""Streams on small random models: every strategy, three families of models, a kill midway."""

from __future__ import annotations

import itertools
import json
import random
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, random_model
from processes import Process
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, T5Config
from transformers import T5ForConditionalGeneration as T5

from trueline.continual.ewc import Anchored, fisher
from trueline.continual.strategies import STRATEGIES, make_strategy
from trueline.continual.stream import run_stream
from trueline.errors import ConfigError, DataError, ModelError
from trueline.evals.transfer import average_accuracy
from trueline.train.adapters.stack import AdapterStack
from trueline.train.tasks.answers import answer_logprobs, decoder_logprobs, padded, text_loss
from trueline.train.tasks.families import CausalFamily, ClassifierFamily, Seq2SeqFamily, family_of
from trueline.train.tasks.stages import TaskStage
from trueline.train.tasks.stream_config import StreamConfig
from trueline.train.tasks.task import Example, PromptForm, Task, TaskSettings, union_of_labels

SHORT = PromptForm(instruction=False, options=False)
CONFIG = StreamConfig(
    epochs=2, batch_size=4, learning_rate=1e-2, save_steps=2, logging_steps=1, evaluate_batch_size=8
)


def make_task(name, words, n=24, seed=0, **fields):
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        word, label = rng.choice(list(words.items()))
        rows.append(Example(f"{'x' * rng.randint(0, 5)} {word}", label))
    labels = tuple(dict.fromkeys(words.values()))
    return Task(name, rows[: n // 2], rows[n // 2 : -6], rows[-6:], labels, "Which?", **fields)


def make_tasks():
    return [
        make_task("colour", {"rose": "red", "sky": "blue"}),
        make_task("size", {"ant": "small", "whale": "big"}, seed=1),
        make_task("heat", {"ice": "cold", "fire": "hot", "sun": "hot"}, seed=2),
    ]


TASKS = make_tasks()


def classifier(places=6):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=261, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=128, num_labels=places, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=261, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return T5(config).eval()


def factory():
    return classifier(), byte_tokenizer()


def run(tmp_path, strategy="o-lora", tasks=None, model=factory, config=CONFIG, **options):
    options = {"prompt": SHORT, "figures": False} | options
    tasks = TASKS if tasks is None else tasks
    return run_stream(tasks, model, strategy, output=tmp_path, config=config, **options)


# -- families


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_answers_of_a_causal_model_are_scored_as_whole_texts(name):
    model = random_model(name)
    prompts, answers = [[5, 6, 7], [9], [8, 7, 6, 5, 9, 11]], [[20, 1], [30, 31, 32, 1], [40, 1]]
    with torch.no_grad():
        found = answer_logprobs(model, prompts, answers, 0)
        for i, prompt in enumerate(prompts):
            for j, answer in enumerate(answers):
                z = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
                naive = sum(z[len(prompt) - 1 + k, token] for k, token in enumerate(answer))
                assert found[i, j] == pytest.approx(float(naive), abs=1e-4)


def test_answers_of_an_encoder_decoder_are_scored_one_by_one():
    model = t5()
    prompts, answers = [[5, 6, 7, 1], [9, 1]], [[20, 1], [30, 31, 1]]
    ids, mask = padded(prompts, 0)
    with torch.no_grad():
        found = decoder_logprobs(model, {"input_ids": ids, "attention_mask": mask}, answers, 0)
        for i, prompt in enumerate(prompts):
            for j, answer in enumerate(answers):
                one = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer]))
                assert found[i, j] == pytest.approx(float(-one.loss * len(answer)), abs=1e-4)


def test_long_prompts_lose_the_end_of_the_sentence_alone():
    family = CausalFamily(byte_tokenizer(), ("red", "blue"), max_length=40)
    task = replace(TASKS[0], instruction="Which?")
    (ids,) = family.prompt_ids(task, ["abc" * 50])
    text = family.tokenizer.decode(ids)
    assert len(ids) <= 40
    assert text.startswith("Which?\nOption: red, blue\nabc")
    assert text.endswith("\nAnswer:")
    assert family.prompt_ids(task, ["abc"])[0] == family.tokenizer(
        "Which?\nOption: red, blue\nabc\nAnswer:"
    )["input_ids"]  # fmt: skip
    with pytest.raises(DataError, match="`max_length` is 10"):
        replace(family, max_length=10).prompt_ids(task, ["abc"])


def test_prompts_leave_room_for_the_answer_where_places_are_few():
    model, tokenizer = random_model("gpt2", positions=60), byte_tokenizer()
    family = family_of(model, tokenizer, union=("red", "blue"), prompt=SHORT, chat=False)
    rows = family.encode(TASKS[0], [Example("abc" * 50, label) for label in ("red", "blue")])
    # " blue" and the end are six tokens, and what is written may be two longer.
    assert [row["prompt_length"] for row in rows] == [52, 52]
    for scoring in ("offered", "generated"):
        assert len(family.predict(model, TASKS[0], rows, scoring, 2)[scoring]) == 2
    family = family_of(classifier(), tokenizer, union=union_of_labels(TASKS), prompt=SHORT)
    (row,) = family.encode(TASKS[0], [Example("abc" * 50, "red")])
    assert len(row["input_ids"]) == 128
    tokenizer.model_max_length = 100  # fewer than the model has: RoBERTa's first two are not used
    family = family_of(classifier(), tokenizer, union=union_of_labels(TASKS), prompt=SHORT)
    (row,) = family.encode(TASKS[0], [Example("abc" * 50, "red")])
    assert len(row["input_ids"]) == 100
    with pytest.raises(DataError, match="the model has places for 9: leave lines"):
        replace(family, prompt=PromptForm(), positions=9).prompt_ids(TASKS[0], ["abc"])
    # T5 counts distances, not places.
    assert family_of(t5(), byte_tokenizer(), union=("a", "b")).positions is None


@pytest.mark.parametrize("chat", [False, True])
def test_the_loss_of_a_causal_row_counts_the_label_alone(chat):
    family = CausalFamily(byte_tokenizer(), ("red", "blue"), SHORT, chat=chat)
    (row,) = family.encode(TASKS[0], [Example("rose", "red")])
    counted = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert family.tokenizer.decode(counted) == ("red<|end|>" if chat else " red<|end|>")
    before = family.tokenizer.decode(row["input_ids"][: row["prompt_length"]])
    expected = "rose\nAnswer:"
    assert before == (f"<|user|>{expected}<|end|><|assistant|>" if chat else expected)


def test_a_classifiers_loss_goes_over_the_offered_places():
    union = union_of_labels(TASKS)
    assert union == ("blue", "red", "small", "big", "hot", "cold") or len(union) == 6
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    examples = TASKS[1].train[:2]
    own = [union.index(label) for label in TASKS[1].labels]
    for over, places in (("offered", own), ("union", range(6))):
        family = ClassifierFamily(byte_tokenizer(), union, SHORT, train_labels=over, places=6)
        batch = family.collate(family.encode(TASKS[1], examples))
        naive = 0.0
        for z, e in zip(logits, examples, strict=True):
            total = sum(float(z[k].exp()) for k in places)
            naive -= float(z[union.index(e.label)] - np.log(total)) / 2
        assert float(family.loss(logits, batch)) == pytest.approx(naive, abs=1e-5)
    with pytest.raises(ModelError, match="num_labels=6"):
        ClassifierFamily(byte_tokenizer(), union, places=5)


def test_a_classifier_is_scored_among_offered_and_among_all():
    union = union_of_labels(TASKS)
    model = classifier()
    family = ClassifierFamily(byte_tokenizer(), union, SHORT, places=6)
    rows = family.encode(TASKS[2], TASKS[2].test)
    found = family.predict(model, TASKS[2], rows, "offered", 4)
    for i, row in enumerate(rows):
        with torch.no_grad():
            z = model(torch.tensor([row["input_ids"]])).logits[0]
        assert found["union"][i] == union[int(z.argmax())]
        own = {label: float(z[union.index(label)]) for label in TASKS[2].labels}
        assert found["offered"][i] == max(own, key=own.get)


def test_written_answers_are_what_the_model_writes_alone():
    for family, model in (
        (CausalFamily(byte_tokenizer(), ("red", "blue"), SHORT), random_model("gpt2")),
        (Seq2SeqFamily(byte_tokenizer(), ("red", "blue"), SHORT), t5()),
    ):
        rows = family.encode(TASKS[0], TASKS[0].test)
        together = family.predict(model, TASKS[0], rows, "generated", 8)["generated"]
        alone = [
            family.predict(model, TASKS[0], [row], "generated", 1)["generated"][0] for row in rows
        ]
        assert together == alone


def test_union_of_a_language_model_has_every_label_as_a_candidate():
    family = CausalFamily(byte_tokenizer(), union_of_labels(TASKS), SHORT)
    assert family.candidates(TASKS[0], "offered") == TASKS[0].labels
    assert set(family.candidates(TASKS[0], "union")) == {x for t in TASKS for x in t.labels}


def test_text_loss_is_the_mean_over_tokens_of_all_texts():
    model, tokenizer = random_model("llama"), byte_tokenizer()
    texts, total, count = ["abcdef", "xy"], 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert text_loss(model, tokenizer, texts, 50) == pytest.approx(total / count, rel=1e-5)


# -- strategies


def make_stage(index=1, rows=None, folders=(), seed=None):
    family = ClassifierFamily(byte_tokenizer(), union_of_labels(TASKS), SHORT, places=6)
    rows = family.encode(TASKS[0], TASKS[0].train) if rows is None else rows
    seed = 100 + index if seed is None else seed

    def batches(model, count):
        drawn = stage.draw(count)
        return [family.collate(drawn[i : i + 4]) for i in range(0, len(drawn), 4)]

    stage = TaskStage(index, 3, folders, rows, batches, seed, family)
    return stage


def attached(rank=2):
    from peft import LoraConfig

    torch.manual_seed(1)
    model = AdapterStack().attach(classifier(), LoraConfig(r=rank, target_modules=["query"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def test_fisher_is_the_mean_square_of_each_rows_gradient():
    model, stage = attached(), make_stage()
    found = fisher(model, stage.family, stage.rows[:3], seed=5)
    generator = torch.Generator().manual_seed(5)
    naive = {p: torch.zeros_like(p) for p in found}
    for row in stage.rows[:3]:
        z = model(torch.tensor([row["input_ids"]])).logits[0, row["offered"]]
        full = torch.zeros(6)
        full[row["offered"]] = z.detach().softmax(-1)
        drawn = int(torch.multinomial(full[None], 1, generator=generator))
        model.zero_grad()
        (-z.log_softmax(-1)[row["offered"].index(drawn)]).backward()
        for p in naive:
            naive[p] += p.grad**2 / 3
    assert len(found) == 4
    for p in found:
        torch.testing.assert_close(found[p], naive[p], rtol=1e-3, atol=1e-9)


def test_moments_of_a_classifier_draw_among_the_offered_labels():
    model, stage = attached(), make_stage()
    own = stage.moments(model, 12, gradients=True)
    others = [dict(row, offered=[2, 3]) for row in stage.rows]
    away = make_stage(rows=others).moments(model, 12, gradients=True)
    name = next(iter(own))
    torch.testing.assert_close(own[name].factor, away[name].factor)
    assert own[name].out is not None
    assert not torch.allclose(own[name].out.T @ own[name].out, away[name].out.T @ away[name].out)
    one = [dict(row, offered=[0]) for row in stage.rows]
    only = make_stage(rows=one).moments(model, 12, gradients=True)
    # With a single label there is nothing to learn from a draw.
    assert len(only[name].out) == 0 or float(only[name].out.abs().max()) < 1e-5


def test_ewc_costs_what_the_sum_over_tasks_costs(tmp_path):
    ewc, values, fishers = make_strategy("ewc", probe_rows=4).keep, [], []
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        folder.mkdir()
        model = attached()
        layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
        a, b = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
        with torch.no_grad():
            a.add_(i)
        stage = make_stage(i, folders=folders[:i])
        ewc.end(model, stage, folder)
        values.append((a.detach().clone(), b.detach().clone()))
        found = fisher(model, stage.family, stage.draw(4, key="probe"), stage.seed)
        fishers.append((found[a], found[b]))
    (term,) = ewc.terms(make_stage(2, folders=folders))
    assert isinstance(term, Anchored)
    name = "bert.encoder.layer.0.attention.self.query"

    class Target:
        pass

    target = Target()
    target.name = name
    state = term.prepare(target)

    def naive(a, b):
        return 0.5 * sum(
            float((f_a * (a - v_a) ** 2).sum() + (f_b * (b - v_b) ** 2).sum())
            for (v_a, v_b), (f_a, f_b) in zip(values, fishers, strict=True)
        )

    points = [(torch.randn(2, 32), torch.randn(32, 2)) for _ in range(3)]
    ours = [float(term.value(*p, state)) for p in points]
    theirs = [naive(*p) for p in points]
    # Equal up to one constant.
    for i, j in itertools.combinations(range(3), 2):
        assert ours[i] - ours[j] == pytest.approx(theirs[i] - theirs[j], rel=1e-3, abs=1e-9)
    assert ewc.terms(make_stage(0)) == []


def test_a_tasks_own_strengths_go_first(tmp_path):
    own = [TASKS[0], replace(TASKS[1], settings=TaskSettings(lambda_1=0.0, lambda_2=0.3))]
    run(tmp_path, make_strategy("o-lora", lambda_1=0.5), own, config=replace(CONFIG, epochs=1))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    terms = {(row["task"], key) for row in rows for key in row if key.startswith("penalty/")}
    assert terms == {("size", "penalty/norm")}


def test_strategies_are_named_and_their_options_checked():
    assert {make_strategy(name).name for name in STRATEGIES} == set(STRATEGIES)
    with pytest.raises(ConfigError, match='Did you mean "o-lora"'):
        make_strategy("olora")
    with pytest.raises(ConfigError, match='Did you mean "lambda_1"'):
        make_strategy("o-lora", lambda1=1)
    with pytest.raises(ConfigError, match="buffer"):
        make_strategy("replay", buffer=0)


# -- streams


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_runs_a_stream(name, tmp_path):
    config = replace(CONFIG, epochs=1)
    result = run(tmp_path, name, config=config)
    stages = 1 if name == "multi-task" else 3
    assert result.R.shape == (stages, 3)
    assert np.isfinite(result.R).all()
    assert set(result.views) == {"offered", "union"}
    assert result.measures["average_accuracy"] == average_accuracy(result.R)
    written = json.loads((tmp_path / "R.json").read_text())
    assert written["R"] == result.R.tolist()
    assert written["finished"]
    assert len((tmp_path / "R.csv").read_text().splitlines()) == stages + 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert max(steps) == (9 if name == "multi-task" else 3)
    again = run(tmp_path, name, config=config)
    assert again.R.tolist() == result.R.tolist()
    assert {len(result.adapters), len(again.adapters)} == {
        {"seq-lora": 1, "replay": 1, "ewc": 1, "seq-ft": 0, "per-task": 0, "multi-task": 1}.get(
            name, 3
        )
    }


def test_the_stack_of_adapters_is_the_model_that_was_measured(tmp_path):
    result = run(tmp_path, "o-lora")
    model = AdapterStack.load(result.adapters).merge(classifier())
    family = ClassifierFamily(byte_tokenizer(), union_of_labels(TASKS), SHORT, places=6)
    for j, task in enumerate(TASKS):
        rows = family.encode(task, task.test)
        answers = family.predict(model.eval(), task, rows, "offered", 8)["offered"]
        right = [a == e.label for a, e in zip(answers, task.test, strict=True)]
        assert result.R[-1, j] == pytest.approx(sum(right) / len(right))


def test_one_lora_goes_on_and_fresh_ones_do_not(tmp_path):
    config = replace(CONFIG, epochs=1, learning_rate=1e-20)
    tasks = [replace(TASKS[0], settings=TaskSettings(learning_rate=1e-2)), TASKS[1]]
    for name, goes_on in (("seq-lora", True), ("inc-lora", False)):
        run(tmp_path / name, name, tasks, config=config)
        first, second = (
            load_file(path / "adapter/adapter_model.safetensors")
            for path in sorted((tmp_path / name / "stages").glob("0*"))
        )
        assert any(t.abs().max() > 0 for key, t in first.items() if "lora_B" in key)
        assert all(torch.equal(first[key], second[key]) for key in first) == goes_on
        if not goes_on:
            assert all(t.abs().max() < 1e-9 for key, t in second.items() if "lora_B" in key)


def test_per_task_forgets_nothing_and_is_untouched_before(tmp_path):
    result = run(tmp_path, "per-task")
    for i, j in itertools.product(range(3), repeat=2):
        assert result.R[i, j] == (result.R[j, j] if j <= i else result.untouched[j])


def test_learning_happens_and_seq_ft_keeps_frozen_weights(tmp_path):
    def frozen():
        model, tokenizer = factory()
        model.classifier.requires_grad_(False)
        return model, tokenizer

    task = make_task("letter", {"a": "red", "b": "blue"}, n=96)
    config = replace(CONFIG, epochs=16, learning_rate=3e-3, logging_steps=12)
    run(tmp_path, "seq-ft", [task], frozen, config)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.5 * losses[0]
    state = torch.load(tmp_path / "stages/01-letter/weights.pt", weights_only=True)
    before = classifier().state_dict()
    torch.testing.assert_close(state["classifier.weight"], before["classifier.weight"], rtol=0,
                               atol=0)  # fmt: skip
    key = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(state[key], before[key])


def test_inc_lora_is_o_lora_without_strength(tmp_path):
    one = run(tmp_path / "inc", "inc-lora", TASKS[:2])
    two = run(tmp_path / "zero", make_strategy("o-lora", lambda_1=0, lambda_2=0), TASKS[:2])
    three = run(tmp_path / "o", make_strategy("o-lora", lambda_1=5.0), TASKS[:2])
    files = [r.adapters[-1] / "adapter_model.safetensors" for r in (one, two, three)]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("scoring", ["offered", "union", "generated"])
def test_language_models_run_streams(kind, scoring, tmp_path):
    def make():
        return (t5() if kind == "t5" else random_model(kind)), byte_tokenizer()

    config = replace(CONFIG, scoring=scoring, epochs=1, bf16=scoring == "union")
    texts = () if kind == "t5" else ("An unrelated text.",)
    result = run(tmp_path, "o-lora", TASKS[:2], make, config, texts=texts)
    assert set(result.views) == {scoring}
    assert np.isfinite(result.R).all()
    assert len(result.text_loss) == (3 if texts else 0)


def test_gradient_accumulation_is_a_larger_batch(tmp_path):
    def still():
        model, tokenizer = factory()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model, tokenizer

    config = replace(CONFIG, dropout=0.0, learning_rate=1e-3, logging_steps=1)
    strategy = make_strategy("o-lora", lambda_1=1.0)
    logs = []
    for name, size, parts in (("whole", 4, 1), ("parts", 2, 2)):
        own = replace(config, batch_size=size, gradient_accumulation=parts)
        folder = run(tmp_path / name, strategy, TASKS[:2], still, own).folder
        logs.append([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])
    assert len(logs[0]) == 12
    for one, two in zip(*logs, strict=True):
        assert (one.pop("task"), one["step"]) == (two.pop("task"), two["step"])
        assert two == pytest.approx(one, rel=1e-3)


def test_seen_tasks_only_and_validation_rows(tmp_path):
    result = run(tmp_path, config=replace(CONFIG, evaluate="seen", evaluate_on="validation"))
    assert np.isnan(result.R[np.triu_indices(3, 1)]).all()
    assert "forward_transfer" not in result.measures
    assert "forgetting" in result.measures
    with pytest.raises(DataError, match='"colour" has no validation rows'):
        run(tmp_path / "none", tasks=[replace(TASKS[0], validation=())],
            config=replace(CONFIG, evaluate_on="validation"))  # fmt: skip


def test_ranks_of_tasks_keep_their_scaling(tmp_path):
    tasks = [TASKS[0], replace(TASKS[1], settings=TaskSettings(rank=2, epochs=1))]
    run(tmp_path, tasks=tasks)
    configs = [
        json.loads((path / "adapter/adapter_config.json").read_text())
        for path in sorted((tmp_path / "stages").glob("0*"))
    ]
    assert [c["r"] for c in configs] == [8, 2]
    assert configs[0]["lora_alpha"] / 8 == configs[1]["lora_alpha"] / 2 == 4


def test_a_head_can_be_trained_beside_the_adapter(tmp_path):
    result = run(tmp_path, "inc-lora", TASKS[:2], config=replace(CONFIG, train_head=True))
    saved = AdapterStack.load(result.adapters).saved
    assert any("classifier" in name for name in saved)


def test_a_folder_of_another_run_is_refused_and_overwritten_on_demand(tmp_path):
    run(tmp_path, tasks=TASKS[:1])
    with pytest.raises(ConfigError, match=r"config.seed was 0, now 1"):
        run(tmp_path, tasks=TASKS[:1], config=replace(CONFIG, seed=1))
    with pytest.raises(ConfigError, match=r"strategy.name was"):
        run(tmp_path, "replay", TASKS[:1])
    (tmp_path / "mine.txt").write_text("keep")
    run(tmp_path, tasks=TASKS[:1], config=replace(CONFIG, seed=1), overwrite=True)
    assert (tmp_path / "mine.txt").read_text() == "keep"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(ConfigError, match="holds no run but file"):
        run(tmp_path / "other", tasks=TASKS[:1])


def test_what_does_not_fit_is_refused_before_training(tmp_path):
    with pytest.raises(ModelError, match="num_labels=6"):
        run(tmp_path, model=lambda: (classifier(4), byte_tokenizer()))
    with pytest.raises(ConfigError, match="writes nothing"):
        run(tmp_path, config=replace(CONFIG, scoring="generated"))
    with pytest.raises(ConfigError, match="`texts` need"):
        run(tmp_path, texts=["x"])
    with pytest.raises(ConfigError, match='called "colour"'):
        run(tmp_path, tasks=[TASKS[0], TASKS[0]])
    with pytest.raises(ConfigError, match='Did you mean "offered"'):
        StreamConfig(scoring="offerd")
    assert not (tmp_path / "manifest.json").exists()


def test_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    seen = []
    run(tmp_path, tasks=TASKS[:2], figures=True, after=lambda r: seen.append(r.measures))
    assert (tmp_path / "R.png").stat().st_size > 5000
    assert (tmp_path / "time.png").stat().st_size > 5000
    assert [set(m) >= {"average_accuracy"} for m in seen] == [True, True]


# -- a kill


def contents(folder):
    """What a run must give again bit by bit."""
    names = [*folder.glob("stages/*/adapter/*.safetensors"), folder / "R.json", folder / "R.csv"]
    names += [*folder.glob("stages/*/weights.pt"), folder / "log.jsonl"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(names)}


def kill_when(path, where, strategy):
    """Run a stream in a process of its own and kill it as soon as `where` matches a path."""
    process = Process(code=SLOW_RUN.format(strategy=strategy, path=str(path)))
    end = time.monotonic() + 120
    while not list(path.glob(where)):
        assert process.poll() is None, process.said
        assert time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "where"),
    [
        ("o-lora", "stages/02-size/checkpoints/checkpoint-*/trainer_state.json"),
        ("seq-ft", "stages/02-size/checkpoints/checkpoint-*/trainer_state.json"),
        ("ewc", "stages/02-size/adapter/adapter_model.safetensors"),
    ],
)
def test_a_killed_stream_ends_as_an_unbroken_one(tmp_path, strategy, where):
    kill_when(tmp_path / "killed", where, strategy)
    assert not (tmp_path / "killed/stages/02-size/done.json").exists()
    assert (tmp_path / "killed/stages/01-colour/done.json").exists()
    killed = run_stream(TASKS, factory, strategy, output=tmp_path / "killed", **SLOWLY)
    whole = run_stream(TASKS, factory, strategy, output=tmp_path / "whole", **SLOWLY)
    assert killed.R.tolist() == whole.R.tolist()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


class Stopped(Exception):
    """Ends a run in the middle of a stage."""


@pytest.mark.parametrize("broken", [None, "optimizer.pt", "rng_state.pth"])
def test_a_stopped_stream_goes_on_from_its_last_whole_checkpoint(tmp_path, monkeypatch, broken):
    from trueline.train.tasks import stages as continual

    whole = run(tmp_path / "whole", "o-lora")
    real, calls, last = continual.Log.on_step_end, [], [11]

    def stop(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        calls.append((self.stage, state.global_step))
        if len(calls) == last[0]:
            raise Stopped

    monkeypatch.setattr(continual.Log, "on_step_end", stop)
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", "o-lora")
    assert calls[-1] == (1, 5)
    calls.clear()
    last[0] = 0
    kept = sorted((tmp_path / "stopped").glob("stages/02-*/checkpoints/checkpoint-*"))
    if broken is not None:
        (kept[-1] / broken).write_bytes(b"junk")
    stopped = run(tmp_path / "stopped", "o-lora")
    # From the checkpoint after step 4 or the one before it, not from the task's start.
    assert calls[0] == (1, 5 if broken is None else 3)
    named = f"{kept[-1].parent.parent.name}/{kept[-1].name}/{broken}"
    assert stopped.broken == (() if broken is None else (named,))
    assert stopped.R.tolist() == whole.R.tolist()
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


SLOWLY = {
    "config": replace(CONFIG, epochs=10, save_steps=5),
    "prompt": SHORT,
    "figures": False,
}
SLOW_RUN = """
from test_continual import SLOWLY, TASKS, factory, run_stream
run_stream(TASKS, factory, {strategy!r}, output={path!r}, **SLOWLY)
"""
