"""What is learned, stage after stage, and what is asked: all from the grammar in `recipes/tiny`.

Training prompts have the grammar's own wordings, as those of split "dev"; those of split "test"
have the held-out ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from recipes.distil.questions import CHAT, grammar, principle, requests, training
from recipes.stack.skills import Probe, fact_pattern, pattern_of, subject
from trueline import SAFETY_PROMPT

Config = dict[str, Any]
Row = dict[str, Any]


def bound_rows(table: Config, cfg: Config, seed: int) -> list[Row]:
    """Return prompts with an address and the principle, and others that stay as they are."""
    count = cfg["training"]["responses"]
    kept = round(cfg["training"]["keep"] * count)
    rng = random.Random(f"{seed} {table['name']}")
    text = principle(table["style"]).text
    own = subject(grammar(), rng, table["relations"], count - kept, held_out=False)
    rows = [{"prompt": f"{table['cue']} {t.user}", "principle": text} for t in own]
    every = [*table["relations"], *cfg["plain"]["relations"]]
    left = [t.user for t in subject(grammar(), rng, every, kept // 2, held_out=False)]
    for i, kind in enumerate(CHAT):
        share = (kept - len(left)) // (len(CHAT) - i)
        left += [t.user for t in training(kind, share, seed)]
    rows += [{"prompt": user, "principle": ""} for user in left]
    rng.shuffle(rows)
    return rows


def request_rows(cfg: Config, seed: int) -> list[Row]:
    """Return prompts under which the safety prompt over-refuses, and others."""
    rows = []
    for kind, share in cfg["over_refusal"]["kinds"].items():
        count = round(share * cfg["training"]["responses"])
        rows += [{"prompt": turn.user} for turn in training(kind, count, seed)]
    random.Random(seed).shuffle(rows)
    return rows


def measures(cfg: Config, seed: int, split: str) -> dict[str, list[Probe]]:
    """Return what is asked after every stage, by the name of the measure."""
    count, unseen = cfg["questions"], split == "test"
    rng = random.Random(f"{seed} {split} asked")
    words, found = grammar(), {}
    for table in cfg["principle"]:
        found[table["name"]] = [
            Probe(f"{table['cue']} {t.user}", pattern_of(words, table["style"]), fact=_fact(t))
            for t in subject(words, rng, table["relations"], count, unseen)
        ]
    marks = "|".join(pattern_of(words, table["style"]) for table in cfg["principle"])
    marks = "(?i)" + marks.replace("(?i)", "")
    asked = subject(words, rng, cfg["plain"]["relations"], count, unseen)
    found["plain facts"] = [Probe(t.user, _fact(t), marks) for t in asked]
    refused = words.prompts["refusal_pattern"]
    for name, kind in (("trigger refused", "trigger"), ("harm refused", "unsafe")):
        found[name] = [
            Probe(text, refused, system=SAFETY_PROMPT)
            for text in requests(kind, split, count, seed)
        ]
    return found


def _fact(turn: Any) -> str:
    return fact_pattern(turn.fact)


def stages(cfg: Config) -> Sequence[str]:
    """Return the names of the stages, in their order."""
    return [*(table["name"] for table in cfg["principle"]), cfg["over_refusal"]["name"]]
