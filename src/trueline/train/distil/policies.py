"""What a teacher says of given answers: its logits beside the reference's, and how far apart."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from trueline.engine.decoding import Decoder, generate
from trueline.engine.protocol import Continuation, Prompt
from trueline.engine.scoring import combined, score
from trueline.errors import ConfigError
from trueline.evals import effects
from trueline.methods.inverse_q import floored
from trueline.train.distil.teachers import Lesson, Teacher
from trueline.types import Method, Request, SamplingParams, base_branches

if TYPE_CHECKING:
    from torch import Tensor

    from trueline.models.load import LanguageModel

DEFAULT_FLOOR = 1e-3
"""Share of the reference mixed into a teacher that rules tokens out."""
SLICE = 16
"""Positions that are combined at once: what lies between branches and teacher is not held for
more, and stays in the processor's cache."""


@torch.no_grad()
def policies(
    teacher: Teacher,
    reference: LanguageModel,
    lessons: Sequence[Lesson],
    completions: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    floor: float | None = None,
    batch_rows: int = 8,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (row, teacher logits, reference logits), each (time, vocab) in float32.

    The reference is the start of the model at the student's own prompt. Branches that are equal
    run once; at most `batch_rows` rows share a forward. No gradient.

    Args:
        teacher: Who teaches.
        reference: The model with its adapter off, or its frozen start.
        lessons: From `Teacher.lesson`.
        completions: Token ids of the student's answers.
        temperature: Divides all logits before the method combines them.
        floor: Share of the reference mixed into the teacher, in [0, 1); None is `DEFAULT_FLOOR`
            where the method rules tokens out, and 0 elsewhere.
        batch_rows: See above.
    """
    tuned = teacher.tuned
    items = [
        Continuation([lesson.prompt, *lesson.branches], tokens, _adapters(teacher, lesson))
        for lesson, tokens in zip(lessons, completions, strict=True)
    ]
    base = None if tuned is None else reference
    found = score(tuned or reference, items, rows=batch_rows, base=base)
    for i, z in enumerate(found):
        yield i, *_pair(teacher, lessons[i].method, z, temperature, floor)
        del z  # before the next forward needs the memory


def _pair(
    teacher: Teacher, method: Method | None, z: Tensor, temperature: float, floor: float | None
) -> tuple[Tensor, Tensor]:
    """Return the teacher's and the reference's logits from those of all rows of a lesson."""
    z = z if temperature == 1 else z / temperature
    z_s = z[:, 0]
    if method is None:
        return z_s, z_s
    masked = rules_out(cast(Hashable, method), z.shape[1] - 1)
    share = floor if floor is not None else DEFAULT_FLOOR if masked else 0.0
    if masked and share == 0:
        raise ConfigError(
            f'`floor` is 0, but teacher "{teacher.name}" rules tokens out: its divergence '
            f"is infinite. Give a `floor` such as {DEFAULT_FLOOR}, or no mask."
        )
    z_star = torch.empty_like(z_s)
    for t in range(0, len(z), SLICE):
        now = slice(t, t + SLICE)
        part = combined(method, z[now, 1:], t, temperature=temperature)
        z_star[now] = floored(part, z_s[now], share) if share else part
    return z_star, z_s


def _adapters(teacher: Teacher, lesson: Lesson) -> tuple[bool, ...] | None:
    """Return which rows of a lesson are a tuned model's: the branches that do not want its base."""
    if teacher.tuned is None:
        return None
    if lesson.method is None:
        return (False,) * (1 + len(lesson.branches))
    base = base_branches(lesson.method)
    return (False, *(k not in base for k in range(len(lesson.branches))))


@functools.lru_cache(maxsize=1024)
def rules_out(method: Hashable, branches: int) -> bool:
    """Return whether a method gives some tokens no probability, seen on random peaked logits."""
    assert isinstance(method, Method)
    logits = 8 * torch.randn(4, branches, 128, generator=torch.Generator().manual_seed(0))
    return bool(method.combine(logits).isneginf().any())


@torch.no_grad()
def teacher_effect(
    teacher: Teacher,
    reference: LanguageModel,
    rows: Sequence[Mapping[str, Any]],
    *,
    temperature: float = 1.0,
    floor: float | None = None,
    max_new_tokens: int = 32,
    seed: int = 0,
) -> float:
    """Return how far the teacher is from what the student is at the start, in nats a token.

    The mean of KL(teacher || reference) over tokens that the reference itself samples, on those
    rows that have a teacher of their own; nan if none has. 0 means that there is nothing to learn.
    """
    taught = [row for row in rows if teacher.row_method(row) is not None]
    if not taught:
        return float("nan")
    lessons = [teacher.lesson(reference, row) for row in taught]
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    requests = [
        Request(teacher.student_messages(reference, row), seed=seed + i)
        for i, row in enumerate(taught)
    ]
    answers = [c.token_ids for c in generate(reference, requests, sampling=sampling)]
    total, count = 0.0, 0
    for _, z_star, z_s in policies(
        teacher, reference, lessons, answers, temperature=temperature, floor=floor
    ):
        log_q, log_r = z_star.log_softmax(-1), z_s.log_softmax(-1)
        # KL(q || r) = sum_v q_v (log q_v - log r_v)
        total += float((log_q.exp() * (log_q - log_r)).sum())
        count += len(log_q)
    return total / count


def teacher_warning(
    teacher: Teacher, reference: LanguageModel, rows: Sequence[Mapping[str, Any]]
) -> str | None:
    """Return a line where the teacher's method has little to work with, or works backwards.

    Seen on greedy answers to the first rows, under the method's first prompt.
    """
    if teacher.tuned is not None:
        return None
    lessons = [teacher.lesson(reference, row) for row in rows[: effects.WATCHED]]
    prompts = [Prompt(x.branches, x.method) for x in lessons if x.method is not None]
    sampling = SamplingParams(max_new_tokens=effects.FIRST)
    decoder = Decoder(reference, share_prefixes=False)
    first = [Prompt(prompt.branches[:1], sampling=sampling) for prompt in prompts]
    return effects.warning(decoder, prompts, [c.token_ids for c in decoder.complete(first)])
