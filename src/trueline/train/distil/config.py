"""Settings of Inverse-Q*: its own, beside all of transformers' training arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from trueline.errors import ConfigError, check_number, suggestion

LOSSES = ("imitation", "advantage", "kl")
GUIDED = 0.25
"""Share of the answers that the teacher draws, for the losses on sampled tokens."""
MOST_STEPS = 10**9
"""More updates than any run makes; what is above was mistyped."""
ABSENT = {
    "push_to_hub": "Upload the finished folder with `hf upload`.",
    "deepspeed": "Sampling reads whole weights. Start several processes with torchrun.",
    "fsdp": "Sampling reads whole weights. Start several processes with torchrun.",
}
"""Arguments of transformers that this trainer refuses, and what to do instead."""


@dataclass
class InverseQConfig(TrainingArguments):
    """Settings of `InverseQTrainer`: its own, and all of transformers' arguments.

    `candidates` is the teacher's and `top_k` the loss's: the student always samples from its whole
    distribution, since the gradient is on-policy.
    """

    output_dir: str | None = "inverse-q"
    """Where checkpoints and the trained model go."""
    loss: str = "imitation"
    """imitation (the paper's), advantage, or kl over the whole vocabulary, which has the least
    variance."""
    teacher: str = "linear-alignment"
    """Whose policy is learned: principle, linear-alignment, checkpoints, or another decoding
    method, one of your own as FILE.py:Class or module:Class."""
    teacher_options: dict[str, Any] | str | None = None
    """Fields of the teacher's method, e.g. {'alpha': 2.5} for self-cd."""
    principle: str | None = None
    """What to follow, for rows with no `principle` of their own; rows left without any keep the
    behaviour of the reference."""
    student: str | None = None
    """plain: the student sees a row as it is; prompted: as the teacher's first branch does. By
    default prompted for self-cd and plain for all others."""
    ratio: float | None = None
    """The teacher's `ratio`; none is its method's own (2 for linear-alignment, 0 for
    checkpoints)."""
    candidates: float | None = None
    """The teacher's candidates mask, in (0, 1]; none is its method's own (0.8 for
    linear-alignment)."""
    floor: float | None = None
    """Share of the reference mixed into the teacher, in [0, 1): bounds its rewards where it rules
    tokens out. None is 0.001 for a teacher with a mask, else 0."""
    beta: float = 0.1
    """Scale of the token reward, above 0 and at most 1."""
    top_k: int | None = None
    """For loss kl: compare the teacher's k likeliest tokens and gather the others in one bucket;
    none compares the whole vocabulary."""
    guided: float | None = None
    """Share of each batch's answers that the teacher draws, in [0, 1): how words are learned that
    the student never says by itself. None is 0.25, but 0 for loss kl."""
    reuse: int = 1
    """Updates made with each batch of samples; above 1 with importance weights."""
    clip: float = 0.2
    """Importance weights are clipped to 1 plus or minus this, in (0, 1)."""
    kl_budget: float | None = None
    """Stop once a step's KL to the reference, in nats a token, exceeds it."""
    min_effect: float = 1e-3
    """Refuse a teacher that is closer to the reference than this, in nats a token; 0 refuses none
    and measures nothing."""
    effect_rows: int = 16
    """Rows on which the teacher's effect is measured."""
    max_completion_length: int = 512
    """The most tokens of an answer."""
    temperature: float = 1.0
    """Of the answers, and of the policies in the loss."""
    shuffle_dataset: bool = True
    """Whether the rows come in an order drawn from the seed, another in each epoch."""
    fast_sampling: bool = True
    """Sample from merged float32 adapters and, on a CPU, packed weights: copies of at most 2 GiB
    that are gone before the loss is computed."""
    raw: bool = False
    """Send prompts as they are, with no chat template."""
    disable_dropout: bool = True
    """No dropout, so that the policy in the loss is the one that sampled."""
    learning_rate: float = 5e-5
    """Initial learning rate of AdamW; tiny models want more."""
    logging_steps: float = 1
    """Log every so many steps."""
    bf16: bool | None = None  # type: ignore[assignment]
    """Mixed precision in bfloat16; none is on where there is a graphics card."""
    gradient_checkpointing: bool | None = None
    """Save memory by recomputing activations, about a third slower; off by default.
    `activation_checkpointing` is transformers' newer name of it."""
    remove_unused_columns: bool = False
    """Stays off: rows are read whole."""

    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *TrainingArguments._VALID_DICT_FIELDS,
        "teacher_options",
    ]

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ConfigError(f'Unknown loss "{self.loss}".{suggestion(self.loss, LOSSES)}')
        self._check_numbers()
        for name, way_out in ABSENT.items():
            if getattr(self, name, None):
                raise ConfigError(f"`{name}` is not for this trainer. {way_out}")
        if self.remove_unused_columns:
            raise ConfigError("`remove_unused_columns` would drop the principles. Leave it out.")
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available()
        if hasattr(self, "activation_checkpointing"):
            # Under its newer name, which transformers takes without a warning.
            if self.activation_checkpointing is None:
                self.activation_checkpointing = bool(self.gradient_checkpointing)
            self.gradient_checkpointing = None
        else:
            self.gradient_checkpointing = bool(self.gradient_checkpointing)
        super().__post_init__()
        if self.reuse > 1 and self.save_strategy == "steps" and self.save_steps % self.reuse:
            raise ConfigError(
                f"`save_steps` must be a multiple of `reuse` ({self.reuse}), got "
                f"{self.save_steps:g}: samples in use are not part of a checkpoint."
            )

    def _check_numbers(self) -> None:
        """Raise `ConfigError` for what is out of range."""
        check_number("beta", self.beta, low=0, high=1, low_open=True)
        check_number("clip", self.clip, low=0, high=1, low_open=True, high_open=True)
        check_number("min_effect", self.min_effect, low=0)
        check_number("temperature", self.temperature, low=0, low_open=True)
        check_number("learning_rate", self.learning_rate, low=0)
        check_number("num_train_epochs", self.num_train_epochs, low=0, low_open=True)
        check_number("save_steps", self.save_steps, low=0, low_open=True)
        check_number("seed", self.seed, low=0, high=2**32 - 1, whole=True)
        if self.max_steps == 0:
            raise ConfigError("`max_steps` must be at least 1, or -1 for whole epochs, got 0.")
        for name in ("reuse", "effect_rows", "max_completion_length", "per_device_eval_batch_size",
                     "per_device_train_batch_size", "gradient_accumulation_steps"):  # fmt: skip
            check_number(name, getattr(self, name), low=1, whole=True)
        check_number("max_steps", self.max_steps, low=-1, high=MOST_STEPS, whole=True)
        for name in ("floor", "guided"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0, high=1, high_open=True)
        if self.kl_budget is not None:
            check_number("kl_budget", self.kl_budget, low=0, low_open=True)
        if self.top_k is not None:
            check_number("top_k", self.top_k, low=1, whole=True)
            if self.loss != "kl":
                raise ConfigError(f'`top_k` belongs to loss "kl", not to "{self.loss}".')

    @property
    def guided_share(self) -> float:
        """Share of the answers that the teacher draws."""
        if self.guided is not None:
            return self.guided
        return 0.0 if self.loss == "kl" else GUIDED

    @property
    def method_options(self) -> dict[str, Any]:
        """Options of the teacher's method, `ratio` and `candidates` among them."""
        given = {"ratio": self.ratio, "candidates": self.candidates}
        options = self.teacher_options if isinstance(self.teacher_options, dict) else {}
        return {**options, **{name: value for name, value in given.items() if value is not None}}
