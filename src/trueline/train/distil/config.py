"""Settings of Inverse-Q*: what is added to TRL's, and what means something else here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from trl import DistillationConfig

from trueline.errors import ConfigError, check_number, suggestion

LOSSES = ("imitation", "advantage", "kl")
GUIDED = 0.25
"""Share of the answers that the teacher draws, for the losses on sampled tokens."""


@dataclass
class InverseQConfig(DistillationConfig):
    """Settings of `InverseQTrainer`: its own, and all of TRL's and transformers' arguments.

    `top_p`, `top_k` and `beta` mean here what they mean in the method: the student always samples
    from its whole distribution, since the gradient is on-policy.
    """

    output_dir: str | None = field(
        default="inverse-q", metadata={"help": "Where checkpoints and the trained model go."}
    )
    loss: str = field(
        default="imitation",
        metadata={
            "help": "imitation (the paper's), advantage, or kl over the whole vocabulary, which "
            "has the least variance."
        },
    )
    teacher: str = field(
        default="linear-alignment",
        metadata={
            "help": "Whose policy is learned: principle, linear-alignment, checkpoints, or "
            "another decoding method."
        },
    )
    teacher_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Fields of the teacher's method, e.g. {'alpha': 2.5} for self-cd."},
    )
    principle: str | None = field(
        default=None,
        metadata={
            "help": "What to follow, for rows with no `principle` of their own; rows left without "
            "any keep the behaviour of the reference."
        },
    )
    student: str | None = field(
        default=None,
        metadata={
            "help": "plain: the student sees a row as it is; prompted: as the teacher's first "
            "branch does. By default prompted for self-cd and plain for all others."
        },
    )
    ratio: float | None = field(
        default=None,
        metadata={
            "help": "The teacher's `ratio`; none is its method's own (2 for linear-alignment, 0 "
            "for checkpoints)."
        },
    )
    top_p: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "The teacher's candidates mask, in (0, 1]; none is its method's own (0.8 for "
            "linear-alignment)."
        },
    )
    floor: float | None = field(
        default=None,
        metadata={
            "help": "Share of the reference mixed into the teacher, in [0, 1): bounds its rewards "
            "where it rules tokens out. None is 0.001 for a teacher with a mask, else 0."
        },
    )
    beta: float = field(
        default=0.1, metadata={"help": "Scale of the token reward, above 0 and at most 1."}
    )
    top_k: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "For loss kl: compare the teacher's k likeliest tokens and gather the others "
            "in one bucket; none compares the whole vocabulary."
        },
    )
    guided: float | None = field(
        default=None,
        metadata={
            "help": "Share of each batch's answers that the teacher draws, in [0, 1): how words "
            "are learned that the student never says by itself. None is 0.25, but 0 for loss kl."
        },
    )
    reuse: int = field(
        default=1,
        metadata={
            "help": "Updates made with each batch of samples; above 1 with importance weights."
        },
    )
    clip: float = field(
        default=0.2,
        metadata={"help": "Importance weights are clipped to 1 plus or minus this, in (0, 1)."},
    )
    kl_budget: float | None = field(
        default=None,
        metadata={"help": "Stop once a step's KL to the reference, in nats a token, exceeds it."},
    )
    min_effect: float = field(
        default=1e-3,
        metadata={
            "help": "Refuse a teacher that is closer to the reference than this, in nats a token; "
            "0 refuses none and measures nothing."
        },
    )
    effect_rows: int = field(
        default=16, metadata={"help": "Rows on which the teacher's effect is measured."}
    )
    fast_sampling: bool = field(
        default=True,
        metadata={
            "help": "Sample from merged float32 adapters and, on a CPU, packed weights: copies of "
            "at most 2 GiB that are gone before the loss is computed."
        },
    )
    raw: bool = field(
        default=False, metadata={"help": "Send prompts as they are, with no chat template."}
    )
    learning_rate: float = field(
        default=5e-5, metadata={"help": "Initial learning rate of AdamW; tiny models want more."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Save memory by recomputing activations, about a third slower; off by default. "
            "`activation_checkpointing` is transformers' newer name of it."
        },
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "No dropout, so that the policy in the loss is the one that sampled."},
    )

    _VALID_DICT_FIELDS = [  # noqa: RUF012
        *DistillationConfig._VALID_DICT_FIELDS,
        "teacher_options",
    ]

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ConfigError(f'Unknown loss "{self.loss}".{suggestion(self.loss, LOSSES)}')
        check_number("beta", self.beta, low=0, high=1, low_open=True)
        check_number("reuse", self.reuse, low=1, whole=True)
        check_number("clip", self.clip, low=0, high=1, low_open=True, high_open=True)
        check_number("min_effect", self.min_effect, low=0)
        check_number("effect_rows", self.effect_rows, low=1, whole=True)
        check_number("temperature", self.temperature, low=0, low_open=True)
        if self.floor is not None:
            check_number("floor", self.floor, low=0, high=1, high_open=True)
        if self.guided is not None:
            check_number("guided", self.guided, low=0, high=1, high_open=True)
        if self.kl_budget is not None:
            check_number("kl_budget", self.kl_budget, low=0, low_open=True)
        if self.top_k is not None:
            check_number("top_k", self.top_k, low=1, whole=True)
            if self.loss != "kl":
                raise ConfigError(f'`top_k` belongs to loss "kl", not to "{self.loss}".')
        if self.teacher_model_name_or_path is not None:
            raise ConfigError(
                "`teacher_model_name_or_path` is of TRL's own trainer. Here a model that is "
                'trained already teaches as `teacher="checkpoints"` with its option `tuned`.'
            )
        if self.min_p is not None or self.repetition_penalty != 1:
            raise ConfigError(
                "`min_p` and `repetition_penalty` would make the samples off-policy. Leave them "
                "out: the student samples from its whole distribution."
            )
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available()
        if self.activation_checkpointing is None:
            # Under its newer name, which transformers takes without a warning.
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        self.gradient_checkpointing = None
        super().__post_init__()
        if self.reuse > 1 and self.save_strategy == "steps" and self.save_steps % self.reuse:
            raise ConfigError(
                f"`save_steps` must be a multiple of `reuse` ({self.reuse}), got "
                f"{self.save_steps:g}: samples in use are not part of a checkpoint."
            )

    @property
    def guided_share(self) -> float:
        """Share of the answers that the teacher draws."""
        if self.guided is not None:
            return self.guided
        return 0.0 if self.loss == "kl" else GUIDED

    @property
    def method_options(self) -> dict[str, Any]:
        """Options of the teacher's method, `ratio` and `top_p` among them."""
        given = {"ratio": self.ratio, "top_p": self.top_p}
        options = self.teacher_options if isinstance(self.teacher_options, dict) else {}
        return {**options, **{name: value for name, value in given.items() if value is not None}}
