"""What is trained on what: a base model, prompts, an adapter or all weights, and the defaults.

`defaults` and `FIXED` are the one place of the settings that nobody gave.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError, DataError
from trueline.records.lines import parse, read_content
from trueline.records.prompt_rows import BadRow, check_row

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

SMALL = 100_000_000
"""Models with fewer parameters run fastest on one thread, and want higher learning rates."""


@dataclass
class Adapter:
    """The LoRA that is trained; see `peft.LoraConfig`."""

    rank: int = 16
    """Directions of each weight's change."""
    alpha: float | None = None
    """Scale, divided by the rank; none is twice the rank."""
    dropout: float = 0.0
    """Share of inputs dropped; above 0 samples and loss see different policies."""
    target_modules: list[str] | str = "all-linear"
    """Names of the modules that get one."""


@dataclass
class Recipe:
    """What is trained on what; everything else belongs to the trainer."""

    model: str = "tiny"
    """Folder, hub name, or "tiny", the bundled one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, mps."""
    dtype: str = "auto"
    """Of the weights; auto is the checkpoint's own, with float32 for float16 and for --full."""
    quantize: str | None = None
    """4bit or 8bit, for an adapter on a quantized model; needs bitsandbytes."""
    chat_template: str | None = None
    """Jinja file to use as the chat template."""
    threads: int | None = None
    """CPU threads; none is 1 for small models, else torch's choice."""
    prompts: str | None = None
    """JSONL file of prompts."""
    limit: int | None = None
    """At most so many of its rows."""
    evaluate: str | None = None
    """JSONL file of held-out prompts."""
    judge: str | None = None
    """Of the held-out responses, instead of the rows' patterns: keywords, local or model."""
    judge_model: str | None = None
    """Folder, hub name, or name at the endpoint, of a model as the judge."""
    judge_url: str | None = None
    """Endpoint of judge "model"."""
    full: bool = False
    """Train all weights and no adapter."""
    merge: bool = False
    """Write the model with the adapter merged into it."""
    lora: Adapter = field(default_factory=Adapter)


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
"""Settings of this command for every model, where nobody gave others."""


def read_rows(path: Any, limit: Any = None) -> tuple[list[dict[str, Any]], list[BadRow], str]:
    """Return the rows of a file of prompts as a trainer takes them, the bad ones, and its SHA-256.

    A row's `principle` may be "": there the model is to stay as it is.
    """
    if not isinstance(path, str):
        raise ConfigError('`--prompts FILE` is missing: JSONL rows with a "prompt".')
    rows: list[dict[str, Any]] = []
    bad: list[BadRow] = []
    content = read_content(path)
    for line, raw in content.lines:
        if isinstance(limit, int) and len(rows) + len(bad) >= limit:
            break
        row: Any = raw.decode("utf-8", errors="replace").rstrip("\r\n")
        try:
            row = parse(raw)
            keep = row.get("principle") == ""
            checked = check_row(
                {k: v for k, v in row.items() if k != "principle" or not keep}, line
            )
            principle = "" if keep else checked.principle
            rows.append({"prompt": checked.messages, "principle": principle, "line": line})
        except DataError as error:
            bad.append(BadRow(line, str(error), row))
    return rows, bad, content.sha256


def device_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the trainer's settings for the device that was asked for."""
    if recipe.device not in ("auto", "cpu", "cuda", "mps"):
        raise ConfigError(
            f'`device` must be auto, cpu, cuda or mps, got "{recipe.device}". Choose among several '
            "graphics cards by CUDA_VISIBLE_DEVICES."
        )
    import torch

    if recipe.device == "auto" and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return {}
    # Said outright, since several processes without a graphics card join only then.
    on_cpu = {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    return on_cpu if recipe.device in ("auto", "cpu") else {}


def load(recipe: Recipe, values: dict[str, Any]) -> LanguageModel:
    """Load the model on the trainer's device and set the number of threads."""
    import torch

    from trueline.models.device import set_threads
    from trueline.models.load import load_model

    device = recipe.device
    if "LOCAL_RANK" in os.environ and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    full = recipe.full and recipe.dtype == "auto"
    model = load_model(
        recipe.model,
        dtype="float32" if full else recipe.dtype,
        device=device,
        quantize=recipe.quantize,  # type: ignore[arg-type]
        chat_template=recipe.chat_template,
        raw=bool(values.get("raw")),
        revision=recipe.revision,
        trust_remote_code=bool(values.get("trust_remote_code")),
        packed_weights=False,
    )
    if recipe.dtype == "auto" and model.model.dtype == torch.float16:
        model.model.float()
    set_threads(recipe.threads, model.model)
    return model


def lora_config(adapter: Adapter) -> Any:
    """Return PEFT's configuration of the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.rank,
        lora_alpha=2 * adapter.rank if adapter.alpha is None else adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        task_type="CAUSAL_LM",
    )


def base_settings(recipe: Recipe, model: LanguageModel) -> dict[str, Any]:
    """Return what tells the model that is trained, and the versions that train it."""
    from importlib.metadata import version

    from trueline.models.source import ModelConfig
    from trueline.records.hashes import versions

    config = ModelConfig(recipe.model, revision=recipe.revision)
    return {
        "base": {**config.identity(model), "processes": int(os.environ.get("WORLD_SIZE", 1))},
        "versions": versions() | {name: version(name) for name in ("peft",)},
    }
