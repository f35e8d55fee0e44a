"""Which model a job works on: settings in, a loaded model and its identity out."""

from __future__ import annotations

import pytest
import torch

import trueline.models.load
from trueline import ConfigError
from trueline.models.source import ModelConfig


def test_every_setting_reaches_the_loader(monkeypatch, llama, tmp_path):
    seen = {}
    monkeypatch.setattr(trueline.models.load, "load_model", lambda n, **o: seen.update(o) or llama)
    threads = torch.get_num_threads()
    config = ModelConfig(tmp_path, adapter=tmp_path, raw=True, threads=2, packed_weights=False)
    try:
        assert config.load() is llama
        assert torch.get_num_threads() == 2
        ModelConfig(tmp_path).load()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    ModelConfig(tmp_path, adapter=tmp_path, raw=True, packed_weights=False).load()
    assert (seen["adapter"], seen["raw"], seen["packed_weights"]) == (str(tmp_path), True, False)
    passed = set(seen) - {"progress"}
    assert passed | {"name", "threads"} == set(ModelConfig.__dataclass_fields__)


def test_identity_follows_bytes_and_template(llama, tmp_path):
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    config = ModelConfig(tmp_path, adapter=tmp_path)
    first = config.identity(llama)
    (tmp_path / "adapter_config.json").write_text("{ }")
    second = config.identity(llama)
    changed = {k for k in first if first[k] != second[k]}
    assert changed == {"hash", "adapter"}
    assert ModelConfig("not-a-folder").identity(llama)["adapter"] is None


@pytest.mark.parametrize("wrong", [{"name": 5}, {"threads": 0}, {"adapter": 3}])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ModelConfig(**wrong)
