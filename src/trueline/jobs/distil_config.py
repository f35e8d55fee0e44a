"""What is distilled: the settings of the job, beside the trainer's own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueline.errors import ConfigError, check_number
from trueline.evals.judging import JudgeConfig
from trueline.methods import METHODS, find_method
from trueline.models.adapter import MAX_RANK
from trueline.models.source import ModelConfig
from trueline.settings.reader import (
    as_values,
    build,
    check,
    explain,
    fields,
    merge,
    resolved,
)
from trueline.train import base
from trueline.train.base import LoraSettings
from trueline.train.distil.config import InverseQConfig
from trueline.train.keep import make_keep
from trueline.train.progress import quiet
from trueline.types import check_threads


@dataclass(frozen=True)
class DistilConfig:
    """What is distilled into which model; `training` holds the trainer's own settings.

    >>> DistilConfig.of(principle="Talk like a pirate.", prompts="prompts.jsonl", max_steps=100)
    """

    model: str = "tiny"
    """Folder, hub name, or "tiny", the bundled one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, mps."""
    dtype: str = "auto"
    """Of the weights; auto is the checkpoint's own, with float32 for float16 and for `full`."""
    quantize: str | None = None
    """4bit or 8bit, for an adapter on a quantized model; needs bitsandbytes."""
    chat_template: str | None = None
    """Jinja file to use as the chat template."""
    default_system: bool = True
    """Keep the system text that some chat templates put in where a chat has none."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
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
    after: str | None = None
    """Folder of the adapters that are there already, as an earlier distillation leaves it."""
    keep: str | None = None
    """How the new adapter is held out of the way of earlier ones, and later ones out of its: none,
    o-lora, ella, inf-lora, drift, replay. By default none, and with `after` o-lora."""
    keep_options: dict[str, Any] = field(default_factory=dict)
    """Fields of that way, e.g. {'strength': 10}."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapter."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `InverseQConfig`, by name."""

    @classmethod
    def of(cls, **settings: Any) -> DistilConfig:
        """Return the config of settings of both kinds: fields of this class, and the trainer's."""
        own = {f.name for f in fields(cls)} - {"training"}
        training = {k: v for k, v in settings.items() if k not in own}
        return build(cls, {k: v for k, v in settings.items() if k in own} | {"training": training})

    @classmethod
    def layered(cls, layers: Iterable[tuple[Mapping[str, Any], str]]) -> DistilConfig:
        """Return the config of layers of settings, each with where it was said; the last wins."""
        classes = [cls, InverseQConfig]
        return cls.of(**merge(*(check(given, classes, source) for given, source in layers)))

    @classmethod
    def explained(cls) -> list[tuple[str, Any, str]]:
        """Return (name, default, what it is) of every setting."""
        rows = explain([cls, InverseQConfig])
        own = ("output_dir", "training")
        return [(n, base.FIXED.get(n, d), text) for n, d, text in rows if n not in own]

    def __post_init__(self) -> None:
        check_number("lora.rank", self.lora.rank, low=1, high=MAX_RANK, whole=True)
        check_number("lora.dropout", self.lora.dropout, low=0, high=1, high_open=True)
        if self.lora.alpha is not None:
            check_number("lora.alpha", self.lora.alpha, low=0, low_open=True)
        if self.limit is not None:
            check_number("limit", self.limit, low=1, whole=True)
        check_threads(self.threads)
        if not isinstance(self.prompts, (str, Path)):
            raise ConfigError('`prompts` is missing: a JSONL file, rows with a "prompt".')
        if self.full and self.quantize:
            raise ConfigError("`full` cannot train quantized weights. Leave one out.")
        if self.full and (self.merge or self.lora != LoraSettings()):
            raise ConfigError("`full` trains no adapter: leave out `merge`, `rank` and `lora`.")
        if self.full and (self.after or self.keep):
            raise ConfigError("`full` trains no adapter: leave out `after` and `keep`.")
        if self.after and (self.quantize or self.merge):
            name = "quantize" if self.quantize else "merge"
            raise ConfigError(f"`{name}` does not go with `after`. Export the result instead.")
        if self.keep_options and self.keep is None:
            raise ConfigError("`keep_options` go with `keep`, a way to keep what came before.")
        if self.evaluate is None:
            for name in ("eval_steps", "judge"):
                if getattr(self, name, self.training.get(name)):
                    raise ConfigError(f"`{name}` goes with `evaluate`, a file of held-out prompts.")
        base.check_device(self.device)
        if "output_dir" in self.training:
            raise ConfigError("`output_dir` is the folder of the run; leave it out.")
        if (self.after or self.keep) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError(
                "`after` and `keep` are for one process. Start it without a launcher."
            )
        make_keep(self.way, **self.keep_options)
        JudgeConfig(self.judge, self.judge_model, self.judge_url)
        self.arguments("checkpoints", {})

    @property
    def way(self) -> str:
        """How what came before is kept."""
        return self.keep or ("o-lora" if self.after else "none")

    @property
    def goal(self) -> str:
        """What the teacher's method is for: adherence or refusal."""
        teacher = str(self.training.get("teacher", InverseQConfig.teacher))
        known = teacher in METHODS or ":" in teacher
        return str(getattr(find_method(teacher), "goal", "adherence")) if known else "adherence"

    @property
    def source(self) -> ModelConfig:
        """The model before training."""
        return ModelConfig(
            self.model,
            device=base.local_device(self.device),
            dtype="float32" if self.full and self.dtype == "auto" else self.dtype,
            quantize=self.quantize,  # type: ignore[arg-type]
            chat_template=self.chat_template,
            raw=bool(self.training.get("raw")),
            default_system=self.default_system,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            threads=self.threads,
            packed_weights=False,
        )

    def arguments(self, folder: str | Path, more: Mapping[str, Any]) -> InverseQConfig:
        """Return the trainer's configuration; `more` are settings that nobody gave."""
        with quiet():
            given = check(self.training, [InverseQConfig], "settings")
            values = resolved(merge(base.FIXED, more, given), [InverseQConfig])
            own = {"output_dir": str(folder), "disable_tqdm": True}
            return build(InverseQConfig, merge(base.device_settings(self.device), values, own))

    def settings(self, sized: Mapping[str, Any]) -> dict[str, Any]:
        """Return every setting by name, as one flat file has them."""
        own = {f.name: getattr(self, f.name) for f in fields(type(self)) if f.name != "training"}
        values = merge(base.FIXED, sized, as_values(own), self.training)
        values = resolved(values, [DistilConfig, InverseQConfig])
        for name in ("output_dir", "training", *(["lora"] if self.full else [])):
            values.pop(name, None)
        return values
