"""The export job: what it writes, what it refuses, and that it leaves nothing half done."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
import yaml
from conftest import byte_tokenizer, random_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from trueline import ConfigError, ModelError, load_model
from trueline.jobs.exporting import ExportConfig, export, find_adapters
from trueline.models.adapter import add_lora, steady_config
from trueline.train.adapters.stack import save_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama with its tokenizer."""
    path = tmp_path_factory.mktemp("base")
    random_model("llama").save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Two adapters on it, as folders."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["v_proj", "q_proj"], init_lora_weights=False)
        model = add_lora(load_model(base, packed_weights=False).model, config)
        found.append(str(save_adapter(model, tmp_path_factory.mktemp("task"))))
    return tuple(found)


def logits(lm):
    with torch.no_grad():
        return lm.model(torch.tensor([[5, 6, 7, 8]])).logits


def stacked(base, adapters):
    model = load_model(base, packed_weights=False)
    for folder in adapters:
        state = load_file(f"{folder}/{WEIGHTS}")
        for name in [k.removesuffix(".lora_A.weight") for k in state if ".lora_A." in k]:
            module = model.model.get_submodule(name.removeprefix("base_model.model."))
            # alpha 8, rank 4
            change = 2 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
            module.weight.data += change
    return logits(model)


def test_one_lora_and_a_merged_model_say_what_the_stack_says(base, adapters, tmp_path):
    said = []
    one = export(ExportConfig(adapters), tmp_path / "one", progress=lambda *s: said.append(s))
    whole = export(ExportConfig(adapters, form="merged", dtype="float32"), tmp_path / "whole")
    expected = stacked(base, adapters)
    for lm in (load_model(base, adapter=one.folder), load_model(whole.folder)):
        torch.testing.assert_close(logits(lm), expected, atol=1e-5, rtol=1e-5)
    assert (one.rank, one.tasks, one.adapters, one.tokenizer) == (8, 2, adapters, True)
    assert one.as_dict()["folder"] == str(tmp_path / "one")
    assert json.dumps(whole.as_dict())
    assert said[0] == ("reading the adapters", 0, 3)
    assert said[-1] == ("writing", 3, 3)
    for folder in (one.folder, whole.folder):
        assert (folder / "tokenizer.json").is_file()
        front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
        assert front["library_name"] == ("peft" if folder == one.folder else "transformers")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "whole"]


def test_two_exports_of_the_same_are_the_same_bytes(adapters, tmp_path):
    for name in ("a", "b"):
        export(ExportConfig(adapters), tmp_path / name, command="export")
    for path in (tmp_path / "a").iterdir():
        if path.name != "README.md":  # which names its folder
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_saved_adapters_list_their_modules_in_order(adapters):
    for folder in adapters:
        with open(f"{folder}/adapter_config.json") as file:
            assert json.load(file)["target_modules"] == ["q_proj", "v_proj"]


def test_names_are_written_in_order(tmp_path):
    config = {"target_modules": ["b", "a", "c"], "exclude_modules": ["z", "y"], "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    steady_config(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found == {"target_modules": ["a", "b", "c"], "exclude_modules": ["y", "z"], "r": 4}


def test_an_empty_folder_may_be_there(adapters, tmp_path):
    (tmp_path / "one").mkdir()
    export(ExportConfig(adapters), tmp_path / "one")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(ExportConfig(adapters), tmp_path / "one")


def test_a_link_out_of_the_folder_is_not_followed(adapters, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "one").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export(ExportConfig(adapters), tmp_path / "one")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_a_full_disk_leaves_nothing_and_names_the_folder(form, adapters, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left") as raised:
        export(ExportConfig(adapters, form=form), tmp_path / "one")
    assert raised.value.filename == str(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_under_safetensors_is_named_too(adapters, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: os error 28")

    monkeypatch.setattr("trueline.train.adapters.export.save_file", full)
    with pytest.raises(OSError, match="No space left") as raised:
        export(ExportConfig(adapters), tmp_path / "one")
    assert raised.value.filename == str(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_its_base_is_exported_without_a_tokenizer(adapters, tmp_path):
    folder = shutil.copytree(adapters[0], tmp_path / "task")
    config = json.loads((folder / "adapter_config.json").read_text())
    for name in (None, "no/such-model", str(tmp_path / "gone")):
        content = json.dumps(config | {"base_model_name_or_path": name})
        (folder / "adapter_config.json").write_text(content)
        done = export(ExportConfig((folder,)), tmp_path / f"one-{name is None}-{len(str(name))}")
        assert not done.tokenizer
        assert "no tokenizer" in str(done)
        with pytest.raises((ConfigError, ModelError)):
            export(ExportConfig((folder,), form="merged"), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda s: min(s.items())[1].fill_(torch.nan), "not finite"),
        (lambda s: s.update({k: v.new_ones(3, *v.shape[1:]) if "lora_A" in k else v
                             for k, v in s.items()}), "has rank 3"),
    ],
)  # fmt: skip
def test_broken_adapters_are_not_exported(adapters, tmp_path, edit, said):
    folder = shutil.copytree(adapters[0], tmp_path / "task")
    state = load_file(folder / WEIGHTS)
    edit(state)
    save_file(state, folder / WEIGHTS)
    with pytest.raises(ModelError, match=said):
        export(ExportConfig((folder,)), tmp_path / "one")
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"adapters": ()}, "no adapters"),
        ({"form": "onnx"}, "`form` must be"),
        ({"dtype": "float31"}, "Did you mean"),
        ({"dtype": "float32"}, "go with the form merged"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        ExportConfig(**{"adapters": ("a",), **given})


@pytest.mark.parametrize("content", ["", "[]", "null", '{"finished": true, "adapters": 3}',
                                     '{"finished": true, "adapters": ["gone"]}', "{}",
                                     '{"finished": true, "adapters": ["a"], "tasks": 3}',
                                     ])  # fmt: skip
def test_the_scores_of_a_stream_may_be_anything(content, tmp_path):
    (tmp_path / "R.json").write_text(content)
    with pytest.raises(ConfigError):
        find_adapters([str(tmp_path)])


def test_code_that_comes_with_the_base_is_not_run(base, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    own = shutil.copytree(base, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        export(ExportConfig(adapters, form="merged", model=str(own)), tmp_path / "one")
    assert not (tmp_path / "ran").exists()
