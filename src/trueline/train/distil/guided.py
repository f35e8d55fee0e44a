"""Answers that the teacher draws, for what the student would never say by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import IterableDataset

from trueline.train.distil.teachers import Lesson, guided_answers

if TYPE_CHECKING:
    from trueline.train.distil.trainer import InverseQTrainer


class GuidedAnswers:
    """Draws a share of each batch's answers, `guided_share` of the trainer's settings.

    The teacher is frozen, so the answers of some batches to come are drawn as one: a pool of as
    many rows as a batch has, from rows chosen by the seed. A stream has only its batch.
    """

    def __init__(self, trainer: InverseQTrainer) -> None:
        self.trainer = trainer
        self._pool: tuple[int, list[tuple[Lesson, list[int]]]] = (-1, [])

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Lesson, list[int]]]:
        """Return lessons with the teacher's answers, to stand for the first rows of this batch."""
        trainer, args = self.trainer, self.trainer.args
        share = args.guided_share * len(rows) if trainer.model.training else 0.0
        if share == 0:
            return []
        stream = isinstance(trainer.train_dataset, IterableDataset)
        batch = trainer.state.global_step // args.reuse
        every = 1 if stream else max(1, int(1 / args.guided_share))
        first = batch - batch % every
        # How many before a batch; a share of less than one row is made up over several.
        before, start, stop, after = (
            math.floor(share * b) for b in (first, batch, batch + 1, first + every)
        )
        if self._pool[0] != first:
            taught = [row for row in rows if trainer.teacher.row_method(row) is not None]
            source = taught if stream else trainer._taught
            seed = (args.seed * 1_000_003 + first) * trainer.accelerator.num_processes
            seed = (seed + trainer.accelerator.process_index) * 100_003
            picks = torch.randint(
                len(source) or 1,
                (after - before if source else 0,),
                generator=torch.Generator().manual_seed(seed),
            ).tolist()
            chosen = [source[i] if stream else trainer.train_dataset[source[i]] for i in picks]
            lessons = [trainer.teacher.lesson(trainer.student, row) for row in chosen]
            answers: list[list[int]] = []
            if lessons:
                student = trainer.accelerator.unwrap_model(trainer.model)
                with trainer._start(student) as reference, trainer._fast(reference.model):
                    answers = guided_answers(
                        trainer.teacher,
                        reference,
                        lessons,
                        max_new_tokens=trainer.max_completion_length,
                        temperature=trainer.temperature,
                        seed=seed,
                    )
            self._pool = first, list(zip(lessons, answers, strict=True))
        return self._pool[1][start - before : stop - before]
