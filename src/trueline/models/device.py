"""Devices, dtypes and threads: decided here only."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

from trueline.errors import ConfigError, suggestion
from trueline.types import check_threads

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = 100_000_000
"""Models with fewer parameters run fastest on one thread."""


def check_dtype(dtype: str) -> None:
    """Raise `ConfigError` unless this is "auto" or a name in `DTYPES`."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f'Unknown dtype "{dtype}".{suggestion(str(dtype), ["auto", *DTYPES])}')


def find_device(device: str) -> torch.device:
    """Return the device of this name; "auto" is CUDA, then MPS, then the CPU.

    Raises `ConfigError` for one that this machine lacks, or that no model was tried on.
    """
    available: dict[str, Any] = {
        "cpu": lambda: True,
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]()))
    try:
        target = torch.device(device) if isinstance(device, str) else None
    except RuntimeError:
        target = None
    if target is None or target.type not in available:
        raise ConfigError(f'Unknown device "{device}". Give auto, cpu, cuda, cuda:0 or mps.')
    count = torch.cuda.device_count() if target.type == "cuda" else 1
    if not available[target.type]() or (target.index or 0) >= count:
        raise ConfigError(f'Device "{device}" is not available on this machine.')
    return target


def native_bfloat16() -> bool:
    """Return whether this CPU computes in bfloat16 natively (AVX-512 BF16 or AMX)."""
    probe: Any = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = probe()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@cache
def processor() -> str:
    """Return the name of this machine's processor, and which of its instructions matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict[str, str]()
    for name, _, value in (line.partition(":") for line in lines):
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    extras = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    model = f", model {fields['model']}" if "model" in fields else ""
    return f"{fields.get('model name', platform.machine())}{model} ({' '.join(extras)})"


def find_dtype(dtype: str, config: Any, target: torch.device) -> torch.dtype:
    """Return the dtype of this name; "auto" is the checkpoint's own.

    With "auto", on a CPU, float16 becomes float32, and so does bfloat16 where the processor has no
    such instructions.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    text_config = config.get_text_config(decoder=True)
    own = getattr(text_config, "dtype", None) or getattr(config, "dtype", None) or torch.float32
    if isinstance(own, str):
        own = DTYPES.get(own, torch.float32)
    if target.type != "cpu" or own == torch.float32:
        return own
    return own if own == torch.bfloat16 and native_bfloat16() else torch.float32


def set_threads(threads: int | None, model: Any = None) -> None:
    """Set torch's CPU threads: as given, or 1 for a small model, else torch's own choice.

    Raises `ConfigError` for what is no number of threads.
    """
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)
    elif model is not None and sum(p.numel() for p in model.parameters()) < SMALL:
        torch.set_num_threads(1)
