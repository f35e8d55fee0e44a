"""What is trained on what: an adapter, the device, and the defaults.

`defaults` and `FIXED` are the one place of the settings that nobody gave.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from trueline.errors import ConfigError
from trueline.models.device import SMALL
from trueline.models.source import ModelConfig
from trueline.records.hashes import versions

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel


@dataclass(frozen=True)
class LoraSettings:
    """The LoRA that is trained; see `peft.LoraConfig`."""

    rank: int = 16
    """Directions of each weight's change."""
    alpha: float | None = None
    """Scale, divided by the rank; none is twice the rank."""
    dropout: float = 0.0
    """Share of inputs dropped; above 0 samples and loss see different policies."""
    target_modules: list[str] | str = "all-linear"
    """Names of the modules that get one."""

    def peft(self) -> Any:
        """Return PEFT's configuration."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type="CAUSAL_LM",
        )


def defaults(parameters: int, full: bool) -> dict[str, Any]:
    """Return the settings that depend on the model's size, where nobody gave them.

    Learning rates for AdamW, constant after 5 warm-up steps. Below 100 million parameters they are
    far higher than large models bear.

        parameters        adapter   all weights
        below 100M        2e-3      2e-4
        100M and above    5e-5      2e-6
    """
    small = parameters < SMALL
    rate = (2e-4 if full else 2e-3) if small else (2e-6 if full else 5e-5)
    return {"learning_rate": rate, "max_completion_length": 64 if small else 256}


FIXED = {
    "per_device_train_batch_size": 16,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
    "seed": 0,
}
"""Settings of a distillation for every model, where nobody gave others."""


def check_device(device: str) -> None:
    """Raise `ConfigError` for a device that a trainer does not choose."""
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(
            f'`device` must be auto, cpu, cuda or mps, got "{device}". Choose among several '
            "graphics cards by CUDA_VISIBLE_DEVICES."
        )


def device_settings(device: str) -> dict[str, Any]:
    """Return the trainer's settings for the device that was asked for."""
    if device == "auto" and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return {}
    # Said outright, since several processes without a graphics card join only then.
    on_cpu = {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    return on_cpu if device in ("auto", "cpu") else {}


def local_device(device: str) -> str:
    """Return the device of this process, of several that train together."""
    if "LOCAL_RANK" in os.environ and device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def base_settings(source: ModelConfig, model: LanguageModel) -> dict[str, Any]:
    """Return what tells the model that is trained, and the versions that train it."""
    return {
        "base": {**source.identity(model), "processes": int(os.environ.get("WORLD_SIZE", 1))},
        "versions": versions() | {"peft": version("peft")},
    }
