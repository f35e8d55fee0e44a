"""Scored: measurements by the probability of given answers, with nothing decoded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError, DataError
from trueline.evals.datasets import PersonalQuestion, load_pairs, load_personal
from trueline.evals.items import spread, told
from trueline.evals.likelihood import branch_items, response_ids
from trueline.evals.points import Point
from trueline.evals.preference import (
    LETTERS,
    branch_weights,
    implicit_rewards,
    personal_accuracy,
    personal_chat,
    personal_choices,
    personal_principle,
    reward_accuracy,
)
from trueline.jobs.sessions import Calling, MeasureResults, measure_rows
from trueline.methods import describe_method
from trueline.models.load import LanguageModel
from trueline.records.hashes import digest
from trueline.types import Method

if TYPE_CHECKING:
    from trueline.jobs.measurement import MeasureConfig


def measure_rewards(config: MeasureConfig, calling: Calling) -> MeasureResults:
    """Return how often the chosen answer of a pair has the higher implicit reward."""
    assert config.pairs is not None
    method = Point("", config.way, config.sampling).make()
    branch_weights(method, len(method.prompts([{"role": "user", "content": "?"}])))
    every = load_pairs(config.pairs, system=config.system)
    pairs = spread(every, [None] * len(every), config.limit, config.seed)
    model, settings = calling.load(config.source)
    data = {"sources": config.sources, "n": len(pairs), "sha256": digest([told(p) for p in pairs])}
    settings |= {"method": describe_method(method), "data": data}

    def work(batch: Sequence[Any], _: int) -> list[dict[str, Any]]:
        rewards = implicit_rewards(model, method, batch, batch_size=16, skip_long=True)
        return [
            {"id": pair.id, "chosen": float(a), "rejected": float(b)}
            for pair, (a, b) in zip(batch, rewards, strict=True)
        ]

    def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        values = [[math.nan if row[k] is None else row[k] for k in ("chosen", "rejected")]
                  for row in rows]  # fmt: skip
        return reward_accuracy(values).as_dict()

    title = f"Implicit reward: {method.name} on {config.source.name}"
    return measure_rows(
        "implicit_reward", title, settings, pairs, lambda _: (work, {}, None), numbers, calling,
        batch_size=config.batch_size, of=len(every),
    )  # fmt: skip


def measure_letters(config: MeasureConfig, calling: Calling) -> MeasureResults:
    """Return how often the letter that a user prefers is the likeliest."""
    assert config.questions is not None
    way = config.way
    if "principle" not in way.defaults:
        raise ConfigError(f'Method "{way.method}" takes no principle, so it knows no user.')

    def method_for(principle: str) -> Method:
        return Point("", way, config.sampling).make(principle)

    every = load_personal(config.questions, system=config.system)
    questions = spread(every, [len(q.users) for q in every], config.limit, config.seed)
    shown = describe_method(method_for(personal_principle("...")))
    (model, settings), count = calling.load(config.source), len(questions)
    questions = questions_that_fit(model, questions, method_for, skip=config.skip_long)
    data = {"sources": config.sources, "n": len(questions), "skipped": count - len(questions)}
    data["sha256"] = digest([told(q) for q in questions])
    settings |= {"method": shown, "data": data}

    def work(batch: Sequence[Any], _: int) -> list[dict[str, Any]]:
        choices = personal_choices(model, batch, method_for, by="logprob")
        return [
            {"id": q.id, "choices": row} for q, row in zip(batch, choices.tolist(), strict=True)
        ]

    def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"accuracy": asdict(personal_accuracy([row["choices"] for row in rows]))}

    title = f"Personal preference: {way.method} on {config.source.name}"
    return measure_rows(
        "personal_logprob", title, settings, questions, lambda _: (work, {}, None), numbers,
        calling, batch_size=config.batch_size, of=len(every),
    )  # fmt: skip


def questions_that_fit(
    model: LanguageModel, questions: Sequence[PersonalQuestion], method_for: Any, *, skip: bool
) -> list[PersonalQuestion]:
    """Return the questions that fit the model for every user; without `skip` all must."""
    kept, reason = [], ""
    for q in questions:
        chat = personal_chat(q)
        letter = response_ids(model, chat, LETTERS[0])
        try:
            for user in q.users:
                branch_items(model, method_for(personal_principle(user)), [chat], [letter])
            kept.append(q)
        except DataError as error:
            reason = str(error)
            if not skip:
                raise DataError(
                    f'Question "{q.id}": {reason} Or --skip-long leaves it out.'
                ) from None
    if not kept:
        raise DataError(f"No question fits the model: {reason}")
    return kept
