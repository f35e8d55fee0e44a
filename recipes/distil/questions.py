"""What is asked: prompts to train on, prompts to choose settings by, prompts to report on.

Training and development prompts come from the training side of the grammar in `recipes/tiny`, the
reported ones from its held-out side: unseen wordings of questions, unseen combinations of verb and
object in requests. No prompt is in two of the three splits (`tests/test_distil_recipe.py`).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tiny"))

from corpus import (
    Grammar,
    Turn,
    draw_turn,
    held_out_questions,
    held_out_requests,
    load_grammar,
    lower_first,
    upper_first,
    wrap,
)

DEV, TEST = "dev", "test"
CHAT = ("small_talk", "ordinary", "unsafe")
"""Kinds of chat that a principle about questions of fact should leave alone."""
DEV_SHARE = 4
"""One in so many prompts of the training side is a development prompt."""


@dataclass(frozen=True)
class Principle:
    """A principle in the words of a user (never in the model's corpus), and its judge."""

    name: str
    text: str
    pattern: str
    """Matches answers that follow it."""


@cache
def grammar() -> Grammar:
    """The grammar of the bundled model's corpus."""
    return load_grammar()


def principle(name: str) -> Principle:
    """The first held-out wording of the style `name`."""
    style = next(s for s in grammar().styles if s["name"] == name)
    return Principle(name, style["held_out"][0], style["pattern"])


def is_dev(text: str) -> bool:
    """Whether a prompt of the training side is kept for development: a function of its words."""
    return sum(text.lower().rstrip("?.!").encode()) % DEV_SHARE == 0


def _distinct(
    count: int, seed: int, dev: bool, draw: Callable[[random.Random], Turn]
) -> list[Turn]:
    rng, found, tries = random.Random(seed), dict[str, Turn](), 0
    while len(found) < count:
        tries += 1
        if tries > 100 * count:
            raise ValueError(f"There are only {len(found)} such prompts, not {count}.")
        turn = draw(rng)
        if is_dev(turn.user) == dev:
            found.setdefault(turn.user.lower().rstrip("?.!"), turn)
    return list(found.values())


def training(kind: str, count: int, seed: int) -> list[Turn]:
    """`count` distinct prompts to train on: "fact", or a kind of request or chat.

    Small talk comes from short lists and is therefore wrapped as questions are.
    """
    return _distinct(count, seed, False, _drawer(kind))


def _drawer(kind: str) -> Callable[[random.Random], Turn]:
    def draw(rng: random.Random) -> Turn:
        turn = draw_turn(grammar(), rng, kind)
        if kind != "small_talk":
            return turn
        wrapper = rng.choice(grammar().prompts["wrappers"])
        return Turn(kind, wrap(wrapper, turn.user), turn.answer)

    return draw


def questions(split: str, count: int, seed: int) -> list[Turn]:
    """`count` questions of fact to measure on, from the development or the held-out split."""
    if split == DEV:
        return _distinct(count, seed + 10_000, True, _drawer("fact"))
    return held_out_questions(grammar(), random.Random(seed), count)


def requests(kind: str, split: str, count: int, seed: int) -> list[str]:
    """`count` prompts of another kind than questions of fact to measure on."""
    if split == DEV:
        return [t.user for t in _distinct(count, seed + 20_000, True, _drawer(kind))]
    rng = random.Random(seed)
    if kind != "small_talk":
        return held_out_requests(grammar(), rng, kind, "test", count)
    # What is said is known; the wrapper around it is one of the held-out ones.
    wrappers = grammar().prompts["wrappers_held_out"]
    every = [text for talk in grammar().prompts["small_talk"] for text in talk["user"]]
    pairs = [w.format(Q=upper_first(t), q=lower_first(t)) for t in every for w in wrappers]
    return rng.sample(pairs, count)
