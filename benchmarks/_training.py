"""Training runs to compare: the same start, prompts, adapter and number of sampled responses.

A run is a way to train (`_ways.py`) with its learning rate, a principle and a seed. It gives a
curve: what was measured after so many responses and so many CPU seconds, measuring not counted.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would call home at every trainer

import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import set_seed

if str(ROOT := Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(0, str(ROOT))

from recipes.distil.measure import BATCH, NEW_TOKENS, Probe, asked
from recipes.distil.questions import Principle, training
from trueline import (
    Message,
    Method,
    Request,
    SamplingParams,
    generate,
    load_model,
)

GROUP = 8
"""Responses to one prompt in GRPO and RLOO."""
SPLIT_SEEDS = {"dev": 1000, "test": 0}


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share."""

    principle: Principle
    start: Path | str = "tiny"
    """A model folder, or "tiny"."""
    responses: int = 768
    """Sampled responses in all."""
    batch: int = 32
    """Responses of one step."""
    rank: int = 16
    points: tuple[int, ...] = (64, 128, 192, 256, 320, 384, 512, 640, 768)
    """After how many responses to measure."""
    split: str = "test"
    questions: int = 80
    """Questions of fact at each point."""

    @property
    def steps(self) -> int:
        """Optimiser steps of a run."""
        return self.responses // self.batch


@dataclass
class Run:
    """One run under way: the model, the measurements and the clock."""

    setting: Setting
    seed: int
    lr: float
    curve: list[dict[str, Any]] = field(default_factory=list)
    sampling_seconds: float = 0.0
    """CPU seconds of sampling before the first step; charged as the responses are used."""
    _started: float | None = None
    _measuring: float = 0.0

    def __post_init__(self) -> None:
        setting = self.setting
        self.lm, self.reference = (
            load_model(str(setting.start), packed_weights=False, dtype="float32", device="cpu")
            for _ in range(2)
        )
        self.probe = Probe(
            self.reference,
            setting.principle,
            setting.split,
            setting.questions,
            SPLIT_SEEDS[setting.split] + self.seed,
        )
        # The adapter is drawn by the trainers, some of which seed before it and some after.
        set_seed(self.seed)

    def prompts(self, count: int) -> list[list[Message]]:
        """Distinct training questions; a shorter list is the beginning of a longer one."""
        return asked([turn.user for turn in training("fact", count, self.seed)])

    def sample(
        self, prompts: Sequence[Sequence[Message]], method: Method, salt: int = 0
    ) -> list[str]:
        """One response to each prompt at temperature 1, its CPU time noted."""
        started = time.process_time()
        rows = [
            Request(list(p), method, seed=(2 * self.seed + salt) * 1_000_000 + i)
            for i, p in enumerate(prompts)
        ]
        sampling = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0)
        done = generate(self.lm, rows, sampling=sampling, batch_size=BATCH)
        self.sampling_seconds += time.process_time() - started
        return [c.text for c in done]

    def measure(self, model: Any, responses: int) -> None:
        """Add a point to the curve; the clock stands still meanwhile."""
        now = time.process_time()
        used = self.sampling_seconds * responses / self.setting.responses
        if self._started is not None:
            used += now - self._started - self._measuring
        with _random_state_kept():
            found = self.probe(model)
        self.curve.append({"responses": responses, "cpu_seconds": round(used, 2)} | found)
        self._measuring += time.process_time() - now

    def train(self, trainer: Any) -> None:
        """Run the trainer, measuring at the points of the setting."""
        trainer.add_callback(_Curve(self))
        trainer.remove_callback(PrinterCallback)
        self.measure(trainer.model, 0)
        self._started, self._measuring = time.process_time(), 0.0
        trainer.train()
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)

    def arguments(self, **more: Any) -> dict[str, Any]:
        """Options that every trainer is given."""
        return {
            "output_dir": tempfile.mkdtemp(prefix="trueline-run-"),
            "max_steps": self.setting.steps,
            "per_device_train_batch_size": self.setting.batch,
            "gradient_accumulation_steps": 1,
            "learning_rate": self.lr,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 4,
            "weight_decay": 0.0,
            "logging_steps": 8,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": self.seed,
        } | more

    def adapter(self) -> LoraConfig:
        """The same adapter for every way to train: all linear layers of the blocks."""
        rank = self.setting.rank
        return LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )


class _Curve(TrainerCallback):
    """Measures when enough responses have been used."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the points of the setting."""
        used = state.global_step * self.run.setting.batch
        if used in self.run.setting.points or used == self.run.setting.responses:
            self.run.measure(kwargs["model"], used)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave the random states as they were: measuring must not change a run."""
    states = torch.get_rng_state(), random.getstate()
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
