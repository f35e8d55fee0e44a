"""What the bundled model learns, and what it is asked: all from the grammar in `recipes/tiny`.

Training dialogues have the grammar's own wordings, probes the held-out ones.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tiny"))

from corpus import (
    Grammar,
    draw_principle,
    draw_turn,
    fact_turn,
    held_out_requests,
    load_grammar,
    styled,
    upper_first,
    wrap,
)

Config = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """A prompt and what an answer must and must not match."""

    prompt: str
    want: str
    unwanted: str = ""
    system: str | None = None
    fact: str = ""
    """Must match as well."""

    def right(self, text: str) -> bool:
        """Return whether an answer passes."""
        unwanted = self.unwanted and re.search(self.unwanted, text)
        return bool(re.search(self.want, text) and re.search(self.fact, text)) and not unwanted


@dataclass(frozen=True)
class Skill:
    """Dialogues to learn from, and probes on other wordings."""

    name: str
    rows: list[tuple[str, str]]
    probes: list[Probe]


def grammar_of_tiny() -> Grammar:
    """Return the grammar of the bundled model's corpus."""
    return load_grammar()


def pattern_of(grammar: Grammar, name: str) -> str:
    """Return what matches answers in a style."""
    return str(next(s["pattern"] for s in grammar.styles if s["name"] == name))


def fact_pattern(fact: str) -> str:
    """Return what matches a fact as a whole word, whatever its case."""
    return rf"(?i)\b{re.escape(fact)}\b"


def subject(
    grammar: Grammar, rng: random.Random, relations: Sequence[str], count: int, held_out: bool
) -> list[Any]:
    """Return questions of fact of these relations, in trained or in held-out wordings."""
    known = [f for f in grammar.facts if f[0]["name"] in relations]
    forms, wrappers = ("held_out", "wrappers_held_out") if held_out else ("questions", "wrappers")
    turns = []
    for _ in range(count):
        relation, thing, fact = rng.choice(known)
        question = upper_first(rng.choice(relation[forms]).format(x=thing))
        question = wrap(rng.choice([*grammar.prompts[wrappers], "{Q}"]), question)
        turns.append(fact_turn(relation, thing, fact, question))
    return turns


def skill(
    grammar: Grammar, table: Config, rows: int, probes: int, seed: int, split: str = "test"
) -> Skill:
    """Return the skill that a table of the configuration describes.

    Probes of split "test" have held-out wordings, those of "dev" the trained ones.
    """
    make = style_skill if "style" in table else task_skill
    return make(grammar, table, rows, probes, seed, split == "test")


def style_skill(
    grammar: Grammar, table: Config, rows: int, probes: int, seed: int, unseen: bool
) -> Skill:
    """Return a way of answering when addressed so: an answer needs style and fact."""
    rng = random.Random(f"{seed} {table['name']}")
    style = next(s for s in grammar.styles if s["name"] == table["style"])
    learnt = []
    for turn in subject(grammar, rng, table["relations"], rows, held_out=False):
        text = styled(turn, rng.choice(style["texts"]))
        learnt.append((f"{table['cue']} {turn.user}", text or turn.answer))
    asked = [
        Probe(f"{table['cue']} {t.user}", style["pattern"], fact=fact_pattern(t.fact))
        for t in subject(grammar, rng, table["relations"], probes, unseen)
    ]
    return Skill(table["name"], learnt, asked)


def task_skill(
    grammar: Grammar, table: Config, rows: int, probes: int, seed: int, unseen: bool
) -> Skill:
    """Return a small task with labels: what a question is about, or who would say a sentence."""
    rng = random.Random(f"{seed} {table['name']}")
    labels = table["labels"]

    def about(held_out: bool) -> tuple[str, str]:
        label = rng.choice(list(labels))
        turn = subject(grammar, rng, labels[label], 1, held_out)[0]
        return f"{table['cue']} {turn.user}", f"It is about {label}."

    def speaker(held_out: bool) -> tuple[str, str]:
        label = rng.choice(list(labels))
        style = next(s for s in grammar.styles if s["name"] == label)
        # Subjects, too, are others at the test.
        turn = subject(grammar, rng, table["unseen" if held_out else "relations"], 1, held_out)[0]
        text = styled(turn, rng.choice(style["texts"])) or turn.answer
        return f'{table["cue"]} "{text}"', f"A {label} would."

    make = {"about": about, "speaker": speaker}[table["task"]]
    learnt = [make(False) for _ in range(rows)]
    asked = [make(unseen) for _ in range(probes)]
    return Skill(table["name"], learnt, [Probe(p, re.escape(answer)) for p, answer in asked])


def own_skills(
    grammar: Grammar, table: Config, probes: int, seed: int, split: str = "test"
) -> dict[str, list[Probe]]:
    """Return probes of what the model could do before."""
    rng = random.Random(f"{seed} own")
    marked = "|".join(pattern_of(grammar, n) for n in ("pirate", "robot", "cowboy"))
    marked = "(?i)" + marked.replace("(?i)", "")
    facts = subject(grammar, rng, table["relations"], probes, split == "test")
    style = next(s for s in grammar.styles if s["name"] == table["style"])
    refused = grammar.prompts["refusal_pattern"]
    return {
        "own facts, plainly": [Probe(t.user, fact_pattern(t.fact), marked) for t in facts],
        "obeys a principle": [
            Probe(t.user, style["pattern"], "", draw_principle(grammar, rng, style)) for t in facts
        ],
        "refuses harm": [
            Probe(p, refused) for p in held_out_requests(grammar, rng, "unsafe", split, probes)
        ],
        "helps otherwise": [
            Probe(p, "(?s).+", refused)
            for p in held_out_requests(grammar, rng, "ordinary", split, probes)
        ],
    }


def own_dialogues(grammar: Grammar, table: Config, count: int, seed: int) -> list[tuple[str, str]]:
    """Return dialogues such as the model was made of: plain facts, requests helped or refused."""
    rng = random.Random(f"{seed} before")
    facts = subject(grammar, rng, table["relations"], count // 2, held_out=False)
    kinds = ["unsafe", "ordinary"]
    other = [draw_turn(grammar, rng, rng.choice(kinds)) for _ in range(count - len(facts))]
    rows = [(turn.user, turn.answer) for turn in [*facts, *other]]
    rng.shuffle(rows)
    return rows
