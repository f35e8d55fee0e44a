"""Loading: folders, adapters, dtypes, and clear refusals of what cannot be used."""

from __future__ import annotations

import pytest
import torch
from conftest import NO_SYSTEM, byte_tokenizer, random_model
from transformers import AutoConfig, AutoModelForCausalLM

from trueline import ConfigError, LanguageModel, ModelError, generate, load_model
from trueline.models.prompts import encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved random Llama in float16 with its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    random_model("llama").half().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def test_a_folder_loads_and_generates(folder):
    lm = load_model(folder)
    assert lm.max_positions == 512
    assert lm.eos_token_ids == {1}
    assert len(generate(lm, "Hi")[0].token_ids) > 0


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_dtype(folder, dtype, expected):
    assert load_model(folder, dtype=dtype, device="cpu").model.dtype == expected


def test_packed_weights_can_be_switched_off(folder, monkeypatch):
    from trueline.models import packed as products

    monkeypatch.setattr(products, "MIN_WEIGHTS", {torch.float32: 0, torch.bfloat16: 0})
    packed, own = (load_model(folder, packed_weights=on).model for on in (None, False))
    assert "forward" in vars(packed.lm_head)
    assert "forward" not in vars(own.lm_head)


def test_a_chat_template_file_replaces_the_models(folder, tmp_path):
    (tmp_path / "t.jinja").write_text(NO_SYSTEM)
    lm = load_model(folder, chat_template=tmp_path / "t.jinja")
    ids = encode(lm, [{"role": "system", "content": "A"}, {"role": "user", "content": "B"}])
    assert lm.tokenizer.decode(ids).startswith("<|user|>A\n\nB")


def test_an_adapter_changes_the_model(folder, tmp_path):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(
        load_model(folder, packed_weights=False).model,
        peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "adapter")
    lm = load_model(folder, adapter=tmp_path / "adapter")
    assert lm.has_adapter
    assert generate(lm, "Hi")[0].token_ids != generate(load_model(folder), "Hi")[0].token_ids
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load_model(folder, adapter=tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "error", "fragment"),
    [
        ({"dtype": "float23"}, ConfigError, 'Unknown dtype "float23"'),
        ({"device": "qpu"}, ConfigError, 'Unknown device "qpu"'),
        ({"device": "cuda"}, ConfigError, "not available"),
        ({"quantize": "2bit"}, ConfigError, "`quantize` must be"),
        ({"device": "cpu", "device_map": "auto"}, ConfigError, "not both"),
        ({"chat_template": "no/such.jinja"}, ConfigError, "Cannot read chat template"),
    ],
)
def test_bad_options(folder, options, error, fragment):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("the message without CUDA: a machine without it")
    with pytest.raises(error, match=fragment):
        load_model(folder, **options)


def test_a_missing_extra_names_its_install_command(folder, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a)
    )
    with pytest.raises(ModelError, match=r"pip install 'trueline\[quantize\]'"):
        load_model(folder, quantize="4bit")


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="No model folder"):
        load_model(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="Cannot load"):
        load_model(tmp_path)


def config_of(kind, **options):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 261, "pad_token_id": 0}
    return AutoConfig.for_model(kind, **(small | options))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mamba", {"state_size": 4}),
        ("recurrent_gemma", {"num_attention_heads": 4, "lru_width": 32, "head_dim": 8}),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "intermediate_size": 64}),
        ("llama4_text", {"num_attention_heads": 4, "intermediate_size": 64, "head_dim": 8}),
    ],
)
def test_caches_that_branches_would_corrupt_are_refused_by_name(kind, options):
    model = AutoModelForCausalLM.from_config(config_of(kind, **options))
    with pytest.raises(ModelError, match=kind):
        LanguageModel(model, byte_tokenizer())
