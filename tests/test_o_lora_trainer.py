"""Training a task on a stack: the penalty's strength, the guards, two tasks on each kind."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, random_model
from peft import LoraConfig, PeftModel
from processes import together
from test_adapters import TARGETS, assert_same, logits, make
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainingArguments
from transformers.utils import logging

from trueline.errors import ConfigError, DataError, ModelError
from trueline.methods.drift import drift, factor_of
from trueline.methods.o_lora import norm, overlap
from trueline.train.adapters.export import write_lora
from trueline.train.adapters.stack import AdapterStack, adapter_layers, save_adapter
from trueline.train.keep import KEEP, Stage, kept, make_keep
from trueline.train.keep import penalty as penalties
from trueline.train.keep.drift import Drift
from trueline.train.keep.o_lora import Norm, Overlap
from trueline.train.keep.second_moments import (
    Moments,
    collect_moments,
    input_moments,
    load_moments,
    save_moments,
)
from trueline.train.keep.trainer import KeptTrainer

KINDS = list(TARGETS)
O_LORA = ("lambda_1", "lambda_2", "penalty", "normalize")


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def rows(kind, seed, count=8):
    """Random rows, of one length each side so that all micro-batches weigh the same."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(5, 60, (length,), generator=generator).tolist()

    found = [{"input_ids": ids(7), "attention_mask": [1] * 7} for _ in range(count)]
    for row in found:
        if kind == "bert":
            row["labels"] = int(torch.randint(5, (1,), generator=generator))
        else:
            row["labels"] = ids(4) if kind == "t5" else row["input_ids"]
    return found


def collate(batch):
    return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}


def settings(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(defaults | options))


def o_lora(lambda_1=0.0, lambda_2=0.0, **options):
    return make_keep(
        "o-lora", lambda_1=lambda_1, lambda_2=lambda_2, **{"normalize": False} | options
    ).terms(None)


def lora(kind, **options):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind]} | options))


def attached(kind, stack, seed, **options):
    base = make(kind)
    torch.manual_seed(seed)
    return stack.attach(base, lora(kind, **options))


def first_task(kind, folder, **options):
    """A trained first adapter, with its b moved away from 0 by more than two steps do."""
    model = attached(kind, AdapterStack(), 1, **options)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return save_adapter(model, folder)


def trained(kind, folder, stack, terms=None, seed=2, lora_options=None, **options):
    model = attached(kind, stack, seed, **(lora_options or {}))
    own = {name: options.pop(name) for name in list(options) if name in O_LORA}
    args = settings(folder / "work", **options)
    trainer = KeptTrainer(
        model,
        args,
        collate,
        train_dataset=rows(kind, seed),
        stack=stack,
        terms=o_lora(**own) if terms is None else terms,
    )
    trainer.train()
    return trainer


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def penalty_now(model, stack, lambda_1, lambda_2):
    """The released loss at the model's present weights, module after module."""
    total = 0.0
    for name, layer in adapter_layers(model).items():
        a, b = (getattr(layer, f"lora_{x}")["default"].weight.detach() for x in "AB")
        past = stack.past_rows(name)
        total += lambda_2 * norm(a, b).item()
        if past is not None:
            total += lambda_1 * overlap(a, past).item()
    return total


# -- what is added to the loss


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_tasks_plus_the_released_penalty(kind, tmp_path):
    stack = AdapterStack.load([first_task(kind, tmp_path / "0")])
    model = attached(kind, stack, 2)
    expected = penalty_now(model, stack, 0.5, 0.1)
    plain = trained(kind, tmp_path, stack, max_steps=1).state.log_history[0]
    found = trained(kind, tmp_path, stack, max_steps=1, lambda_1=0.5, lambda_2=0.1)
    log = found.state.log_history[0]
    assert expected > 1
    assert log["loss"] - plain["loss"] == pytest.approx(expected, rel=1e-4)
    assert log["penalty/overlap"] + log["penalty/norm"] == pytest.approx(expected, rel=1e-5)


def test_the_penalty_moves_the_rows_apart(tmp_path):
    stack = AdapterStack.load([first_task("llama", tmp_path / "0", r=2)])
    for options in ({}, {"normalize": True}, {"penalty": "squared"}):
        start = attached("llama", stack, 2)
        trainer = trained("llama", tmp_path, stack, lambda_1=1.0, max_steps=30, **options)
        before, after = (penalty_now(m, stack, 1, 0) for m in (start, trainer.model))
        assert after < before / 4


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_accumulation_changes_nothing(kind, tmp_path):
    stack = AdapterStack.load([first_task(kind, tmp_path / "0")])
    options = {"lambda_1": 0.5, "lambda_2": 0.1, "optim": "sgd", "max_grad_norm": 0}
    whole = trained(kind, tmp_path, stack, per_device_train_batch_size=8, **options)
    parts = trained(
        kind,
        tmp_path,
        stack,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **options,
    )
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], weight, rtol=1e-4, atol=1e-6)
    for one, other in zip(whole.state.log_history, parts.state.log_history, strict=True):
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_evaluation_is_without_the_penalty(tmp_path):
    stack = AdapterStack.load([first_task("llama", tmp_path / "0")])
    model = attached("llama", stack, 2)
    data = rows("llama", 3)
    trainer = KeptTrainer(
        model,
        settings(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=1),
        collate,
        terms=o_lora(5.0),
        train_dataset=data,
        eval_dataset=data,
        stack=stack,
    )
    trainer.train()
    with torch.no_grad():
        expected = model.eval()(**collate(data)).loss.item()
    evaluated = next(x for x in trainer.state.log_history if "eval_loss" in x)
    assert evaluated["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert "penalty/overlap" not in evaluated


def test_terms_see_scaling_moments_and_merged_weights(tmp_path):
    class Spy(Drift):
        def prepare(self, target):
            seen.append(target)
            return super().prepare(target)

    seen = []
    folder = first_task("gpt2", tmp_path / "0")
    stack = AdapterStack.load([folder])
    model = attached("gpt2", stack, 2)
    found = collect_moments(
        model, [collate(rows("gpt2", 1))], stack.modules, generator=torch.Generator()
    )
    save_moments(found, folder)
    trainer = KeptTrainer(
        model, settings(tmp_path), collate, train_dataset=rows("gpt2", 2), stack=stack,
        terms=[Spy(2.0)],
    )  # fmt: skip
    trainer.train()
    assert [t.name for t in seen] == list(adapter_layers(model))
    merged = stack.merge(make("gpt2"))
    total = 0.0
    for t in seen:
        weight = merged.get_submodule(t.name).weight.detach().T  # Conv1D
        assert torch.equal(t.weight, weight)
        assert t.scaling == 2.0
        change = t.scaling * (t.b @ t.a).detach()
        inputs = found[t.name].factor
        total += float((change @ inputs.T).square().sum() / (weight @ inputs.T).square().sum())
    value = trainer.penalty().item()
    assert value > 0
    assert value == pytest.approx(2.0 * total / len(seen), rel=1e-4)


def test_curvature_estimates_the_rise_of_the_loss(tmp_path):
    """One linear layer, one row a draw: the K-FAC form against the exact Fisher matrix."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=generator) * 0.05 for s in ((2, 4), (3, 2)))
    x = torch.randn(1, 4, generator=generator).repeat(200, 1)
    p = torch.randn(1, 3, generator=generator).softmax(-1)
    fisher = p.diag_embed()[0] - p.T @ p
    moments = Moments(factor_of(x.T @ x / 200), factor_of(fisher))
    target = type("T", (), {"name": "m", "moments": (moments,), "scaling": 2.0})()
    term = Drift(1.0, curvature=True)
    found = term.value(a, b, term.prepare(target)).item()

    def loss(change):
        z = p.log() + (change @ x[0])[None]
        return -(p * (z.log_softmax(-1))).sum().item()

    rise = loss(2.0 * b @ a) - loss(torch.zeros(3, 4))
    assert found == pytest.approx(rise, rel=0.1)
    # Of several tasks it is the mean rise, whatever their number.
    other = Moments(3.0 * moments.factor, moments.out)  # nine times the second moment
    target.moments = (moments, other)
    assert term.value(a, b, term.prepare(target)).item() == pytest.approx(5 * found, rel=1e-4)


# -- guards


def test_only_the_new_adapter_may_be_trained(tmp_path):
    model = attached("llama", AdapterStack(), 1)
    model.base_model.model.lm_head.weight.requires_grad_()
    trainer = KeptTrainer(model, settings(tmp_path), collate, train_dataset=rows("llama", 1))
    with pytest.raises(ModelError, match=r'lm_head.weight" would be trained \(1 parameters'):
        trainer.train()
    model = attached("llama", AdapterStack(), 1)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ModelError, match="would not be trained: it is frozen"):
        penalties.check_trainable(model)
    with pytest.raises(ModelError, match="would not be trained: it is missing"):
        penalties.check_trainable(make("llama").requires_grad_(False))
    model = attached("llama", AdapterStack(), 1)
    layers = list(adapter_layers(model).values())
    layers[0].lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(ModelError, match="some are not"):
        penalties.check_trainable(model)
    for layer in layers:  # a frozen a is a strategy
        layer.lora_A["default"].weight.requires_grad_(False)
    penalties.check_trainable(model)


def test_the_stack_must_be_the_one_in_the_model(tmp_path):
    stack = AdapterStack.load([first_task("llama", tmp_path / "0")])
    model = attached("llama", AdapterStack(), 2)
    with pytest.raises(ModelError, match="has 0 adapters merged into it"):
        penalties.check_stack(model, stack)
    with pytest.raises(ModelError, match="has 1 adapters merged"):
        penalties.check_stack(attached("llama", stack, 2), AdapterStack())
    wrong = KeptTrainer(
        model, settings(tmp_path), collate, train_dataset=rows("llama", 1), stack=stack
    )
    with pytest.raises(ModelError, match="has 0 adapters merged into it"):
        wrong.train()
    stack.adapters[0].config["rank_pattern"] = {"q_proj": 3}
    with pytest.raises(ModelError, match="has 4 past rows, the adapters' ranks add up to 3"):
        penalties.check_stack(attached("llama", stack, 2), stack)


def test_a_penalty_that_can_only_be_0_is_refused(tmp_path):
    stack = AdapterStack.load([first_task("llama", tmp_path / "0", target_modules=["q_proj"])])
    with pytest.raises(ModelError, match="overlap penalty is 0 whatever the new adapter learns"):
        trained("llama", tmp_path, stack, lambda_1=1.0, lora_options={"target_modules": ["v_proj"]})
    trained("llama", tmp_path, stack, lora_options={"target_modules": ["v_proj"]})
    # a penalty that is 0 only at the start, as the drift is, is none of these
    layer = next(iter(adapter_layers(attached("llama", stack, 2)).values()))
    moments = {name: [Moments(torch.eye(32))] for name in stack.modules}
    assert layer.lora_B["default"].weight.abs().max() == 0
    assert penalties.prepare(attached("llama", stack, 2), stack, [Drift()], moments)


def test_the_same_seed_for_each_task_is_refused(tmp_path):
    stack = AdapterStack.load([first_task("llama", tmp_path / "0")])  # seed 1
    with pytest.raises(ModelError, match="Seed each task differently"):
        trained("llama", tmp_path, stack, lambda_1=1.0, seed=1)
    trained("llama", tmp_path, stack, seed=1)  # without a penalty it is no mistake


def test_changed_files_of_earlier_adapters_are_seen(tmp_path):
    folder = first_task("llama", tmp_path / "0")
    stack = AdapterStack.load([folder])

    class Vandal(KeptTrainer):
        def compute_loss(self, *args, **kwargs):
            path = folder / "adapter_model.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"x")
            return super().compute_loss(*args, **kwargs)

    model = attached("llama", stack, 2)
    trainer = Vandal(
        model, settings(tmp_path), collate, train_dataset=rows("llama", 1), stack=stack
    )
    with pytest.raises(ModelError, match="changed during training"):
        trainer.train()


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="`lambda_1` must be a finite number of at least 0"):
        make_keep("o-lora", lambda_1=-1.0)
    with pytest.raises(ConfigError, match='Unknown penalty "square"'):
        make_keep("o-lora", penalty="square")
    assert o_lora(0.0) == []
    found = o_lora(2.0, 0.1, penalty="squared", normalize=True)
    assert found == [Overlap(2.0, "squared", True), Norm(0.1, True)]
    for name, way in KEEP.items():
        assert way.name == name
        assert make_keep(name).terms(None) == make_keep(name, **asdict(way())).terms(None)
    with pytest.raises(ConfigError, match='Did you mean "inf-lora"'):
        make_keep("inflora")
    with pytest.raises(ConfigError, match='"drift" has no option "strenght"'):
        make_keep("drift", strenght=1)


def test_default_collators():
    tokenizer = byte_tokenizer()
    for kind, expected in (("bert", DataCollatorWithPadding), ("t5", DataCollatorForSeq2Seq)):
        model = attached(kind, AdapterStack(), 1)
        trainer = KeptTrainer(model, settings("unused"), processing_class=tokenizer)
        assert type(trainer.data_collator) is expected


# -- two tasks, from training to a plain model


@pytest.mark.parametrize("kind", KINDS)
def test_two_tasks_train_stack_export_and_reload(kind, tmp_path):
    options = {"modules_to_save": ["classifier"]} if kind == "bert" else {}
    folders = []
    for task in range(2):
        stack = AdapterStack.load(folders)
        terms = [Overlap(0.5), Norm(0.01)] + ([Drift(1.0)] if task else [])
        trainer = trained(kind, tmp_path, stack, terms, seed=task + 1, lora_options=options)
        assert trainer.state.global_step == 2
        folders.append(save_adapter(trainer.model, tmp_path / str(task)))
        batches = [collate(rows(kind, task + 1))]
        modules = list(adapter_layers(trainer.model))
        save_moments(collect_moments(trainer.model, batches, modules, rank=8), folders[-1])
    expected = logits(trainer.model)
    stack = AdapterStack.load(folders)
    assert_same(logits(stack.merge(make(kind))), expected)
    one = write_lora(stack, tmp_path / "one")
    assert_same(logits(PeftModel.from_pretrained(make(kind), one.folder)), expected)
    # without the new adapter it is the model after the first task
    with trainer.model.disable_adapter():
        assert_same(logits(trainer.model), logits(AdapterStack.load(folders[:1]).merge(make(kind))))


def test_a_resumed_task_ends_the_same(tmp_path):
    stack = AdapterStack.load([first_task("llama", tmp_path / "0")])
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def trainer(folder):
        model = attached("llama", stack, 2)
        args = settings(folder, **options)
        data = rows("llama", 2)
        return KeptTrainer(model, args, collate, train_dataset=data, stack=stack, terms=o_lora(0.5))

    whole, resumed = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight)


def test_the_mixin_composes_with_sft(tmp_path):
    from datasets import Dataset

    pytest.importorskip("trl", reason="rivals: pip install 'trueline[benchmarks]'")
    from trl import SFTConfig, SFTTrainer

    stack = AdapterStack.load([first_task("llama", tmp_path / "0")])
    data = Dataset.from_list([{"input_ids": r["input_ids"]} for r in rows("llama", 2)])
    ends, terms = [], []
    for size, steps in ((8, 1), (2, 4)):
        model = attached("llama", stack, 2)
        terms.append(penalty_now(model, stack, 0.5, 0))
        args = SFTConfig(
            str(tmp_path / "work"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            logging_steps=1,
            optim="sgd",
            learning_rate=1e-2,
            max_grad_norm=0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = kept(SFTTrainer)(
            model,
            args,
            train_dataset=data,
            processing_class=byte_tokenizer(),
            stack=stack,
            terms=[Overlap(0.5)],
        )
        trainer.train()
        ends.append(weights(trainer))
        logged = trainer.state.log_history[0]["penalty/overlap"]
        assert logged == pytest.approx(terms[-1], rel=1e-5)
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["sft", "dpo", "inverse-q"])
def test_one_step_of_any_trainer_has_the_penalty_once(name, steps, tmp_path):
    """Under a penalty that drowns the task a step of SGD is the penalty's gradient, once."""
    from datasets import Dataset

    pytest.importorskip("trl", reason="rivals: pip install 'trueline[benchmarks]'")
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from trueline.train.distil.trainer import InverseQConfig, InverseQTrainer

    pair = {"prompt": "Say", "chosen": " yes", "rejected": " no"}
    trainers = {
        "sft": (SFTTrainer, SFTConfig, [{"text": "some words"}] * 8, {}),
        "dpo": (DPOTrainer, DPOConfig, [pair] * 8, {}),
        "inverse-q": (
            InverseQTrainer,
            InverseQConfig,
            [{"prompt": "Say"}] * 8,
            {"principle": "Be brief.", "max_completion_length": 4, "min_effect": 0.0},
        ),
    }
    cls, config, data, options = trainers[name]
    stack = AdapterStack.load([first_task("llama", tmp_path / "0")])
    model = attached("llama", stack, 2)
    layers = adapter_layers(model)
    start = {n: layer.lora_A["default"].weight.detach().clone() for n, layer in layers.items()}
    args = config(
        str(tmp_path / "work"),
        per_device_train_batch_size=8 // steps,
        gradient_accumulation_steps=steps,
        max_steps=1,
        optim="sgd",
        learning_rate=1e-6,
        max_grad_norm=0,
        warmup_steps=0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        disable_tqdm=True,
        **options,
    )
    trainer = kept(cls)(
        model,
        args=args,
        train_dataset=Dataset.from_list(data),
        processing_class=byte_tokenizer(),
        stack=stack,
        terms=[Overlap(1e4)],
    )
    trainer.train()
    for n, layer in layers.items():
        a = start[n].requires_grad_()
        (gradient,) = torch.autograd.grad(1e4 * overlap(a, stack.past_rows(n)), a)
        moved = a.detach() - layer.lora_A["default"].weight.detach()
        torch.testing.assert_close(moved, 1e-6 * gradient, rtol=0.02, atol=1e-5)


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_trainers_in_the_docs_run(name, tmp_path, monkeypatch):
    from datasets import Dataset

    pytest.importorskip("trl", reason="rivals: pip install 'trueline[benchmarks]'")
    from trl import DPOConfig, SFTConfig

    monkeypatch.chdir(tmp_path)
    first_task("llama", tmp_path / "first", target_modules=["q_proj", "v_proj"])
    before = AdapterStack.load(["first"]).file_hashes()
    docs = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n([^`]*import kept.*?)```", docs, re.DOTALL)
    rows, config = [{"text": "some words"}] * 4, SFTConfig
    if name == "dpo":
        code = code.replace("SFTTrainer", "DPOTrainer")
        rows = [{"prompt": "Say", "chosen": " yes", "rejected": " no"}] * 4
        config = DPOConfig
    args = config(
        "work", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
        logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
        activation_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    told = {"base": make("llama"), "tokenizer": byte_tokenizer(), "args": args}
    exec(compile(code, "docs/training.md", "exec"), told | {"rows": Dataset.from_list(rows)})
    stack = AdapterStack.load(["first", "second"])
    assert stack.file_hashes()[:1] == before
    assert stack.past_rank("model.layers.0.self_attn.q_proj") == 4 + 8


# -- ways to keep


def stage_of(kind, folders, seed, index=None):
    data = rows(kind, seed)
    index = len(folders) if index is None else index
    return Stage(index, 3, folders, data, lambda model, n: [collate(data[:n])], seed)


@pytest.mark.parametrize("name", [n for n in KEEP if n != "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_trains_two_stages_from_files_alone(kind, name, tmp_path):
    """What a way needs is in the folders; the second stage is held, and only where it says so."""
    keep, folders = make_keep(name), []
    for task in range(2):
        stage = stage_of(kind, list(folders), task + 1)
        stack = AdapterStack.load(stage.folders)
        model = attached(kind, stack, task + 1)
        keep.begin(model, stage)
        trainer = KeptTrainer(
            model, settings(tmp_path / "work"), collate, train_dataset=keep.rows(stage),
            stack=stack, terms=keep.terms(stage),
        )  # fmt: skip
        trainer.train()
        logs = [x for x in trainer.state.log_history if "loss" in x]
        held = [value for key, value in logs[-1].items() if key.startswith("penalty/")]
        assert bool(held) == (task == 1 and name not in ("inf-lora", "replay"))
        assert all(value > 0 for value in held)
        folders.append(save_adapter(trainer.model, tmp_path / str(task)))
        keep.end(trainer.model, stage, folders[-1])
        before = {p.name: p.read_bytes() for p in folders[-1].iterdir()}
        keep.end(trainer.model, stage, folders[-1])
        assert {p.name: p.read_bytes() for p in folders[-1].iterdir()} == before


def test_replay_takes_places_of_new_rows_and_keeps_the_same_old_ones(tmp_path):
    new, old = ([{"input_ids": [i]} for i in span] for span in (range(20), range(100, 120)))
    replay, folders = make_keep("replay", buffer=3, share=0.4), [tmp_path / "0", tmp_path / "1"]

    def stage(index, data):
        return Stage(index, 3, folders[:index], data, lambda model, n: [], 100 + index)

    assert replay.rows(stage(0, new)) == new
    for index, data in enumerate((old, old[:1])):
        folders[index].mkdir()
        replay.end(None, stage(index, data), folders[index])
    later = [replay.rows(stage(i, new)) for i in (1, 2)]
    seen = [{row["input_ids"][0] for row in rows if row["input_ids"][0] >= 100} for rows in later]
    assert [len(rows) for rows in later] == [20, 20]
    assert sum(row["input_ids"][0] >= 100 for row in later[0]) == 8
    assert len(seen[0]) == 3
    assert seen[0] <= seen[1]
    (folders[0] / "replay.jsonl").unlink()
    with pytest.raises(DataError, match="Replay needs rows of every earlier stage"):
        replay.rows(stage(2, new))


def test_inf_lora_needs_the_basis_of_every_earlier_stage(tmp_path):
    folder = first_task("llama", tmp_path / "0")
    stage = stage_of("llama", [folder], 2)
    model = attached("llama", AdapterStack.load([folder]), 2)
    with pytest.raises(DataError, match="InfLoRA needs it of every earlier adapter"):
        make_keep("inf-lora").begin(model, stage)


@pytest.mark.parametrize("normalize", [False, True])
def test_ella_is_the_elementwise_product_with_what_was_changed(normalize, tmp_path):
    """Against W_now - W_0 of the merged layout, entry by entry."""
    folders = [first_task("gpt2", tmp_path / "0")]
    second = attached("gpt2", AdapterStack.load(folders), 2, r=2)
    for layer in adapter_layers(second).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    folders.append(save_adapter(second, tmp_path / "1"))
    stack = AdapterStack.load(folders)
    model = attached("gpt2", stack, 3)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    terms = make_keep("ella", strength=3.0, normalize=normalize).terms(None)
    states = penalties.prepare(model, stack, terms)
    (value,) = penalties.penalties(states).values()
    base, now, found = make("gpt2"), stack.merge(make("gpt2")), []
    for name, layer in adapter_layers(model).items():
        a, b = (getattr(layer, f"lora_{x}")["default"].weight for x in "AB")
        change = (layer.scaling["default"] * b @ a).T  # Conv1D
        w_0, w_now = (m.get_submodule(name).weight.detach() for m in (base, now))
        past = (w_now - w_0).square()
        if normalize:
            past = past / past.mean() / w_now.square().sum()
        found.append((change.square() * past).sum())
    total = 3.0 * (sum(found) / len(found) if normalize else sum(found))
    assert total > 0
    torch.testing.assert_close(value, total, rtol=1e-3, atol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(x, trained) for x in (value, total))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-3, atol=1e-4 * float(other.detach().abs().max())
        )


# -- moments


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_moments_are_those_of_real_tokens(kind):
    model = make(kind)
    batch = collate(rows(kind, 1, 3))
    batch["attention_mask"][1, 4:] = 0
    seen = {}
    name = "bert.encoder.layer.1.attention.self.query" if kind == "bert" else None
    name = name or next(n for n, _ in model.named_modules() if n.endswith(TARGETS[kind][0]))
    handle = model.get_submodule(name).register_forward_hook(
        lambda m, args, out: seen.update(x=args[0].detach())
    )
    with torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"})
    handle.remove()
    x = torch.cat([seen["x"][0], seen["x"][1, :4], seen["x"][2]])
    expected = sum(torch.outer(row, row) for row in x) / len(x)
    # in two batches the same
    halves = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
    for batches in ([batch], halves):
        factor = input_moments(model, batches, [name])[name]
        torch.testing.assert_close(factor.T @ factor, expected, rtol=1e-3, atol=1e-5)


def test_moments_of_an_encoder_decoder_know_the_two_sides():
    model = make("t5")
    batch = collate(rows("t5", 1, 3))
    batch["labels"] = torch.cat([batch["labels"], batch["labels"][:, :3]], dim=1)
    batch["labels"][2, 5:] = -100
    batch["attention_mask"][0, 3:] = 0  # both sides have seven places
    names = [
        "encoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.v",
    ]
    seen = {}
    handles = [
        model.get_submodule(n).register_forward_hook(
            lambda m, args, out, n=n: seen.update({n: args[0].detach()})
        )
        for n in names
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    read, written = batch["attention_mask"].bool(), batch["labels"] != -100
    found = input_moments(model, [batch], names)
    for name, mask in zip(names, (read, written, read), strict=True):
        x = seen[name][mask]
        expected = sum(torch.outer(row, row) for row in x) / int(mask.sum())
        moment = found[name].T @ found[name]
        torch.testing.assert_close(moment, expected, rtol=1e-3, atol=1e-4)


def test_gradient_moments_are_the_fisher_information():
    """The classifier's own output gradient is softmax - one-hot of the drawn label."""
    model = make("bert")
    batch = collate(rows("bert", 1, 4))
    many = {k: v.repeat(500, *[1] * (v.dim() - 1)) for k, v in batch.items()}
    generator = torch.Generator().manual_seed(0)
    found = collect_moments(model, [many], ["classifier"], gradients=True, generator=generator)
    out = found["classifier"].out
    p = logits_of(model, batch).softmax(-1)
    expected = sum(torch.diag(row) - torch.outer(row, row) for row in p) / 4
    torch.testing.assert_close(out.T @ out, expected, rtol=0, atol=0.02)
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_gradient_moments_of_a_language_model_add_up_over_places():
    """Against autograd, a token at a time: each drawn token's gradients at all earlier places."""
    model = make("llama")
    name = "model.layers.0.self_attn.v_proj"
    batch = collate(rows("llama", 1, 2))
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :-1] = -100  # one prediction a row, from the place before the last
    generator = torch.Generator().manual_seed(3)
    found = collect_moments(model, [batch], [name], gradients=True, generator=generator)[name]
    last = logits_of(model, batch)[:, -2]
    drawn = torch.multinomial(last.softmax(-1), 1, generator=torch.Generator().manual_seed(3))
    total = 0
    for i in range(2):
        outputs = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda m, args, out, outputs=outputs: outputs.append(out)
        )
        z = model(input_ids=batch["input_ids"][i : i + 1]).logits[0, -2]
        handle.remove()
        loss = -z.log_softmax(-1)[drawn[i, 0]]
        (g,) = torch.autograd.grad(loss, outputs)
        total = total + g[0].T @ g[0] / 2
    moment = found.out.T @ found.out
    torch.testing.assert_close(moment, total, rtol=1e-3, atol=1e-5 * float(total.abs().max()))


def logits_of(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def test_moments_are_written_and_read(tmp_path):
    found = {"a.b": Moments(torch.ones(2, 3), torch.ones(1, 4)), "c": Moments(torch.ones(3, 3))}
    for task in range(2):
        (tmp_path / str(task)).mkdir()
        save_moments(found, tmp_path / str(task))
    read = load_moments([tmp_path / "0", tmp_path / "1"])
    assert {name: len(m) for name, m in read.items()} == {"a.b": 2, "c": 2}
    assert torch.equal(read["a.b"][1].out, torch.ones(1, 4))
    assert read["c"][0].out is None
    with pytest.raises(DataError, match="Collect the moments first"):
        load_moments([tmp_path])


def test_moments_of_nothing_are_refused():
    model = make("llama")
    with pytest.raises(ConfigError, match="no batches"):
        collect_moments(model, [], ["lm_head"])
    with pytest.raises(ModelError, match='has no module "nothing"'):
        collect_moments(model, [], ["nothing"])
    bare = [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]
    with pytest.raises(ConfigError, match="needs `labels`"):
        collect_moments(model, bare, ["lm_head"], gradients=True)
    with pytest.raises(ConfigError, match="needs `labels`"):
        collect_moments(make("t5"), bare, ["lm_head"])
    assert drift(torch.ones(1, 2), torch.ones(2, 1), torch.eye(2)).item() == 4


# -- processes

DISTRIBUTED = """
import sys
from dataclasses import asdict
from pathlib import Path
import torch
from test_o_lora_trainer import AdapterStack, save_adapter, trained
folder = Path({folder!r})
stack = AdapterStack.load([folder / "0"])
options = dict(lambda_1=0.5, lambda_2=0.1, optim="sgd", max_grad_norm=0)
trainer = trained("llama", folder, stack, per_device_train_batch_size={size}, **options)
if trainer.is_world_process_zero():
    save_adapter(trainer.model, folder / {name!r})
    torch.save([x["loss"] for x in trainer.state.log_history if "loss" in x], folder / "loss.pt")
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    first_task("llama", tmp_path / "0")
    adapters = []
    for name, processes, size in (("one", 1, 8), ("two", 2, 4)):
        together(DISTRIBUTED.format(folder=str(tmp_path), size=size, name=name), processes)
        adapters.append(AdapterStack.load([tmp_path / name]).adapters[0])
    for name, module in adapters[0].modules.items():
        other = adapters[1].modules[name]
        torch.testing.assert_close(other.a, module.a, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other.b, module.b, rtol=1e-4, atol=1e-6)


def test_stock_trainer_needs_the_correction():
    """Why `KeptTrainer` sets `model_accepts_loss_kwargs`: if this fails, it can be left out."""
    trainer = Trainer(make("t5"), TrainingArguments("unused", use_cpu=True, report_to="none"))
    assert trainer.model_accepts_loss_kwargs
    batch = collate(rows("t5", 1))
    with torch.no_grad():
        plain, divided = (make("t5")(**batch, **x).loss for x in ({}, {"num_items_in_batch": 999}))
    assert torch.equal(plain, divided)
    with torch.no_grad():
        batch = collate(rows("llama", 1))
        lm = random_model("llama")
        assert lm(**batch, num_items_in_batch=999).loss < lm(**batch).loss / 2


def test_step_benchmark_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from benchmarks import o_lora_step

    threads = torch.get_num_threads()
    o_lora_step.main(
        ["--model", "nano", "--tasks", "2", "--rounds", "1", "--output", str(tmp_path)]
    )
    torch.set_num_threads(threads)
    assert "Against the released loop" in capsys.readouterr().out
    found = json.loads((tmp_path / "o_lora_step.json").read_text())
    assert [row["ratio"] for row in found["steps"] if row["contender"] == "plain LoRA"] == [1]
    assert all(row["penalty"] > 0 for row in found["steps"][2:])
    assert max(found["released"].values()) < 1e-6
    for row in found["stacks"]:
        assert max(row["one LoRA"], row["merged"]) < 1e-5 < row["change"]
