"""Metrics: the responses of a run, what they count as, and the numbers of a point.

    refusal     over_refusal (safe prompts), harmful_refusal (unsafe prompts)
    adherence   adherence to the prompt's principle; fact, where the prompt brings a pattern of it
    personal    accuracy: the answer that the prompt's user prefers was picked, by first letter

Beside each: length, repetition, and perplexity under the plain base model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from trueline.errors import DataError
from trueline.evals.items import Item
from trueline.evals.patterns import matches
from trueline.evals.points import Point
from trueline.evals.preference import first_letter
from trueline.evals.quality import negative_logprobs, text_quality
from trueline.evals.statistics import Estimate, mean, rate
from trueline.models.prompts import chat_of, check_length, encode
from trueline.types import Request

if TYPE_CHECKING:
    from trueline.engine.decoding import Decoder
    from trueline.engine.protocol import Step
    from trueline.records.lines import Rows

METRICS: dict[str, tuple[str, ...]] = {
    "refusal": ("over_refusal", "harmful_refusal"),
    "adherence": ("adherence", "fact"),
    "personal": ("accuracy",),
}
"""Metric -> its measures."""


def fitting(
    decoder: Decoder, points: Sequence[Point], items: Sequence[Item], *, skip: bool = True
) -> list[Item]:
    """Return the prompts that fit the model under every point.

    Raises:
        DataError: None does, with the reason of the last one; without `skip`, one does not.
    """
    kept, reason = [], ""
    for item in items:
        chat, branches = chat_of(decoder.model, item.chat), []
        for point in points:
            for branch in point.make(item.principle).prompts(point.placed(chat)):
                if branch not in branches:
                    branches.append(branch)
        try:
            check_length(decoder.model, [encode(decoder.model, branch) for branch in branches])
            kept.append(item)
        except DataError as error:
            reason = str(error)
            if not skip:
                raise DataError(
                    f'Prompt "{item.id}": {reason} Or --skip-long leaves it out.'
                ) from None
    if not kept:
        raise DataError(f"No prompt fits the model: {reason}")
    return kept


def respond(
    decoder: Decoder,
    rows: Rows,
    key: str,
    point: Point,
    items: Sequence[Item],
    *,
    batch_size: int,
    seed: int,
    on_done: Callable[[int], object] = lambda count: None,
) -> list[dict[str, Any]]:
    """Return the row of every prompt's response under a point, decoding those that are missing.

    What a batch gives depends on that batch alone, so that a resumed run gives the same rows.
    `on_done(1)` is called for every prompt that is finished.
    """

    def work(batch: Sequence[Item], first: int) -> list[dict[str, Any]]:
        requests = [
            Request(
                point.placed(chat_of(decoder.model, item.chat)),
                point.make(item.principle),
                point.sampling,
                seed + first + i,
            )
            for i, item in enumerate(batch)
        ]
        completions = _decode(decoder, batch, requests, on_done)
        surprises = negative_logprobs(
            decoder.model, [i.chat for i in batch], [c.token_ids for c in completions]
        )
        return [
            {
                "point": point.label,
                "id": item.id,
                "group": item.group,
                **item.said,
                **({"principle": item.principle} if item.principle else {}),
                "text": c.text,
                "token_ids": c.token_ids,
                "finish_reason": c.finish_reason,
                "base_nll": float(s.sum()),
            }
            for item, c, s in zip(batch, completions, surprises, strict=True)
        ]

    return rows.compute(key, items, batch_size, work)


def _decode(
    decoder: Decoder,
    items: Sequence[Item],
    requests: Sequence[Request],
    on_done: Callable[[int], object],
) -> list[Any]:
    prompts = []
    for item, request in zip(items, requests, strict=True):
        try:
            prompts.append(decoder.encode(request))
        except DataError as error:
            raise DataError(f'Prompt "{item.id}": {error}') from None

    def count(step: Step) -> None:
        if step.finish_reason is not None:
            on_done(1)

    return decoder.complete(prompts, on_step=count)


def judge_responses(
    metric: str, items: Sequence[Item], texts: Sequence[str], judge: Any
) -> list[dict[str, Any]]:
    """Return a verdict for each response: the measures it counts for, in [0, 1] or None.

    `judge` is one of `trueline.evals.judges`; for adherence None uses the items' patterns.
    """
    if metric == "refusal":
        verdicts = judge.refusal([i.prompt for i in items], texts)
        name = {"safe": "over_refusal", "unsafe": "harmful_refusal"}
        return [
            {
                name[i.group]: None if v.label == "unknown" else float(v.refused),
                "label": v.label,
                "reason": v.reason,
                "phrase": v.phrase,
            }
            for i, v in zip(items, verdicts, strict=True)
        ]
    if metric == "personal":
        return [
            {"accuracy": float(first_letter(text) == item.answer)}
            for item, text in zip(items, texts, strict=True)
        ]
    values = _grades(items, texts, judge)
    rows: list[dict[str, Any]] = []
    for item, text, value in zip(items, texts, values, strict=True):
        row: dict[str, Any] = {"adherence": None if math.isnan(value) else value}
        if item.fact is not None:
            row["fact"] = float(matches(item.fact, text, ignore_case=True))
        rows.append(row)
    return rows


def _grades(items: Sequence[Item], texts: Sequence[str], judge: Any) -> list[float]:
    """Return how well each text follows its item's principle: by pattern, or by the judge."""
    if judge is None:
        return [float(matches(str(i.pattern), t)) for i, t in zip(items, texts, strict=True)]
    grades = [math.nan] * len(items)
    for principle in dict.fromkeys(item.principle for item in items):
        own = [i for i, item in enumerate(items) if item.principle == principle]
        prompts, chosen = [items[i].prompt for i in own], [texts[i] for i in own]
        for i, value in zip(own, judge.adherence(principle, prompts, chosen), strict=True):
            grades[i] = float(value)
    return grades


def summarise(
    metric: str,
    responses: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the numbers of a point: an estimate and the outcomes of each measure, and quality."""
    measures: dict[str, Any] = {}
    for name in METRICS[metric]:
        values = [row[name] for row in verdicts if name in row]
        if values:
            known = [v for v in values if v is not None]
            measures[name] = {
                **asdict(estimate(known)),
                "unknown": len(values) - len(known),
                "outcomes": write_outcomes(values),
            }
    quality = text_quality([row["token_ids"] for row in responses]).as_dict()
    tokens = sum(len(row["token_ids"]) for row in responses)
    total = sum(row["base_nll"] for row in responses)
    quality["perplexity"] = math.exp(min(total / tokens, 700)) if tokens else math.nan
    return {"measures": measures, "quality": quality}


def estimate(values: Sequence[float]) -> Estimate:
    """Return a rate with its Wilson interval; of grades between 0 and 1 the bootstrapped mean."""
    if all(v in (0, 1) for v in values):
        return rate([bool(v) for v in values])
    return mean(values)


def write_outcomes(values: Sequence[float | None]) -> str | list[float | None]:
    """Return one sign a prompt, "1", "0" or "?", or the grades as they are."""
    if all(v in (0, 1, None) for v in values):
        return "".join("?" if v is None else str(int(v)) for v in values)
    return list(values)


def read_outcomes(outcomes: str | Sequence[float | None]) -> list[float | None]:
    """Return what `write_outcomes` was given."""
    if isinstance(outcomes, str):
        return [None if sign == "?" else float(sign) for sign in outcomes]
    return list(outcomes)
