"""Settings that all tasks of a stream share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trueline.errors import ConfigError, check_number, suggestion
from trueline.models.adapter import MAX_RANK

SCORINGS = ("offered", "union", "generated")
"""Candidates of an answer, see `trueline.train.tasks.families`."""


@dataclass(frozen=True)
class StreamConfig:
    """What all tasks of a run share; a task's own settings go before it."""

    rank: int = 8
    """Rank of a LoRA, at least 1."""
    alpha: float = 32.0
    """Scale of a LoRA of this rank, above 0; one of another rank has the same alpha / rank."""
    dropout: float = 0.1
    """Of a LoRA's input, in [0, 1)."""
    target_modules: tuple[str, ...] | str | None = None
    """Names of the modules that get a LoRA; None takes PEFT's choice (query and value)."""
    train_head: bool = False
    """Train a classifier's head whole, beside the LoRA; off, it stays as the model came."""
    learning_rate: float = 1e-3
    """Above 0."""
    scheduler: str = "constant"
    """One of transformers' schedules, such as "linear" or "cosine", over each task."""
    warmup_steps: int = 0
    """Steps at a task's start in which the learning rate rises, at least 0."""
    weight_decay: float = 0.0
    """At least 0."""
    max_grad_norm: float = 1.0
    """Above 0."""
    epochs: float = 1.0
    """Passes over a task's training rows, above 0."""
    batch_size: int = 32
    """Rows of a forward and backward pass, at least 1."""
    gradient_accumulation: int = 1
    """Passes of an optimiser step, at least 1."""
    limit: int | None = None
    """At most so many training rows of a task; None takes all."""
    max_length: int = 512
    """Tokens of a prompt; a longer one loses the end of its sentence."""
    train_labels: str = "offered"
    """Labels over which a classifier's loss goes: "offered" (the task's own) or "union"."""
    scoring: str = "offered"
    """Candidates of an answer: "offered", "union", or "generated" (no candidates)."""
    chat: bool | None = None
    """Prompts as a user's message; None does so for causal models with a chat template."""
    evaluate: str = "all"
    """Tasks measured after each stage: "all", or "seen" (those trained so far)."""
    evaluate_on: str = "test"
    """"test", or "validation" to choose settings."""
    evaluate_limit: int | None = None
    """At most so many rows of each task are measured; None takes all."""
    evaluate_batch_size: int = 64
    """Rows of a forward pass in measuring."""
    bf16: bool = False
    """Compute in bfloat16 where that is safe (autocast); weights stay as they are."""
    seed: int = 0
    """Of LoRA's start, dropout, the order and the choice of rows."""
    save_steps: int = 100
    """Steps between checkpoints, rounded up to a row of the log; a killed run loses so many."""
    logging_steps: int = 10
    """Steps between rows of the log."""

    def __post_init__(self) -> None:
        whole: dict[str, Any] = {"low": 1, "whole": True}
        for name in ("batch_size", "gradient_accumulation", "max_length",
                     "evaluate_batch_size", "save_steps", "logging_steps"):  # fmt: skip
            check_number(name, getattr(self, name), **whole)
        check_number("rank", self.rank, low=1, high=MAX_RANK, whole=True)
        for name in ("limit", "evaluate_limit"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), **whole)
        for name in ("alpha", "learning_rate", "epochs", "max_grad_norm"):
            check_number(name, getattr(self, name), low=0, low_open=True)
        for name in ("seed", "warmup_steps"):
            check_number(name, getattr(self, name), low=0, whole=True)
        check_number("weight_decay", self.weight_decay, low=0)
        check_number("dropout", self.dropout, low=0, high=1, high_open=True)
        for name, known in (
            ("train_labels", ("offered", "union")),
            ("scoring", SCORINGS),
            ("evaluate", ("all", "seen")),
            ("evaluate_on", ("test", "validation")),
        ):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f'Unknown {name} "{value}".{suggestion(str(value), known)}')
