"""A principle on top of earlier adapters: what is there, what its statistics are taken over."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from trueline.errors import ConfigError
from trueline.models.load import LanguageModel
from trueline.train.adapters.export import write_lora
from trueline.train.adapters.stack import AdapterStack, save_adapter
from trueline.train.distil.config import InverseQConfig
from trueline.train.distil.sampling import own_answers, seed_of
from trueline.train.distil.student import evaluating
from trueline.train.distil.teachers import Teacher, asked_teacher
from trueline.train.distil.trainer import InverseQTrainer
from trueline.train.keep import Keep, Stage, kept
from trueline.train.keep.stage import Row
from trueline.types import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

STAGES = "stages"
"""The folder in which a stack keeps its adapters, the oldest first."""
NEEDLESS = (
    *("manifest.json", "results.json", "log.jsonl", "tokenizer.json", "tokenizer_config.json"),
    *("README.md", "config.toml", "curves.png", "chat_template.jinja", "checkpoints", ".lock"),
)
"""What of a run's folder belongs to no adapter."""
BATCH = 16
"""Answers that are drawn and read together."""


def earlier_adapters(folder: str | Path) -> list[Path]:
    """Return the folders of the adapters that a folder holds, the oldest first.

    Those under its `stages/`; else those in folders of its own; else itself.

    Raises:
        ConfigError: There is none.
    """
    folder = Path(folder).expanduser()
    for inside in (folder / STAGES, folder):
        found = [p.parent for p in inside.glob("*/adapter_config.json")]
        found += [p.parent for p in inside.glob("*/adapter/adapter_config.json")]
        if found:
            return sorted(found, key=_natural)
    if (folder / "adapter_config.json").is_file():
        return [folder]
    raise ConfigError(f'`after`: no adapter at "{folder}": it has no adapter_config.json.')


def _natural(path: Path) -> list[Any]:
    """Return a key by which 10-x comes after 9-x."""
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", str(path))]


def stage_name(index: int, words: str) -> str:
    """Return the name of an adapter's folder: 02-talk-like-a-pirate."""
    slug = re.sub(r"[^a-z0-9]+", "-", words.lower())[:40].strip("-")
    return f"{index + 1:02d}-{slug or 'principle'}"


def write_sum(folders: Sequence[Path], to: Path) -> int | None:
    """Write all adapters as one plain LoRA into an existing folder; return its rank."""
    part = to / ".sum"
    done = write_lora(AdapterStack.load(folders), part)
    for path in part.iterdir():
        path.replace(to / path.name)
    part.rmdir()
    return done.rank


def own_batches(
    student: LanguageModel,
    teacher: Teacher,
    rows: Sequence[dict[str, Any]],
    sampling: SamplingParams,
    seed: int,
) -> Iterator[dict[str, Tensor]]:
    """Yield what the model's forward takes, of its own answers to the rows, with `labels`.

    These stand for the data of a principle, of which there are none but prompts.
    """
    for first in range(0, len(rows), BATCH):
        lessons = [teacher.lesson(student, row) for row in rows[first : first + BATCH]]
        seeds = [seed_of("statistics", seed, first + i) for i in range(len(lessons))]
        with evaluating(student.model):
            answers = own_answers(student, lessons, sampling, seeds)
        prompts = [lesson.prompt for lesson in lessons]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids, mask, labels = [], [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            gap = [student.pad_token_id] * (width - len(prompt) - len(answer))
            ids.append([*prompt, *answer, *gap])
            mask.append([1] * (len(prompt) + len(answer)) + [0] * len(gap))
            labels.append([-100] * len(prompt) + list(answer) + [-100] * len(gap))
        named = zip(("input_ids", "attention_mask", "labels"), (ids, mask, labels), strict=True)
        yield {name: torch.tensor(values, device=student.device) for name, values in named}


class NewAdapter:
    """A LoRA on the model with all earlier ones merged in memory, held out of their way.

    Args:
        student: The untouched base; it is changed.
        args: Of the trainer.
        rows: Of the data set.
        earlier: Folders of the earlier adapters, oldest first.
        lora: PEFT's configuration of the new one.
        keep: How what came before is kept, and what later ones will need of this one.
    """

    def __init__(
        self,
        student: LanguageModel,
        args: InverseQConfig,
        rows: list[Row],
        earlier: Sequence[Path],
        lora: Any,
        keep: Keep,
    ) -> None:
        self.args, self.keep, self.earlier = args, keep, list(earlier)
        self.stack = AdapterStack.load(earlier)
        # Each adapter starts elsewhere: the same seed would start it inside its predecessor.
        set_seed(args.seed + len(earlier))
        model: Any = self.stack.attach(student.model, lora)
        self.student = replace(student, model=model, raw=args.raw)
        self.teacher = asked_teacher(args)
        index = len(self.earlier)
        self.stage = Stage(index, index + 1, self.earlier, rows, self._batches, args.seed)

    def trainer(self, eval_dataset: Any = None) -> InverseQTrainer:
        """Return the trainer of the new adapter."""
        self.keep.begin(self.student.model, self.stage)
        found: InverseQTrainer = kept(InverseQTrainer)(
            self.student,
            self.args,
            self.keep.rows(self.stage),
            eval_dataset,
            stack=self.stack,
            terms=self.keep.terms(self.stage),
        )
        return found

    def save(self, folder: str) -> None:
        """Write the adapter, with what `keep` needs of it later.

        On top of earlier ones all of them go under `stages/`, and beside that their sum.
        """
        own = Path(folder)
        if self.earlier:
            for index, path in enumerate(self.earlier):
                shutil.copytree(
                    path,
                    own / STAGES / _renamed(path, index),
                    ignore=shutil.ignore_patterns(*NEEDLESS),
                )
            words = self.args.principle or self.args.teacher
            own = own / STAGES / stage_name(len(self.earlier), words)
        save_adapter(self.student.model, own)  # type: ignore[arg-type]
        # Later principles are held out of the way of what the rows are without one, too.
        left = [{**row, "principle": ""} for row in self.stage.rows]
        self.keep.end(self.student.model, replace(self.stage, rows=left), own)
        if self.earlier:
            write_sum(earlier_adapters(folder), Path(folder))
        self.student.tokenizer.save_pretrained(folder)

    def _batches(self, model: Any, rows: int) -> Iterator[dict[str, Tensor]]:
        chosen = self.stage.draw(rows, "statistics")
        room = SamplingParams(self.args.max_completion_length, self.args.temperature)
        return own_batches(self.student, self.teacher, chosen, room, self.args.seed)


def _renamed(path: Path, index: int) -> str:
    """Return the name of an earlier adapter's folder in a new stack."""
    name = re.sub(r"^\d+-", "", path.parent.name if path.name == "adapter" else path.name)
    return stage_name(index, name)
