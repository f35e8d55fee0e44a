"""Checkpoints and adapters that are not whole, or not what they say: one line that names it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, random_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification

from trueline import ConfigError, LanguageModel, ModelError, generate, load_model
from trueline.models import hub
from trueline.models.adapter import adapter_settings, add_lora, check_targets
from trueline.models.checkpoint import load_as_saved, read_config
from trueline.models.places import find_model
from trueline.models.source import ModelConfig

WEIGHTS, LORA = "model.safetensors", "adapter_model.safetensors"
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A random Llama with its tokenizer."""
    path = tmp_path_factory.mktemp("whole")
    random_model("llama").save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tuned(whole, tmp_path_factory):
    """An adapter on it whose numbers are not zero."""
    path = tmp_path_factory.mktemp("tuned")
    model = load_model(whole, packed_weights=False).model
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(path)
    return path


@pytest.fixture
def model(whole, tmp_path):
    """A copy of the model to be broken."""
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def adapter(tuned, tmp_path):
    """A copy of the adapter to be broken."""
    return shutil.copytree(tuned, tmp_path / "adapter")


def change(path, **values):
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tensors(path, edit):
    """Edit the tensors of a file in place."""
    state = load_file(path)
    edit(state)
    save_file(state, path, {"format": "pt"})


def missing(state):
    for name in [k for k in state if "layers.1" in k]:
        del state[name]


EDITS = {
    "missing": (missing, r'lacks "model\.layers\.1.* and 6 more'),
    "left over": (lambda s: s.update(extra=torch.ones(2)), 'has no use for "extra"'),
    "misshapen": (
        lambda s: s.update({LAYER: torch.ones(3, 32)}),
        rf'does not fit "{LAYER}, 3 x 32 in the file and 64 x 32 in the model"',
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_weights_that_are_not_the_models_are_named(model, what):
    edit, said = EDITS[what]
    tensors(model / WEIGHTS, edit)
    with pytest.raises(ModelError, match=said):
        load_model(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named(model, value, dtype):
    def spoil(state):
        state[LAYER][3, 5] = value

    tensors(model / WEIGHTS, spoil)
    for load in (load_model, lambda m, dtype: load_as_saved(find_model(m), dtype=dtype)):
        with pytest.raises(ModelError, match=rf'not finite .* in "{LAYER}"'):
            load(model, dtype=dtype)


def test_more_layers_than_the_files_hold(model):
    change(model / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r'lacks "model\.layers\.2'):
        load_model(model)
    change(model / "config.json", num_hidden_layers=10**9)
    with pytest.raises(ModelError, match="names 1000000000 layers"):
        load_model(model)
    change(model / "config.json", num_hidden_layers=2, vocab_size=10**12)
    with pytest.raises(ModelError, match="`vocab_size` 1000000000000"):
        load_model(model)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "qwen3"])
def test_tied_weights_and_buffers_are_not_missing(kind, tmp_path):
    made = random_model(kind)
    made.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    tied = made.config.tie_word_embeddings
    assert tied == ("lm_head.weight" not in load_file(tmp_path / WEIGHTS))
    if kind == "gpt2":  # buffers that old checkpoints hold
        tensors(tmp_path / WEIGHTS, lambda s: s.update({
            "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}))  # fmt: skip
    elif kind == "llama":
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        tensors(tmp_path / WEIGHTS, lambda s: s.update({name: torch.ones(4)}))
    own = LanguageModel(made, byte_tokenizer())
    assert generate(load_model(tmp_path), "Hi")[0].token_ids == generate(own, "Hi")[0].token_ids


BROKEN = {
    "empty": lambda p: (p / WEIGHTS).write_bytes(b""),
    "cut short": lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:-100]),
    "head cut": lambda p: (p / WEIGHTS).write_bytes((p / WEIGHTS).read_bytes()[:50]),
    "noise": lambda p: (p / WEIGHTS).write_bytes(b"\xff" * 1000),
    "none": lambda p: (p / WEIGHTS).unlink(),
    "config list": lambda p: (p / "config.json").write_text("[1]"),
    "config null": lambda p: (p / "config.json").write_text("null"),
    "config empty": lambda p: (p / "config.json").write_text(""),
    "config latin": lambda p: (p / "config.json").write_bytes(b'{"a": "\xe9"}'),
    "config deep": lambda p: (p / "config.json").write_text("[" * 100_000),
    "config kind": lambda p: change(p / "config.json", model_type="nothing"),
    "config kind list": lambda p: change(p / "config.json", model_type=["llama"]),
    "heads 0": lambda p: change(p / "config.json", num_attention_heads=0),
    "heads 3": lambda p: change(p / "config.json", num_attention_heads=3),
    "key heads 3": lambda p: change(p / "config.json", num_key_value_heads=3),
    "hidden text": lambda p: change(p / "config.json", hidden_size="32"),
    "hidden list": lambda p: change(p / "config.json", hidden_size=[32]),
    "hidden null": lambda p: change(p / "config.json", hidden_size=None),
    "vocabulary -1": lambda p: change(p / "config.json", vocab_size=-1),
    "vocabulary 1.5": lambda p: change(p / "config.json", vocab_size=1.5),
    "layers 0": lambda p: change(p / "config.json", num_hidden_layers=0),
    "layer types": lambda p: change(p / "config.json", layer_types=["x"]),
    "activation": lambda p: change(p / "config.json", hidden_act="nothing"),
    "dtype": lambda p: change(p / "config.json", dtype="float77"),
    "rope": lambda p: change(p / "config.json", rope_parameters=3, rope_scaling=[]),
    "index": lambda p: (p / f"{WEIGHTS}.index.json").write_text('{"weight_map": 3}'),
    "index to nothing": lambda p: (p / f"{WEIGHTS}.index.json").write_text(
        '{"weight_map": {"a": "b.safetensors"}}'
    ),
    "tokenizer list": lambda p: (p / "tokenizer.json").write_text("[]"),
    "tokenizer empty": lambda p: (p / "tokenizer.json").write_text(""),
    "tokenizer kind": lambda p: (p / "tokenizer.json").write_text('{"model": {"type": "x"}}'),
    "tokenizer config": lambda p: (p / "tokenizer_config.json").write_text("[]"),
    "no tokenizer": lambda p: [f.unlink() for f in p.glob("tokenizer*")],
    "generation config": lambda p: (p / "generation_config.json").write_text("[]"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_one_line(model, what):
    BROKEN[what](model)
    with pytest.raises(ModelError) as refused:
        load_model(model)
    assert str(model) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_pickled_weights_are_not_opened(model):
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, a pickle.*convert it once"):
        load_model(model)


def test_code_of_a_checkpoint_runs_only_where_asked_for(model, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    (model / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for kind, name in (("model_type", "own"), ("architectures", ["OwnModel"])):
        change(model / "config.json", **{kind: name}, auto_map={"AutoConfig": "own.OwnConfig"})
        for load in (load_model, lambda m: read_config(find_model(m)),
                     lambda m: load_as_saved(find_model(m))):  # fmt: skip
            if kind == "model_type":
                with pytest.raises(ModelError, match=r"code of its own.*--trust-remote-code"):
                    load(model)
        assert not mark.exists()


def test_a_classifiers_head_alone_may_be_new(tmp_path):
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 48}  # fmt: skip
    BertForSequenceClassification(BertConfig(**shape, num_labels=5)).save_pretrained(tmp_path)
    place = find_model(tmp_path)
    assert not load_as_saved(place).head_is_new
    assert not load_as_saved(place, head={"num_labels": 5}).head_is_new
    new = load_as_saved(place, head={"num_labels": 3})
    assert new.head_is_new
    assert new.model.classifier.out_features == 3
    assert new.tokenizer is None
    tensors(tmp_path / WEIGHTS, lambda s: s.pop("bert.pooler.dense.weight"))
    with pytest.raises(ModelError, match=r'lacks "bert\.pooler\.dense\.weight"'):
        load_as_saved(place, head={"num_labels": 3})


ADAPTERS = {
    "list": (lambda p: (p / "adapter_config.json").write_text("[]"), "must be a JSON object"),
    "null": (lambda p: (p / "adapter_config.json").write_text("null"), "got null"),
    "kind": (lambda p: change(p / "adapter_config.json", peft_type="LORE"), 'Did you mean "LORA"'),
    "no kind": (lambda p: change(p / "adapter_config.json", peft_type=None), "unknown kind None"),
    "another kind": (lambda p: change(p / "adapter_config.json", peft_type="IA3"), "adapter"),
    "rank 3": (lambda p: change(p / "adapter_config.json", r=3), "has rank 4, .* says 3"),
    "rank 0": (lambda p: change(p / "adapter_config.json", r=0), "`r` must be"),
    "rank text": (lambda p: change(p / "adapter_config.json", r="4"), "`r` must be"),
    "rank pattern": (
        lambda p: change(p / "adapter_config.json", rank_pattern={"q_proj": 2}),
        "has rank 4, .* says 2",
    ),
    "alpha": (lambda p: change(p / "adapter_config.json", lora_alpha=None), "`lora_alpha` must"),
    "targets": (lambda p: change(p / "adapter_config.json", target_modules=3), "target_modules"),
    "other targets": (
        lambda p: change(p / "adapter_config.json", target_modules=["nowhere"]),
        "nowhere",
    ),
    "more targets": (
        lambda p: change(p / "adapter_config.json", target_modules=["q_proj", "v_proj", "o_proj"]),
        'lacks "base_model',
    ),
    "fewer targets": (
        lambda p: change(p / "adapter_config.json", target_modules=["q_proj"]),
        "has no place in the model for",
    ),
    "part": (
        lambda p: tensors(p / LORA, lambda s: s.pop(sorted(s)[0])),
        'lacks "base_model',
    ),
    "foreign": (
        lambda p: tensors(
            p / LORA,
            lambda s: s.update(
                {"base_model.model.transformer.h.0.c_attn.lora_A.weight": torch.ones(4, 8)}
            ),
        ),
        "has no place in the model for",
    ),
    "nan": (
        lambda p: tensors(p / LORA, lambda s: min(s.items())[1].fill_(torch.nan)),
        "not finite",
    ),
    "infinity": (
        lambda p: tensors(p / LORA, lambda s: min(s.items())[1].fill_(torch.inf)),
        "not finite",
    ),
    "empty": (lambda p: (p / LORA).write_bytes(b""), "damaged or cut short"),
    "cut short": (
        lambda p: (p / LORA).write_bytes((p / LORA).read_bytes()[:-9]),
        "damaged or cut short",
    ),
    "no weights": (lambda p: (p / LORA).unlink(), "and no weights"),
    "pickled": (
        lambda p: (p / LORA).rename(p / "adapter_model.bin"),
        "a pickle",
    ),
}


@pytest.mark.parametrize("what", ADAPTERS)
def test_an_adapter_that_does_not_fit_is_named(whole, adapter, what):
    edit, said = ADAPTERS[what]
    edit(adapter)
    with pytest.raises(ModelError, match=said) as refused:
        load_model(whole, adapter=adapter)
    assert "\n" not in str(refused.value)
    assert "repo" not in str(refused.value)


def test_an_adapter_of_another_model_is_refused(adapter, tmp_path):
    random_model("gpt2").save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="not found in the base model"):
        load_model(tmp_path / "gpt2", adapter=adapter)


def test_loading_an_adapter_says_nothing(whole, tuned, recwarn, capsys):
    load_model(whole, adapter=tuned)
    assert [str(w.message) for w in recwarn] == []
    assert capsys.readouterr() == ("", "")


def test_an_adapter_on_the_hub_is_told_by_the_bytes_that_were_loaded(whole, adapter, hub_cache):
    snapshot = hub_cache("me/tuned", adapter)
    config = ModelConfig(str(whole), adapter="me/tuned")
    loaded = config.load()
    assert loaded.has_adapter
    assert loaded.adapter_folders == {"default": snapshot}
    found = config.identity(loaded)["adapter"]
    assert found == adapter_settings("me/tuned", adapter)
    tensors(adapter / LORA, lambda s: min(s.items())[1].fill_(1.0))
    hub_cache("me/tuned", adapter, "1" * 40)  # the name stands for other bytes by now
    assert config.identity(loaded)["adapter"] == found
    assert config.identity(config.load())["adapter"] != found


def test_pickled_weights_on_the_hub_are_not_opened(whole, model, hub_cache):
    hub_cache("me/whole", whole)
    assert load_model("me/whole").model.config.model_type == "llama"
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    hub_cache("me/pickled", model)
    with pytest.raises(ModelError, match="safetensors"):
        load_model("me/pickled")


def test_the_folder_of_an_unfinished_run_names_its_last_checkpoint(whole, tuned, tmp_path):
    for step in (5, 10):
        shutil.copytree(tuned, tmp_path / f"run/checkpoints/checkpoint-{step}")
    with pytest.raises(ModelError, match=r'not finished.*"[^"]*run/checkpoints/checkpoint-10"'):
        load_model(whole, adapter=tmp_path / "run")
    assert load_model(whole, adapter=tmp_path / "run/checkpoints/checkpoint-10").has_adapter


def test_a_stack_or_a_model_as_adapter_says_what_it_is(whole, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "run/stages/00/adapter")
    with pytest.raises(ModelError, match="trueline export --adapters"):
        load_model(whole, adapter=tmp_path / "run")
    with pytest.raises(ModelError, match="is a model, not an adapter"):
        load_model(whole, adapter=whole)


def test_a_fresh_adapter_needs_modules_and_a_rank_that_fits():
    made = random_model("llama")
    with pytest.raises(ConfigError, match=r'`target_modules` "nowhere".*q_proj'):
        add_lora(made, LoraConfig(r=4, target_modules=["nowhere"]))
    with pytest.raises(ConfigError, match="rank must be from 1 to 261"):
        add_lora(made, LoraConfig(r=999_999_999, target_modules=["q_proj"]))


@pytest.mark.parametrize("targets", [["q_proj", "nowhere"], "nowhere", ["proj"]])
def test_a_target_that_no_module_has_is_named(targets):
    check_targets(made := random_model("llama"), ["q_proj", "mlp.up_proj"])
    check_targets(made, r".*\.(q|v)_proj")
    with pytest.raises(ConfigError, match=r'no module "(nowhere|proj)"'):
        check_targets(made, targets)
    with pytest.raises(ConfigError, match="is no pattern"):
        check_targets(made, "(")


@pytest.mark.parametrize("name", ["meta", "xpu", "vulkan", "hpu", "cuda:99", "cpu:x", ""])
def test_devices_that_nothing_runs_on(whole, name):
    with pytest.raises(ConfigError, match="Unknown device|not available"):
        load_model(whole, device=name)


@pytest.mark.parametrize("name", ["a b", "a/b/../c", "x" * 200, "..", "-x", "a\0b", "no--such"])
def test_names_that_no_hub_has(name):
    with pytest.raises((ConfigError, ModelError)):
        load_model(name)


def test_a_hub_that_does_not_answer_costs_a_moment_once(monkeypatch):
    asked = []

    def head(*_, **options):
        asked.append(options["timeout"])
        raise OSError("no route")

    monkeypatch.setattr("httpx.head", head)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.reachable.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(ModelError, match="Cannot load"):
                load_model("no/such-model")
            with pytest.raises(ModelError, match="cannot be reached"):
                load_model("tiny", adapter="no/such-adapter")
    finally:
        hub.reachable.cache_clear()
    assert asked == [hub.PATIENCE]


def test_something_is_said_while_a_model_loads(whole):
    said = []
    load_model(whole, progress=lambda *step: said.append(step))
    assert said == [(f"loading {whole}", 0, 1), (f"loading {whole}", 1, 1)]
