"""Source: which model a job works on, as settings, and what tells it from every other model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trueline.errors import ConfigError
from trueline.records.hashes import digest, model_folder, model_hash
from trueline.types import Progress, check_threads

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel


@dataclass(frozen=True)
class ModelConfig:
    """A model to load, and how.

    >>> ModelConfig("Qwen/Qwen3-0.6B", dtype="bfloat16").load()
    """

    name: str = "tiny"
    """A folder, a hub name, or "tiny", the bundled model."""
    adapter: str | None = None
    """Folder or hub name of a PEFT adapter."""
    adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """More of them by name, for the requests that name one."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, mps."""
    device_map: str | None = None
    """Spread over devices, e.g. "auto"; needs accelerate."""
    dtype: str = "auto"
    """auto, float32, bfloat16, float16."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Needs bitsandbytes."""
    chat_template: str | None = None
    """Jinja file to use as the chat template."""
    raw: bool = False
    """Send prompts as they are, for base models."""
    default_system: bool = True
    """Keep the system text that some templates put in where a chat has none, in every branch."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    threads: int | None = None
    """CPU threads; None is 1 for small models, else torch's choice."""
    packed_weights: bool = True
    """CPU: take the fastest measured product, with a second copy of the weights where that pays."""
    engine: Literal["torch", "vllm"] = "torch"
    """What decodes: torch or vllm."""
    engine_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of vLLM, by its own names."""
    speculate: str | None = None
    """Decode ahead: "lookup" (prompt lookup), or a smaller model of the same tokenizer."""

    def __post_init__(self) -> None:
        for field in ("name", "adapter", "chat_template"):
            value = getattr(self, field)
            if isinstance(value, Path):
                object.__setattr__(self, field, str(value))
            elif not isinstance(value, str) and (value is not None or field == "name"):
                raise ConfigError(f"`{field}` must be a path or a name, got {value!r}.")
        check_threads(self.threads)

    def load(self, progress: Progress | None = None) -> LanguageModel:
        """Load the model and set the number of threads; `progress` is told what is under way."""
        from trueline.models.device import set_threads  # heavy: settings are read without it
        from trueline.models.load import load_model

        own = {k: v for k, v in vars(self).items() if k not in ("name", "threads")}
        own |= {"packed_weights": None if self.packed_weights else False, "progress": progress}
        model = load_model(self.name, **own)
        set_threads(self.threads, model.model)
        return model

    def identity(self, model: LanguageModel) -> dict[str, Any]:
        """Return what decides the model's answers: names, hashes of the bytes, dtype, device."""
        from trueline.models.adapter import adapter_settings

        folders = model.adapter_folders
        named = {k: adapter_settings(name, folders.get(k)) for k, name in self.adapters.items()}
        return {
            "name": self.name,
            "revision": self.revision,
            "hash": model_hash(model, model.folder or model_folder(self.name)),
            "adapter": adapter_settings(self.adapter, folders.get("default")),
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "quantize": self.quantize,
            "raw": self.raw,
            "default_system": self.default_system,
            "packed_weights": self.packed_weights,
            "chat_template": digest(str(getattr(model.tokenizer, "chat_template", None))),
            **({"engine": self.engine} if self.engine != "torch" else {}),
        } | {k: v for k, v in {"adapters": named, "speculate": self.speculate}.items() if v}
