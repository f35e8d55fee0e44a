"""Items: the prompts of a run and what it takes to judge their responses."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from trueline.errors import ConfigError, DataError
from trueline.evals.datasets import PersonalQuestion, load_prompts


@dataclass(frozen=True)
class Item:
    """A prompt of a run and what it takes to judge the response."""

    id: str
    prompt: str
    group: str
    """"safe" or "unsafe"; elsewhere the kind of the prompt."""
    principle: str | None = None
    pattern: str | None = None
    """Of responses that follow the principle."""
    fact: str | None = None
    """Of responses that hold the fact asked for."""
    answer: int | None = None
    """Which letter the user prefers, 0 for A."""


def bundled() -> dict[str, Any]:
    """Return what the bundled model never saw in training."""
    path = resources.files("trueline") / "assets/tiny/held_out.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def refusal_items(safe: str | None, unsafe: str | None, limit: int | None = None) -> list[Item]:
    """Return safe and unsafe prompts from files; rows that a file itself marks otherwise are out.

    At most `limit` of each kind. Without files they are the bundled model's held-out requests.
    """
    items: list[Item] = []
    if safe is None and unsafe is None:
        content = bundled()
        for group, texts in (("safe", content["safe_triggers"]), ("unsafe", content["unsafe"])):
            kept = [
                Item(f"{group}-{i}", text, group) for i, text in enumerate(dict.fromkeys(texts), 1)
            ]
            items += kept[:limit]
        return items
    for group, source in (("safe", safe), ("unsafe", unsafe)):
        if source is not None:
            wanted = group == "safe"
            rows = [row for row in load_prompts(source) if row.safe in (None, wanted)]
            if not rows:
                raise DataError(f"{source}: none of its prompts is {group}.")
            items += [Item(row.id, row.prompt, group) for row in rows[:limit]]
    return items


def adherence_items(
    source: str | None,
    *,
    principle: str | None = None,
    pattern: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Item]:
    """Return prompts with their principles: of a file, or pairs of the bundled held-out ones.

    A row's own `principle` and `pattern` go before those given here. Of the bundled ones at most
    `limit` (120) pairs, every principle and question as often as any other.
    """
    if source is None:
        content = bundled()
        principles, questions = list(content["principles"]), _distinct(content["questions"])
        if principle is not None:
            principles = [{"name": "principle", "text": principle, "pattern": pattern}]
        rng = random.Random(seed)
        rng.shuffle(principles)
        rng.shuffle(questions)
        items = []
        for j in range(min(limit or 120, len(principles) * len(questions))):
            turn, i = divmod(j, len(principles))
            p, q = principles[i], questions[(i + turn) % len(questions)]
            items.append(
                Item(str(j + 1), q["question"], p["name"], p["text"], p["pattern"], q["fact"])
            )
    else:
        items = []
        for row in load_prompts(source)[:limit]:
            own, form = row.row.get("principle") or principle, row.row.get("pattern") or pattern
            items.append(Item(row.id, row.prompt, row.group or "prompt", own, form))
    for item in items:
        if item.principle is None:
            raise DataError(f'Prompt "{item.id}" has no principle. Give --principle TEXT.')
        _compiled(item.pattern)
        _compiled(item.fact)
    return items


def personal_items(questions: Sequence[PersonalQuestion]) -> list[Item]:
    """Return a prompt for every question and user, as the Linear Alignment paper asks them."""
    from trueline.evals.preference import personal_principle, personal_prompt

    return [
        Item(f"{q.id}:{u}", personal_prompt(q), f"user {u + 1}", personal_principle(user), answer=u)
        for q in questions
        for u, user in enumerate(q.users)
    ]


def _distinct(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return list({row["question"]: row for row in rows}.values())


def _compiled(pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ConfigError(f'"{pattern}" is no regular expression: {error}.') from None
