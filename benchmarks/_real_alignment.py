"""Linear Alignment on chat models: principles that a program checks, over ratio, mask and gate.

Greedy decoding makes ratio 0 the prompt alone under every mask and gate, so it is measured once,
as "prompt". Gates are measured where they can matter, from ratio 1 on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from benchmarks._real_questions import BLOCKS, BY_NAME, RULES, block_items
from benchmarks._real_world import NAMES, Task, World, markdown, over_groups, say, spanned
from trueline.engine.decoding import Decoder
from trueline.evals.items import Item
from trueline.evals.metrics import respond
from trueline.evals.patterns import matches
from trueline.evals.points import Point, Way, baseline_point
from trueline.evals.quality import repetition_rate
from trueline.evals.statistics import mcnemar, perplexity
from trueline.methods import LinearAlignment
from trueline.records.hashes import digest
from trueline.types import SamplingParams

SAMPLING = SamplingParams(max_new_tokens=64)
BATCH = 64
MEASURES = ("adherence", "topic", "both")
FIELDS = {f.name for f in dataclasses.fields(LinearAlignment)}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Linear Alignment at one ratio, mask and gate."""

    ratio: float
    candidates: float
    damping: float = 0.0
    gate: float = 1.0

    @property
    def label(self) -> str:
        """What tables call it."""
        kind = "soft" if self.damping else f"hard {self.gate:g}" if self.gate < 1 else "-"
        return f"{self.ratio:g} | {self.candidates:g} | {kind}"

    @property
    def point(self) -> Point:
        """What is decoded."""
        options = {k: v for k, v in dataclasses.asdict(self).items() if k in FIELDS}
        return Point(self.label, Way("linear-alignment", options), SAMPLING)

    @property
    def possible(self) -> bool:
        """Whether the method has such gates."""
        return "gate" in FIELDS or (not self.damping and self.gate == 1)


PLAIN, PROMPT = "plain | - | -", "prompt | - | -"
CORE = (Setting(1, 0.95), Setting(2, 0.8), Setting(2, 0.95, damping=1), Setting(1, 0.8),
        Setting(0.5, 0.95), Setting(2, 0.8, damping=1))  # fmt: skip
FURTHER = (Setting(2, 0.95), Setting(3, 0.95, damping=1), Setting(1, 0.95, damping=1),
           Setting(0.5, 0.8),
           Setting(2, 0.95, gate=0.6), Setting(2, 0.95, gate=0.9), Setting(3, 0.8),
           Setting(0.25, 0.95), Setting(1, 0.8, damping=1), Setting(3, 0.8, damping=1),
           Setting(2, 0.8, gate=0.6), Setting(3, 0.95), Setting(0.25, 0.8))  # fmt: skip


def points() -> dict[str, Point]:
    """Return label -> point, those of most worth first."""
    found = {PLAIN: baseline_point(SAMPLING), PROMPT: Point(PROMPT, Way("plain"), SAMPLING)}
    return found | {s.label: s.point for s in (*CORE, *FURTHER) if s.possible}


def key(label: str, block: int) -> str:
    """Return under which key a block's answers are kept."""
    return digest([label, SAMPLING.max_new_tokens, block])


def asked(label: str, block: int) -> list[Item]:
    """Return what is decoded of a block; without a principle each question once."""
    items = block_items(block)
    return items[:: len(RULES)] if label == PLAIN else items


def tasks(world: World, models: Sequence[str]) -> Iterator[Task]:
    """Yield a task for every model, setting and block of questions."""
    core = {PLAIN, PROMPT, *(s.label for s in CORE)}
    for block in range(1 if world.quick else BLOCKS):
        for rank, label in enumerate(points()):
            if world.quick and rank > 2:
                continue
            for model in models:
                worth = 100 - 10 * block - (0 if label in core else 5) - rank / 100
                yield _task(world, model, label, block, worth)


def _task(world: World, model: str, label: str, block: int, worth: float) -> Task:
    items = asked(label, block)[:: 17 if world.quick else 1]
    rows = world.rows("linear-alignment", model)
    own = key(label, block)

    def run() -> None:
        decoder = _decoder(world, model)
        respond(decoder, rows, own, points()[label], items, batch_size=len(items), seed=0)

    name = f"linear-alignment, {model}, {label.replace(' | ', ' ')}, block {block}"
    return Task(worth, name, lambda: rows.done(own, len(items)) == len(items), run)


@cache
def _decoder(world: World, model: str) -> Decoder:
    return Decoder(world.model(model), batch_size=BATCH, admission="each_step")


def judged(row: Mapping[str, Any]) -> dict[str, float]:
    """Return what an answer counts for: follows its principle, on topic (or the fact), both."""
    item = by_id()[row["id"]]
    ended = row["finish_reason"] == "stop"
    follows = float(BY_NAME[row["group"]].follows(row["text"], ended=ended))
    topic = float(matches(str(item.fact), row["text"], ignore_case=True))
    kind = "fact" if item.pattern == "fact" else "open"
    return {"adherence": follows, "topic": topic, "both": follows * topic, kind: topic}


@cache
def by_id() -> dict[str, Any]:
    """Return id -> item of all blocks."""
    return {item.id: item for block in range(BLOCKS) for item in block_items(block)}


def answers(world: World, model: str, label: str) -> list[dict[str, Any]]:
    """Return the rows of whole blocks that are there, each with what it counts for."""
    rows = world.rows("linear-alignment", model).rows
    found = []
    for block in range(BLOCKS):
        own = rows.get(key(label, block), [])
        if len(own) == len(asked(label, block)) or world.quick:
            found += [{**row, **judged(row)} for row in own]
    if label == PLAIN:  # one answer, judged under every principle
        again = [{**row, "group": r.name, "id": row["id"].replace(RULES[0].name, r.name)}
                 for row in found for r in RULES]  # fmt: skip
        return [{**row, **judged(row)} for row in again]
    return found


def summary(
    rows: Sequence[Mapping[str, Any]], against: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a setting's numbers, and how they differ from the prompt's on the same pairs."""
    groups = [row["group"] for row in rows]
    found: dict[str, Any] = {"n": len(rows), "principles": len(set(groups))}
    for name in MEASURES:
        found[name] = over_groups([row[name] for row in rows], groups)
    for kind in ("fact", "open"):
        values = [row[kind] for row in rows if kind in row]
        found[kind] = float(np.mean(values)) if values else None
    found["tokens"] = float(np.mean([len(row["token_ids"]) for row in rows]))
    found["repetition"] = float(np.mean([repetition_rate(row["token_ids"]) for row in rows]))
    losses = [(row["base_nll"], len(row["token_ids"])) for row in rows]
    found["perplexity"] = perplexity(losses, samples=500).value
    other = {row["id"]: row for row in against}
    pairs = [(row, other[row["id"]]) for row in rows if row["id"] in other]
    found["pairs"] = len(pairs)
    if pairs:
        for name in MEASURES:
            a, b = ([pair[i][name] for pair in pairs] for i in (0, 1))
            less = [x - y for x, y in zip(a, b, strict=True)]
            found[f"{name}_gain"] = over_groups(less, [row["group"] for row, _ in pairs])
            found[f"{name}_p"] = mcnemar(a, b)
    return found


def report(world: World, models: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the tables, and the numbers behind them."""
    parts, numbers = [], {}
    for model in models:
        prompt = answers(world, model, PROMPT)
        own = {label: rows for label in points() if (rows := answers(world, model, label))}
        if not own:
            continue
        found = {label: summary(rows, prompt) for label, rows in own.items()}
        numbers[model] = {"settings": found, "principles": _by_principle(own)}
        parts += [f"### {NAMES[model]}", _table(found), _principles(own)]
    return "\n\n".join(parts), numbers


def _table(found: Mapping[str, Mapping[str, Any]]) -> str:
    header = ("ratio", "mask", "gate", "n", "adherence", "on topic", "both",
              "both, less the prompt's", "p", "fact", "tokens", "repetition",
              "perplexity")  # fmt: skip
    lines = []
    for label, x in found.items():
        gain = spanned(x["both_gain"]) if label != PROMPT and x["pairs"] else ""
        p = f"{x['both_p']:.1g}" if gain else ""
        fact = "" if x["fact"] is None else f"{x['fact']:.2f}"
        size = f"{x['tokens']:.0f}", f"{x['repetition']:.3f}", f"{x['perplexity']:.1f}"
        measures = [spanned(x[m]) for m in MEASURES]
        lines.append([*label.split(" | "), x["n"], *measures, gain, p, fact, *size])
    return markdown(header, lines)


def _by_principle(own: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label, rows in own.items():
        for name in BY_NAME:
            mine = [row for row in rows if row["group"] == name]
            if mine:
                means = {m: float(np.mean([row[m] for row in mine])) for m in MEASURES}
                found.setdefault(name, {})[label] = means
    return found


def _principles(own: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return adherence / on topic of every principle under the settings of most worth."""
    shown = [label for label in (PLAIN, PROMPT, *(s.label for s in CORE)) if label in own]
    found = _by_principle({label: own[label] for label in shown})
    lines = []
    for name, cells in found.items():
        pairs = [cells.get(label) for label in shown]
        lines.append(
            [name, *(f"{c['adherence']:.2f} / {c['topic']:.2f}" if c else "" for c in pairs)]
        )
    heads = [label.replace(" | ", " ").replace(" -", "") for label in shown]
    return markdown(("adherence / on topic", *heads), lines)


def told(world: World, models: Sequence[str]) -> None:
    """Say on stderr how many answers there are."""
    for model in models:
        count = sum(map(len, world.rows("linear-alignment", model).rows.values()))
        say(f"linear-alignment, {model}: {count} answers")
