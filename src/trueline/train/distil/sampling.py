"""Answers to learn from: the student's own, and a share that the teacher draws.

Each answer has a seed of its own, made of the run's seed, the batch, the process and its place: the
same whether a run was broken off, and whatever is drawn beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor
from typing import TYPE_CHECKING, Any

import torch

from trueline.engine.decoding import Decoder
from trueline.engine.protocol import Prompt
from trueline.errors import ConfigError, DataError
from trueline.methods.plain import Plain
from trueline.models.packed import merged_products
from trueline.models.prompts import shared_length
from trueline.train.distil.student import Reference, evaluating
from trueline.train.distil.teachers import Lesson, Teacher
from trueline.types import Method, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from trueline.models.load import LanguageModel
    from trueline.train.distil.config import InverseQConfig

Row = Mapping[str, Any]
POOL = 16
"""Answers that the teacher draws as one for small batches: a few rows cost a CPU hardly less."""
Taught = list[tuple[Lesson, list[int]]]
"""Lessons with the answers that the teacher drew."""


@dataclass
class Samples:
    """Answers of one part of an update, with what they are learned from."""

    lessons: list[Lesson]
    answers: list[list[int]]
    measured: list[bool]
    """Whether an answer counts in the logged means: the student's own do."""
    old_logprobs: list[Tensor] = field(default_factory=list)
    """Of the answers' tokens at the first use; empty before it."""

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.answers))

    def parts(self, count: int) -> list[Samples]:
        """Return the same answers in `count` parts of equal size."""
        return self.rows(len(self.lessons) // count)

    def rows(self, most: int) -> list[Samples]:
        """Return the same answers in pieces of at most so many rows, of equal size but the last."""
        pieces = -(-len(self.lessons) // most)
        size = -(-len(self.lessons) // pieces)
        cuts = [slice(i, i + size) for i in range(0, len(self.lessons), size)]
        return [Samples(self.lessons[c], self.answers[c], self.measured[c]) for c in cuts]


def seed_of(*parts: int | str) -> int:
    """Return a seed of 63 bits that its parts decide."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def own_answers(
    student: LanguageModel,
    lessons: Sequence[Lesson],
    sampling: SamplingParams,
    seeds: Sequence[int],
) -> list[list[int]]:
    """Return the student's answer to each lesson, from its whole distribution, in one batch."""
    return _drawn(student, [[x.prompt] for x in lessons], [Plain()] * len(seeds), sampling, seeds)


def taught_answers(
    teacher: Teacher,
    reference: LanguageModel,
    lessons: Sequence[Lesson],
    sampling: SamplingParams,
    seeds: Sequence[int],
) -> list[list[int]]:
    """Return an answer to each lesson as the teacher draws it, in one batch.

    A teacher of `checkpoints` draws with the tuned model alone.
    """
    if teacher.tuned is not None:
        alone = [x.branches[:1] for x in lessons]
        return _drawn(teacher.tuned, alone, [Plain()] * len(alone), sampling, seeds)
    methods = [lesson.method or Plain() for lesson in lessons]
    return _drawn(reference, [x.branches for x in lessons], methods, sampling, seeds)


def _drawn(
    model: LanguageModel,
    rows: Sequence[list[list[int]]],
    methods: Sequence[Method],
    sampling: SamplingParams,
    seeds: Sequence[int],
) -> list[list[int]]:
    """Decode one batch; what all rows of a method begin with is computed once."""
    if not rows:
        return []
    prefixes: dict[tuple[Method, int], list[int]] = {}
    for branches, method in zip(rows, methods, strict=True):
        for place, ids in enumerate(branches):
            known = prefixes.setdefault((method, place), ids)
            # An only row shares nothing.
            alone = known is ids
            prefixes[method, place] = known if alone else known[: shared_length(known, ids)]
    prompts = []
    for branches, method, seed in zip(rows, methods, seeds, strict=True):
        shared = [prefixes[method, k] for k in range(len(branches))]
        starts = tuple(() if s is b else tuple(s) for s, b in zip(shared, branches, strict=True))
        prompts.append(Prompt(branches, method, sampling, seed, starts))
    decoder = Decoder(model, batch_size=len(prompts))
    return [answer.token_ids for answer in decoder.complete(prompts)]


@dataclass(frozen=True)
class Plan:
    """How many answers of each batch the teacher draws, and which batches share a pool.

    The teacher is frozen, so the answers of some batches to come are drawn as one: about as many as
    a batch has rows, or `POOL` for a small batch, but no more than four times its rows. A share of
    less than one row is made up over several batches.
    """

    share: float
    """Answers a batch, perhaps less than one."""
    every: int
    """Batches that share a pool."""

    @classmethod
    def of(cls, guided: float, rows: int, *, stream: bool = False) -> Plan:
        """Return the plan for batches of `rows` rows; a stream has only its batch."""
        if stream or guided == 0:
            return cls(guided * rows, 1)
        together = max(rows, min(POOL, 4 * rows))
        return cls(guided * rows, max(1, int(together / (guided * rows))))

    def first(self, batch: int) -> int:
        """Return the first batch of the pool of this one."""
        return batch - batch % self.every

    def size(self, first: int) -> int:
        """Return how many answers a pool has."""
        return self._before(first + self.every) - self._before(first)

    def taken(self, batch: int) -> slice:
        """Return which of its pool's answers a batch takes."""
        before = self._before(self.first(batch))
        return slice(self._before(batch) - before, self._before(batch + 1) - before)

    def _before(self, batch: int) -> int:
        return floor(self.share * batch)


class Guide:
    """Hands out the teacher's answers batch by batch, from pools that `draw(rows, seeds)` fills."""

    def __init__(self, plan: Plan, draw: Callable[[list[Row], list[int]], Taught]) -> None:
        self.plan, self.draw = plan, draw
        self._pool: tuple[int, Taught] = (-1, [])

    def answers(self, batch: int, batches: int, source: Any, *key: int) -> Taught:
        """Return the lessons and answers of a batch.

        Args:
            batch: Its number.
            batches: How many there are in all: nothing is drawn for later ones.
            source: Rows that have a teacher, by number; `key` and the pool choose among them.
            *key: What else decides the choice and the draws: the run's seed, the process.
        """
        first = self.plan.first(batch)
        if self._pool[0] != first:
            count = self.plan.size(first) if len(source) else 0
            chooser = torch.Generator().manual_seed(seed_of("rows", first, *key))
            picks = torch.randint(len(source) or 1, (count,), generator=chooser).tolist()
            del picks[self.plan.taken(min(first + self.plan.every, batches) - 1).stop :]
            seeds = [seed_of("teacher", first, i, *key) for i in range(len(picks))]
            self._pool = first, self.draw([source[i] for i in picks], seeds)
        return self._pool[1][self.plan.taken(batch)]


class Answers:
    """Draws the answers of each batch: the teacher's share first, then the student's own.

    Args:
        args: Of the trainer.
        teacher: Whose policy is learned.
        student: Before its first update.
        reference: Its start.
        accelerator: Knows how many processes train, and which this is.
    """

    source: Any = None
    """Rows with a teacher, from which it draws; None for a stream: those of the batch."""

    def __init__(
        self,
        args: InverseQConfig,
        teacher: Teacher,
        student: LanguageModel,
        reference: Reference,
        accelerator: Any,
    ) -> None:
        self.args, self.teacher = args, teacher
        self.student, self.reference = student, reference
        self.processes, self.process = accelerator.num_processes, accelerator.process_index
        self.sampling = SamplingParams(args.max_completion_length, args.temperature)
        self._guide: Guide | None = None

    def begin(self) -> None:
        """Forget what was drawn for batches to come."""
        self._guide = None

    def sample(self, rows: list[Row], batch: int, batches: int) -> Samples:
        """Draw the answers of a batch, by its number; `batches` come in all."""
        share, key = self.args.guided_share, (self.args.seed, self.processes, self.process)
        guided: Taught = []
        if share:
            source = self.source
            if source is None:
                source = [row for row in rows if self.teacher.row_method(row) is not None]
            if self._guide is None:
                stream = self.source is None
                self._guide = Guide(Plan.of(share, len(rows), stream=stream), self._teach)
            guided = self._guide.answers(batch, batches, source, *key)
        lessons = [self.lesson(row) for row in rows[len(guided) :]]
        seeds = [seed_of("student", batch, i, *key) for i in range(len(lessons))]
        own = self._own(lessons, seeds)
        # A batch of guided answers alone is measured too, so that every step has its numbers.
        measured = [not lessons] * len(guided) + [True] * len(own)
        lessons = [lesson for lesson, _ in guided] + lessons
        return Samples(lessons, [answer for _, answer in guided] + own, measured)

    def held_out(self, rows: Sequence[Row]) -> Samples:
        """Draw the student's own answers to held-out rows, the same whenever they are asked."""
        lessons = [self.lesson(row) for row in rows]
        seeds = [seed_of("held-out", self.args.seed, i, *x.prompt) for i, x in enumerate(lessons)]
        return Samples(lessons, self._own(lessons, seeds), [True] * len(lessons))

    def lesson(self, row: Row) -> Lesson:
        """Return a row's lesson; raise `DataError` where the model has too few positions for it."""
        lesson = self.teacher.lesson(self.student, row)
        limit, room = self.student.max_positions, self.args.max_completion_length
        longest = max(map(len, [lesson.prompt, *lesson.branches]))
        if limit is not None and longest + room > limit:
            raise DataError(
                f"The longest prompt has {longest} tokens; with `max_completion_length` {room} "
                f"that is more than the model's {limit} positions."
            )
        return lesson

    def taught(self, rows: Any) -> Any:
        """Return the rows that have a teacher; raise for the first that cannot be used."""
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.processes
        if len(rows) < batch:
            raise ConfigError(
                f"A step takes {batch} prompts, but there are {len(rows)}. Give more, or lower "
                "`per_device_train_batch_size` or `gradient_accumulation_steps`."
            )
        taught = []
        for i, row in enumerate(rows):
            try:
                if self.lesson(row).method is not None:
                    taught.append(i)
            except DataError as error:
                raise DataError(f"train_dataset[{i}]: {error}") from None
        if not taught:
            raise ConfigError(
                "No row of `train_dataset` has a principle, and none is given for all."
            )
        return rows.select(taught) if hasattr(rows, "select") else [rows[i] for i in taught]

    def fast(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which a model samples fastest."""
        mixed = self.args.bf16 or self.args.fp16
        if mixed or not self.args.fast_sampling:
            return contextlib.nullcontext()
        return merged_products(model)

    def _own(self, lessons: list[Lesson], seeds: list[int]) -> list[list[int]]:
        model = self.student.model
        with evaluating(model), self.fast(model):
            return own_answers(self.student, lessons, self.sampling, seeds)

    def _teach(self, rows: list[Row], seeds: list[int]) -> Taught:
        lessons = [self.lesson(row) for row in rows]
        with self.reference.opened() as start, self.fast(start.model):
            answers = taught_answers(self.teacher, start, lessons, self.sampling, seeds)
        return list(zip(lessons, answers, strict=True))
