"""Distillation: a decoding method's policy moves into an adapter or the weights.

    config = DistilConfig.of(principle="Talk like a pirate.", prompts="prompts.jsonl")
    distil(config, "pirate")                                      a LoRA in a folder
    distil(DistilConfig.of(..., after="pirate", keep="o-lora"), "both")    one more on top of it

On top of earlier adapters (`after`) the reference and the teacher are the model with all of them
merged in memory; `keep` holds the new one out of their way. The folder then holds every adapter
under `stages/`, and their sum as one LoRA.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trueline.errors import ConfigError, DataError, ModelError, check_number
from trueline.evals.judging import JudgeConfig
from trueline.jobs.distilled_card import use_note, write_card
from trueline.methods import METHODS, code_hash, find_method
from trueline.models.adapter import MAX_RANK
from trueline.models.device import MAX_THREADS
from trueline.models.load import LanguageModel
from trueline.models.source import ModelConfig
from trueline.records.disk import saving
from trueline.records.hashes import folder_hash, model_hash
from trueline.records.run_folder import CHECKPOINTS, RunFolder
from trueline.settings.reader import as_values, build, check, fields, merge, resolved, write_toml
from trueline.train import base
from trueline.train.base import LoraSettings
from trueline.train.distil.config import InverseQConfig
from trueline.train.distil.evaluation import HeldOutAnswers, Questions
from trueline.train.distil.stacked import NewAdapter, earlier_adapters
from trueline.train.distil.trainer import InverseQTrainer
from trueline.train.keep import make_keep
from trueline.train.progress import TrainingLog, quiet
from trueline.train.teaching_rows import read_rows
from trueline.types import Progress

SHOWN = {
    "loss": "loss",
    "kl_to_teacher": "kl_teacher",
    "kl_to_reference": "kl_start",
    "reward": "reward",
    "completion_length": "length",
    "tokens_per_second": "tokens/s",
}
"""What is told beside the progress, and how it is called there."""

NEUTRAL = (
    "prompts",
    "after",
    "evaluate",
    "report_to",
    "run_name",
    "save_steps",
    "save_total_limit",
)
"""Settings in which two calls for the same result may differ; files are told by their hash."""


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

    def __post_init__(self) -> None:
        check_number("lora.rank", self.lora.rank, low=1, high=MAX_RANK, whole=True)
        check_number("lora.dropout", self.lora.dropout, low=0, high=1, high_open=True)
        if self.lora.alpha is not None:
            check_number("lora.alpha", self.lora.alpha, low=0, low_open=True)
        for name, high in {"limit": math.inf, "threads": MAX_THREADS}.items():
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=1, high=high, whole=True)
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


@dataclass(frozen=True)
class DistilResults:
    """What a distillation left in its folder."""

    folder: Path
    numbers: Mapping[str, Any]
    """In words: steps, seconds, means of the last steps, held-out measures."""
    note: str = ""
    """How to use the result."""
    broken: tuple[str, ...] = ()
    """Files of checkpoints that could not be gone on from."""

    def as_dict(self) -> dict[str, Any]:
        """Return the folder and the numbers, as JSON can hold them."""
        return {"folder": str(self.folder), **self.numbers}


def distil(
    config: DistilConfig,
    folder: str | Path,
    *,
    model: LanguageModel | None = None,
    progress: Progress | None = None,
    resume: bool = True,
    overwrite: bool = False,
    command: str = "",
) -> DistilResults:
    """Train, and leave weights, log, curves and card in a folder; see `records.run_folder`.

    Called again with the same settings it goes on where a killed run stopped, to the same weights
    (bit-equal on a CPU), and returns the results of a finished one.

    Args:
        config: What is distilled.
        folder: Of the run.
        model: In place of the one that `config` names; it is changed.
        progress: Told after every step.
        resume: Whether an unfinished run is gone on with; False refuses it.
        overwrite: Start again though the folder holds a run.
        command: What was typed, for the card.

    Raises:
        ConfigError: A setting, or a folder that is another run's; a teacher without effect.
        DataError: Rows that cannot be used.
        ModelError: A model or an earlier adapter that cannot be.
    """
    rows, data = read_rows(str(config.prompts), config.limit)
    questions, held_out = _held_out(config, Path(folder))
    earlier = earlier_adapters(config.after) if config.after else []
    with quiet():
        lm = model or config.source.load()
        if config.dtype == "auto" and lm.model.dtype == torch.float16:
            lm.model.float()
        sized = base.defaults(sum(p.numel() for p in lm.model.parameters()), config.full)
        values = config.settings(sized)
        settings = {"data": {"hash": data}, "after": [folder_hash(path) for path in earlier]}
        settings |= _identity(config, values, lm, given=model is not None)
    run = RunFolder(
        folder, "distillation", settings, command=command, resume=resume and not overwrite,
        overwrite=overwrite, main=int(os.environ.get("RANK", 0)) == 0,
    )  # fmt: skip
    try:
        if not run.finished:
            args = config.arguments(run.folder / CHECKPOINTS, sized)
            with quiet(), _naming_rows(str(config.prompts), rows):
                trainer, save = _made(config, args, lm, rows, held_out, earlier)
            if questions is not None:
                room = args.max_completion_length
                trainer.evaluate_with(HeldOutAnswers(questions, trainer.teacher, room))
            TrainingLog(trainer, run if run.main else None, write_toml(values), SHOWN, progress)
            with quiet(), saving(run.folder):
                _train(trainer, save, run)
            if run.main:
                write_card(config, values, run, len(rows))
        note = use_note(config, run.folder)
        return DistilResults(run.folder, run.results or {}, note, tuple(run.broken))
    finally:
        run.close()


def _identity(
    config: DistilConfig, values: Mapping[str, Any], lm: LanguageModel, *, given: bool
) -> dict[str, Any]:
    """Return what of settings and model decides the result; a model that was given is no file."""
    found: dict[str, Any] = base.base_settings(config.source, lm)
    if given:
        found["base"]["hash"] = model_hash(lm)
    found["config"] = {k: v for k, v in values.items() if k not in NEUTRAL}
    if ":" in (teacher := str(values["teacher"])):
        found["teacher_code"] = code_hash(find_method(teacher))
    return found


def _train(trainer: InverseQTrainer, save: Callable[[str], object], run: RunFolder) -> None:
    """Train from the start or the checkpoint, and put the weights into the folder."""
    trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    if trainer.over_budget is not None:
        run.facts["over_budget"] = trainer.over_budget
    run.put(save, keep=("README.md",))


def _made(
    config: DistilConfig,
    args: InverseQConfig,
    lm: LanguageModel,
    rows: list[dict[str, Any]],
    held_out: Any,
    earlier: list[Path],
) -> tuple[InverseQTrainer, Callable[[str], object]]:
    """Return the trainer, and what writes its weights into a folder."""
    rows = [{k: v for k, v in row.items() if k != "line"} for row in rows]
    if config.full:
        trainer = InverseQTrainer(lm, args, rows, held_out)
        return trainer, trainer.save_model
    keep = make_keep(config.way, **config.keep_options)
    new = NewAdapter(lm, args, rows, earlier, config.lora.peft(), keep)
    trainer = new.trainer(held_out)

    def save(folder: str) -> None:
        if not trainer.is_world_process_zero():
            return
        if config.merge:
            model: Any = new.student.model
            model.merge_and_unload().save_pretrained(folder)
            new.student.tokenizer.save_pretrained(folder)
        else:
            new.save(folder)

    return trainer, save


def _held_out(config: DistilConfig, folder: Path) -> tuple[Questions | None, Any]:
    """Return what is asked of the student while it is trained, or rows to measure losses on."""
    if config.evaluate is None:
        return None, None
    judge = JudgeConfig(config.judge, config.judge_model, config.judge_url)
    principle = config.training.get("principle")
    questions = Questions.read(config.evaluate, config.goal, principle, judge, folder)
    if questions is not None:
        return questions, None
    rows, _ = read_rows(config.evaluate)
    return None, [{k: v for k, v in row.items() if k != "line"} for row in rows]


@contextlib.contextmanager
def _naming_rows(prompts: str, rows: list[dict[str, Any]]) -> Iterator[None]:
    """Name a row that does not fit the model by its line, and what PEFT refuses as settings."""
    try:
        yield
    except (ConfigError, ModelError):
        raise
    except DataError as error:
        place = re.match(r"train_dataset\[(\d+)\]", str(error))
        if place is None:
            raise
        line, rest = rows[int(place[1])]["line"], str(error)[place.end() :]
        raise DataError(f"{prompts}:{line}{rest}") from None
    except (ValueError, ImportError) as error:  # target modules that are not there, a package
        raise ConfigError(" ".join(str(error).split())) from error
