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
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trueline.errors import ConfigError, DataError, ModelError
from trueline.evals.judging import JudgeConfig
from trueline.jobs.distil_config import DistilConfig
from trueline.jobs.distilled_card import use_note, write_card
from trueline.methods import code_hash, find_method
from trueline.models.load import LanguageModel
from trueline.records.disk import saving
from trueline.records.hashes import folder_hash, model_hash
from trueline.records.run_folder import CHECKPOINTS, RunFolder
from trueline.settings.reader import (
    write_toml,
)
from trueline.train import base
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
        if (config.dtype, lm.model.dtype) == ("auto", torch.float16):
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
                asked = HeldOutAnswers(questions, trainer.teacher, args.max_completion_length)
                trainer.evaluate_with(asked)
            TrainingLog(trainer, run if run.main else None, write_toml(values), SHOWN, progress)
            _train(trainer, save, run)
            if run.main:
                write_card(config, values, run, len(rows))
        found = run.results or {}
        return DistilResults(run.folder, found, use_note(config, run.folder), tuple(run.broken))
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
    with quiet(), saving(run.folder):
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
