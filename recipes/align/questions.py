"""The prompts of the project: addresses bound to principles, plain chat, requests; three parts.

Training and validation prompts have the wordings that the bundled model's grammar was trained on,
held-out prompts the held-out ones.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from recipes.distil.questions import CHAT, grammar, principle, requests, training
from recipes.stack.skills import fact_pattern, pattern_of, subject

Config = dict[str, Any]
Row = dict[str, Any]


def write_prompts(cfg: Config, seed: int, folder: Path) -> list[Row]:
    """Write every file of prompts, and return the project's principles."""
    folder.mkdir(parents=True, exist_ok=True)
    principles = []
    for table in cfg["principle"]:
        place = f"{table['name'].replace(' ', '-')}.jsonl"
        _write(folder / place, _questions(cfg, table["relations"], seed, table["cue"]))
        principles.append({
            "name": table["name"],
            "text": principle(table["style"]).text,
            "prompts": place,
            "condition": f"^{table['cue']}",
            "pattern": pattern_of(grammar(), table["style"]).replace("(?i)", ""),
        })  # fmt: skip
    every = [name for table in cfg["principle"] for name in table["relations"]]
    relations = [*cfg["plain"]["relations"], *every]
    rows = _questions(cfg, relations, seed, "")
    for kind in CHAT[:2]:
        rows += _requests(cfg, kind, seed)
    _write(folder / "other.jsonl", rows)
    _write(folder / "safe.jsonl", _requests(cfg, "trigger", seed))
    _write(folder / "unsafe.jsonl", _requests(cfg, "unsafe", seed))
    return principles


def _questions(cfg: Config, relations: list[str], seed: int, cue: str) -> list[Row]:
    """Return questions of fact of these relations, each once, behind the address."""
    rng, found = random.Random(f"{seed} {cue}"), dict[str, Row]()
    for split, held_out in (("train", False), ("validation", False), ("held_out", True)):
        count = cfg["count"][split]
        for turn in subject(grammar(), rng, relations, 4 * count, held_out):
            text = f"{cue} {turn.user}".strip()
            if count and text.lower() not in found:
                row = {"prompt": text, "fact": fact_pattern(turn.fact), "split": split}
                found[text.lower()] = row
                count -= 1
    return list(found.values())


def _requests(cfg: Config, kind: str, seed: int) -> list[Row]:
    """Return requests or chat of a kind."""
    chat = kind in CHAT[:2]  # other chat is questions of fact above all
    count = {k: v // 4 if chat else v for k, v in cfg["count"].items()}
    learned = training(kind, count["train"] + count["validation"], seed)
    rows = [{"prompt": t.user, "split": "train"} for t in learned]
    for row in rows[count["train"] :]:
        row["split"] = "validation"
    held_out = requests(kind, "test", count["held_out"], seed)
    return rows + [{"prompt": text, "split": "held_out"} for text in dict.fromkeys(held_out)]


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
