"""The adapters of T tasks as one plain LoRA, or merged into the weights.

    write_lora(AdapterStack.load(folders), "run/one")               one LoRA of rank T x r
    write_merged(AdapterStack.load(folders), "run/model", base)     a model's folder

Both are exact: what PEFT, transformers or vLLM load is the stacked model. One LoRA has the rows of
every a above one another and the columns of every b side by side, so that b a is the sum of all.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trueline.errors import ConfigError
from trueline.models.adapter import CONFIG, PREFIX, VLLM_RANKS, WEIGHTS, check_finite
from trueline.models.checkpoint import HEADS, quiet
from trueline.records.disk import saving
from trueline.train.adapters.saved import LowRank
from trueline.train.adapters.stack import AdapterStack


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    folder: Path
    form: str
    tasks: int
    rank: int | None = None
    """Of the one LoRA; None for merged weights."""
    vllm_max_lora_rank: int | None = None
    """The --max-lora-rank that vLLM needs; None if it takes no rank so high, or saved modules."""

    def __str__(self) -> str:
        tasks = f"{self.tasks} task{'' if self.tasks == 1 else 's'}"
        if self.form == "merged":
            return f"{self.folder}: {tasks} merged into the weights"
        text = f"{self.folder}: {tasks} as one LoRA of rank {self.rank}; "
        if self.vllm_max_lora_rank is None:
            return text + "vLLM cannot load it (rank above 512, or modules saved whole)"
        return text + f"vLLM: --max-lora-rank {self.vllm_max_lora_rank}"


def write_lora(stack: AdapterStack, folder: str | Path) -> Exported:
    """Write T adapters as one plain LoRA of rank T x r in PEFT's format.

    Module ranks that differ are filled up with zeros, since not every loader knows rank and alpha
    patterns. Raises `ConfigError` for an empty stack or a folder with files in it, `ModelError`
    where the sum is too large for the adapters' dtype.
    """
    folder = new_folder(folder)
    rank, alpha, state = _one_lora(stack)
    check_finite(folder, state)
    config = _config(stack, rank, alpha)
    folder.mkdir(parents=True, exist_ok=True)
    with saving(folder):
        save_file(state, folder / WEIGHTS, {"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    fits = [r for r in VLLM_RANKS if r >= rank and not stack.saved]
    return Exported(folder, "lora", len(stack), rank, fits[0] if fits else None)


def write_merged(stack: AdapterStack, folder: str | Path, model: Any) -> Exported:
    """Write a model with T adapters merged into its weights; the model itself is changed.

    Raises `ConfigError` for an empty stack or a folder with files in it, `ModelError` where the
    base does not fit.
    """
    folder = new_folder(folder)
    if not len(stack):
        raise ConfigError("There are no adapters to export. Give at least one.")
    stack.merge(model)
    with quiet(), saving(folder):
        model.save_pretrained(folder)
    return Exported(folder, "merged", len(stack))


def new_folder(folder: str | Path) -> Path:
    """Return the path of a folder to be written; raises `ConfigError` if anything is in it."""
    folder = Path(folder)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ConfigError(f'"{folder}" exists and is not an empty folder. Give a new one.')
    return folder


def _one_lora(stack: AdapterStack) -> tuple[int, int, dict[str, Tensor]]:
    """Return rank, alpha and tensors of the sum of all adapters as one LoRA."""
    if not len(stack):
        raise ConfigError("There are no adapters to export. Give at least one.")
    rank = max(sum(len(p.a) for p in stack.of(name)) for name in stack.modules)
    scalings = {p.scaling for name in stack.modules for p in stack.of(name)}
    common = scalings.pop() if len(scalings) == 1 else 1.0
    alpha = common * rank
    # One scaling for all keeps every number as trained; otherwise it goes into b, alpha = rank.
    if abs(alpha - round(alpha)) > 1e-9 * alpha:
        common, alpha = 1.0, float(rank)
    state = {}
    for name in stack.modules:
        parts = stack.of(name)
        a = torch.cat([p.a for p in parts])
        b = torch.cat([_scaled(p, common) for p in parts], dim=1)
        fill = rank - len(a)
        state[f"{PREFIX}{name}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, fill))
        state[f"{PREFIX}{name}.lora_B.weight"] = torch.nn.functional.pad(b, (0, fill))
    state |= {PREFIX + name: tensor for name, tensor in stack.saved.items()}
    return rank, round(alpha), {k: v.contiguous() for k, v in state.items()}


def _config(stack: AdapterStack, rank: int, alpha: int) -> dict[str, Any]:
    """Return PEFT's configuration of the one LoRA."""
    last = stack.adapters[-1].config
    kept = ("task_type", "base_model_name_or_path", "revision", "fan_in_fan_out", "peft_version")
    config = {key: last[key] for key in kept if key in last} | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _targets(stack),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "modules_to_save": _saved_modules(stack),
    }
    # PEFT's classes for one task load the adapter by this word. That for classifiers would save
    # the head whole, which the stack decides itself.
    owner = (last.get("auto_mapping") or {}).get("base_model_class") or ""
    for end, task in (("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"),
                      ("ForConditionalGeneration", "SEQ_2_SEQ_LM")):  # fmt: skip
        if owner.endswith(end) and not config.get("task_type"):
            config["task_type"] = task
    return config


def _scaled(part: LowRank, common: float) -> Tensor:
    """Return b with what its scaling differs from the common one, without losing precision."""
    return part.b if part.scaling == common else part.b.float() * (part.scaling / common)


def _targets(stack: AdapterStack) -> list[str]:
    """Return `target_modules`: the adapters' own words where they mean the same, or full names."""
    limits = ("exclude_modules", "layers_to_transform", "layers_pattern")
    configs = [a.config for a in stack.adapters]
    if any(c.get(limit) for c in configs for limit in limits) or any(
        not isinstance(c.get("target_modules"), list) for c in configs
    ):
        return sorted(stack.modules)
    return sorted({target for c in configs for target in c["target_modules"]})


def _saved_modules(stack: AdapterStack) -> list[str] | None:
    """Return the words for modules saved whole that match one which is there."""
    words = {w for a in stack.adapters for w in a.config.get("modules_to_save") or ()}
    owners = {name.rpartition(".")[0] for name in stack.saved}
    used = {w for w in words for o in owners if f".{o}.".find(f".{w}.") >= 0}
    return sorted(used) or None


def outputs_of(stack: AdapterStack) -> int | None:
    """Return the outputs of the classifier's head that the adapters saved; None without one."""
    for end in (".out_proj.weight", ".weight"):
        for name, tensor in stack.saved.items():
            if name.split(".")[0] in HEADS and name.endswith(end):
                return len(tensor)
    return None
