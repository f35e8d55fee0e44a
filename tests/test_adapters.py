"""Stacks of adapters, merged and exported, are the sum of their adapters: on all kinds of model."""

import json

import pytest
import torch
from conftest import random_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

from trueline.errors import ConfigError, ModelError
from trueline.models.adapter import add_lora
from trueline.train.adapters.export import write_lora, write_merged
from trueline.train.adapters.saved import read_lora
from trueline.train.adapters.stack import AdapterStack, adapter_layers, save_adapter

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "t5": ["q", "v"],
    "bert": ["query", "value"],
}
LOADERS = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForSequenceClassification}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable_progress_bar()


def make(kind):
    """A random model, the same at each call."""
    torch.manual_seed(0)
    if kind == "t5":
        config = T5Config(
            vocab_size=61,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            initializer_factor=1.0,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
        return T5ForConditionalGeneration(config).eval()
    if kind == "bert":
        config = BertConfig(
            vocab_size=61,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.3,
        )
        return BertForSequenceClassification(config).eval()
    return random_model(kind)


def logits(model):
    ids = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    with torch.no_grad():
        return model.eval()(**inputs).logits


def trained(kind, folder, seed, **options):
    """An adapter whose weights are random on both sides, written by PEFT."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind]} | options
    model = add_lora(make(kind), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return save_adapter(model, folder)


def summed(kind, folders):
    """The base with every adapter's b a added, by PEFT's own merging, one after the other."""
    model = make(kind)
    for folder in folders:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", list(TARGETS))
def test_merge_attach_and_both_exports_are_the_stack(kind, tmp_path):
    folders = [trained(kind, tmp_path / str(t), t) for t in range(2)]
    expected = logits(summed(kind, folders))
    assert (expected - logits(make(kind))).abs().max() > 0.1
    stack = AdapterStack.load(folders)
    assert_same(logits(stack.merge(make(kind))), expected)
    fresh = stack.attach(make(kind), LoraConfig(r=2, target_modules=TARGETS[kind]))
    assert_same(logits(fresh), expected)

    one = write_lora(stack, tmp_path / "one")
    assert (one.rank, one.vllm_max_lora_rank) == (8, 8)
    assert_same(logits(PeftModel.from_pretrained(make(kind), one.folder)), expected)
    merged = write_merged(stack, tmp_path / "merged", make(kind))
    loader = LOADERS.get(kind, AutoModelForCausalLM)
    assert_same(logits(loader.from_pretrained(merged.folder)), expected)


@pytest.mark.parametrize(("tasks", "vllm"), [(1, 8), (2, 8), (8, 32), (16, 64)])
def test_one_lora_of_t_tasks(tasks, vllm, tmp_path):
    folders = [trained("llama", tmp_path / str(t), t) for t in range(tasks)]
    one = write_lora(AdapterStack.load(folders), tmp_path / "one")
    config = json.loads((one.folder / "adapter_config.json").read_text())
    # T x r and T x alpha: the scaling stays 2
    assert (config["r"], config["lora_alpha"]) == (4 * tasks, 8 * tasks)
    assert one.vllm_max_lora_rank == vllm
    assert f"--max-lora-rank {vllm}" in str(one)
    loaded = PeftModel.from_pretrained(make("llama"), one.folder)
    assert_same(logits(loaded), logits(summed("llama", folders)))
    # transformers' own loading
    model = make("llama")
    model.load_adapter(str(one.folder))
    assert_same(logits(model), logits(summed("llama", folders)))


MIXED = [
    {"r": 4, "lora_alpha": 8},
    {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"]},
    {"r": 8, "lora_alpha": 5, "use_rslora": True},
    {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"0.self_attn.q_proj": 1}},
    {"target_modules": r".*layers\.1\.mlp\.(up|gate)_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
]
"""Ranks, scalings and targets that differ from task to task and inside a task."""


@pytest.mark.parametrize(
    "chosen", [MIXED[1:2], MIXED[2:3], MIXED[3:4], MIXED[:2], MIXED[:5], MIXED]
)
def test_tasks_that_differ(chosen, tmp_path):
    folders = [trained("llama", tmp_path / str(i), i, **o) for i, o in enumerate(chosen)]
    expected = logits(summed("llama", folders))
    stack = AdapterStack.load(folders)
    assert_same(logits(stack.merge(make("llama"))), expected)
    one = write_lora(stack, tmp_path / "one")
    loaded = PeftModel.from_pretrained(make("llama"), one.folder)
    assert_same(logits(loaded), expected)
    # one rank and one scaling for all modules: loaders without patterns are right too
    layers = adapter_layers(loaded).values()
    assert len({layer.scaling["default"] for layer in layers}) == 1
    assert {layer.r["default"] for layer in layers} == {one.rank}
    assert set(adapter_layers(loaded)) == set(stack.modules)


def test_past_rows_and_ranks(tmp_path):
    folders = [trained("llama", tmp_path / str(i), i, **o) for i, o in enumerate(MIXED[:4])]
    stack = AdapterStack.load(folders)
    name = "model.layers.0.self_attn.q_proj"
    states = [load_file(f / "adapter_model.safetensors") for f in folders]
    rows = torch.cat([s[f"base_model.model.{name}.lora_A.weight"] for s in states])
    assert torch.equal(stack.past_rows(name), rows)
    assert len(rows) == stack.past_rank(name) == 4 + 2 + 8 + 4
    assert stack.past_rank("model.layers.1.self_attn.v_proj") == 4 + 8 + 6
    assert stack.past_rows("model.layers.0.mlp.up_proj") is None
    assert len(AdapterStack()) == 0
    assert AdapterStack().past_rows(name) is None


def test_a_head_saved_whole_is_the_last_ones(tmp_path):
    options = {"modules_to_save": ["classifier", "score"]}
    folders = [trained("bert", tmp_path / str(t), t, **options) for t in range(2)]
    stack = AdapterStack.load(folders)
    last = load_file(folders[1] / "adapter_model.safetensors")
    head = last["base_model.model.classifier.weight"]
    base = stack.merge(make("bert"))
    assert torch.equal(base.classifier.weight, head)
    # the next task's own copy starts from it
    fresh = stack.attach(make("bert"), LoraConfig(target_modules=["query"], **options))
    own = fresh.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(own.weight, head)
    assert own.weight.requires_grad
    one = write_lora(stack, tmp_path / "one")
    assert one.vllm_max_lora_rank is None
    assert "vLLM cannot load it" in str(one)
    loaded = PeftModel.from_pretrained(make("bert"), one.folder)
    assert_same(logits(loaded), logits(summed("bert", folders)))
    assert_same(logits(base), logits(summed("bert", folders)))


def test_low_precision(tmp_path):
    """In bfloat16 the sum of all tasks is rounded once, not once a task."""
    folders = [trained("llama", tmp_path / str(t), t) for t in range(8)]
    stack = AdapterStack.load(folders)
    merged = stack.merge(make("llama").bfloat16())
    exact = stack.merge(make("llama"))
    name = "model.layers.0.self_attn.q_proj"
    start = make("llama").bfloat16().get_submodule(name).weight.float()
    change = exact.get_submodule(name).weight - make("llama").get_submodule(name).weight
    once = (start + change).bfloat16()
    assert merged.get_submodule(name).weight.dtype == torch.bfloat16
    different = merged.get_submodule(name).weight != once
    assert different.float().mean() < 0.01  # up to the order of float32 sums


def test_fresh_adapter_can_start_orthogonal(tmp_path):
    folders = [trained("llama", tmp_path / str(t), t) for t in range(2)]
    stack = AdapterStack.load(folders)
    starts = []
    for orthogonal in (False, True):
        base = make("llama")
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules=TARGETS["llama"])
        starts.append(stack.attach(base, config, orthogonal_start=orthogonal))
    plain, moved = (adapter_layers(m) for m in starts)
    for name in stack.modules:
        past = stack.past_rows(name)
        a, start = (m[name].lora_A["default"].weight.detach() for m in (moved, plain))
        assert (a @ past.T).abs().max() < 1e-5
        assert (start @ past.T).abs().max() > 1e-2
        torch.testing.assert_close(a.norm(dim=1), start.norm(dim=1))
    # without room it is left as drawn
    config = LoraConfig(r=30, target_modules=["q_proj"])
    stack.attach(make("llama"), config, orthogonal_start=True)


def test_a_model_takes_one_stack_once(tmp_path):
    stack = AdapterStack.load([trained("llama", tmp_path / "0", 0)])
    model = stack.merge(make("llama"))
    with pytest.raises(ModelError, match="already merged"):
        stack.merge(model)
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="has an adapter already"):
        stack.attach(get_peft_model(make("llama"), config), config)


# -- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True, "target_modules": ["query"]}, "uses DoRA"),
        ({"bias": "lora_only"}, "uses a trained bias"),
        ({"lora_bias": True}, "uses a bias in lora_B"),
        ({"target_modules": ["word_embeddings"]}, "no LoRA on a linear module"),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape")  # PEFT warns of its own bias
def test_adapters_that_are_no_plain_lora_are_refused(options, message, tmp_path):
    folder = trained("bert", tmp_path / "odd", 0, **options)
    with pytest.raises(ModelError, match=message):
        read_lora(folder)


def test_folders_that_are_no_adapter_are_refused(tmp_path):
    with pytest.raises(ModelError, match="holds no adapter"):
        read_lora(tmp_path)
    folder = trained("llama", tmp_path / "0", 0)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ModelError, match="uses the kind IA3"):
        read_lora(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="damaged or cut short"):
        read_lora(folder)
    key = "base_model.model.x.q_proj.lora_A.weight"
    save_file({key: torch.ones(4, 3)}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match='module "x.q_proj" has no two matrices'):
        read_lora(folder)


def test_adapters_and_models_that_do_not_fit_are_refused(tmp_path):
    llama = trained("llama", tmp_path / "0", 0, target_modules=["q_proj"])
    big = tmp_path / "2"
    trained("llama", big, 0, target_modules=["q_proj"])
    state = load_file(big / "adapter_model.safetensors")
    wide = {k: torch.ones(4, 48) if "lora_A" in k else v for k, v in state.items()}
    save_file(wide, big / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="is 32 x 48, that of an earlier adapter 32 x 32"):
        AdapterStack.load([llama, big])
    with pytest.raises(
        ModelError, match='changes "model.layers.0.self_attn.q_proj", which the model does'
    ):
        AdapterStack.load([llama]).merge(make("gpt2"))
    wide_model = make("llama")
    wide_model.model.layers[0].self_attn.q_proj = torch.nn.Linear(48, 32)
    with pytest.raises(ModelError, match="is 32 x 32, that of .* 32 x 48"):
        AdapterStack.load([llama]).merge(wide_model)
    head = trained("bert", tmp_path / "3", 0, modules_to_save=["classifier"])
    model = make("bert")
    model.classifier = torch.nn.Linear(32, 7)
    with pytest.raises(ModelError, match=r'saved "classifier.* of \(5,.*the model has \(7,'):
        AdapterStack.load([head]).merge(model)


def test_a_tied_weight_is_refused(tmp_path):
    stack = AdapterStack.load([trained("llama", tmp_path / "0", 0, target_modules=["lm_head"])])
    model = make("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ModelError, match='"lm_head" shares its weight'):
        stack.merge(model)


def test_export_refuses_before_it_writes(tmp_path):
    stack = AdapterStack.load([trained("llama", tmp_path / "0", 0)])
    for write in (write_lora, lambda *given: write_merged(*given, make("llama"))):
        with pytest.raises(ConfigError, match="no adapters"):
            write(AdapterStack(), tmp_path / "new")
        with pytest.raises(ConfigError, match="not an empty folder"):
            write(stack, tmp_path / "0")
    assert not (tmp_path / "new").exists()
