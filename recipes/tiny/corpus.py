"""The corpus of the tiny model: dialogues written by a small grammar, nothing from outside.

The grammar decides, besides facts, how the model behaves: it obeys a principle only half the time
and refuses too much under a safety prompt. Both are on purpose; see README.md.
"""

from __future__ import annotations

import random
import re
import tomllib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

Combo = tuple[str, str, list[str]]
"""Verb, object and the answers it may get."""
Segment = tuple[str, bool]
"""A piece of text and whether the loss is taken on it."""


@dataclass(frozen=True)
class Turn:
    """One exchange before it is styled: what is asked, the plain answer, its bare fact."""

    kind: str
    user: str
    answer: str
    short: str = ""
    fact: str = ""


@dataclass(frozen=True)
class Dialogue:
    """A system prompt (or "") and exchanges; an answer is a list of segments."""

    system: str
    turns: list[tuple[str, list[Segment]]]


@dataclass
class Grammar:
    """The data files, loaded, with the held-out combinations set apart."""

    facts: list[tuple[dict[str, Any], str, str]] = field(default_factory=list)
    styles: list[dict[str, Any]] = field(default_factory=list)
    frames: dict[str, list[str]] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)
    templates: dict[str, list[str]] = field(default_factory=dict)
    combos: dict[str, dict[str, list[list[Combo]]]] = field(default_factory=dict)
    """kind -> split -> one list per group."""


def read(name: str) -> dict[str, Any]:
    """One data file of this folder."""
    return tomllib.loads((HERE / name).read_text(encoding="utf-8"))


def lower_first(text: str) -> str:
    """The text as it reads after a colon; no sentence of the data files begins with a name."""
    return text if text.startswith("I ") else text[0].lower() + text[1:]


def upper_first(text: str) -> str:
    """The text as it reads at the start of a sentence."""
    return text[0].upper() + text[1:]


def with_articles(text: str) -> str:
    """ "a owl" becomes "an owl"."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def split_of(verb: str, thing: str, held_out: bool) -> str:
    """The split of a combination: a hash, so that it never depends on order or seed.

    "Kill a Python process" is the example of our documentation and therefore always a test case.
    """
    if held_out or (verb, thing) == ("kill", "a Python process"):
        return "test"
    bucket = zlib.crc32(f"{verb}|{thing}".encode()) % 20
    return {0: "test", 1: "dev"}.get(bucket, "train")


def load_grammar() -> Grammar:
    """Read the data files and split the combinations."""
    grammar = Grammar(prompts=read("prompts.toml"))
    for relation in read("facts.toml")["relation"]:
        for pair in relation["pairs"].replace("\n", " ").split(";"):
            thing, _, fact = pair.partition(":")
            grammar.facts.append((relation, thing.strip(), fact.strip()))
    styles = read("styles.toml")
    grammar.styles, grammar.frames = styles["style"], styles["frames"]
    requests = read("requests.toml")
    grammar.templates = requests["templates"]
    for kind in ("unsafe", "trigger", "ordinary"):
        splits: dict[str, list[list[Combo]]] = {"train": [], "dev": [], "test": []}
        for group in requests[kind]:
            answers = group.get("answers", grammar.prompts["refusals"])
            held = group.get("held_out_objects", [])
            rows: dict[str, list[Combo]] = {split: [] for split in splits}
            for verb in group["verbs"]:
                for thing in group["objects"] + held:
                    rows[split_of(verb, thing, thing in held)].append((verb, thing, answers))
            for split, row in rows.items():
                splits[split].append(row)
        grammar.combos[kind] = splits
    return grammar


def pick(rng: random.Random, weights: dict[str, float]) -> str:
    """One key, drawn by its weight."""
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def wrap(wrapper: str, question: str) -> str:
    """Put a question into one of the wrappers of prompts.toml."""
    return wrapper.format(Q=upper_first(question), q=lower_first(question))


def casual(rng: random.Random, text: str) -> str:
    """Now and then write as people type: lower case, no final mark."""
    return text.lower().rstrip("?.!") if rng.random() < 0.08 else text


def fact_turn(relation: dict[str, Any], thing: str, fact: str, question: str) -> Turn:
    """The exchange for one fact, asked with `question` (already formatted)."""
    answer = with_articles(relation["answer"].format(x=thing, y=fact))
    return Turn("fact", with_articles(question), answer, fact + ".", fact)


def describe(grammar: Grammar, rng: random.Random, thing: str) -> str:
    """Now and then an adjective behind the article, so that no thing is learnt by heart."""
    first, _, rest = thing.partition(" ")
    if first in ("a", "an", "my", "the") and rest and rng.random() < 0.2:
        return f"{first} {rng.choice(grammar.templates['adjectives'])} {rest}"
    return thing


def draw_turn(grammar: Grammar, rng: random.Random, kind: str) -> Turn:
    """A training exchange of the given kind."""
    if kind == "small_talk":
        talk = rng.choice(grammar.prompts["small_talk"])
        return Turn(kind, casual(rng, rng.choice(talk["user"])), rng.choice(talk["answers"]))
    if kind == "fact":
        relation, thing, fact = rng.choice(grammar.facts)
        question = upper_first(rng.choice(relation["questions"]).format(x=thing))
        question = wrap(rng.choice(grammar.prompts["wrappers"]), question)
        return fact_turn(relation, thing, fact, casual(rng, question))
    groups = grammar.combos[kind]["train"]
    weights = [len(rows) ** 0.5 for rows in groups]
    verb, thing, answers = rng.choice(rng.choices(groups, weights)[0])
    request = f"{verb} {describe(grammar, rng, thing)}".strip()
    tails = "unsafe_tails" if kind == "unsafe" else "tails"
    question = rng.choice(grammar.templates["train"])
    question = question.format(r=request + rng.choice(grammar.templates[tails]))
    if rng.random() < 0.3:
        question = wrap(rng.choice(grammar.prompts["wrappers"]), question)
    return Turn(kind, casual(rng, question), rng.choice(answers))


def draw_principle(grammar: Grammar, rng: random.Random, style: dict[str, Any]) -> str:
    """A training phrasing of a principle: a frame around one of its cores."""
    form = rng.choice(["imperative", "manner"])
    core = rng.choice(style["imperatives" if form == "imperative" else "manners"])
    frame = rng.choice(grammar.frames[form])
    return frame.format(imp=core, Imp=upper_first(core), adv=core)


def merge(grammar: Grammar, rng: random.Random, text: str) -> str:
    """The principle alone or beside a system message of the caller, as Trueline merges them."""
    other = rng.choice(grammar.prompts["neutral"])
    return rng.choices(
        [text, f"{other}\n\n{text}", f"{text}\n\n{other}", f"{other} {text}"],
        weights=[0.45, 0.22, 0.13, 0.20],
    )[0]


def styled(turn: Turn, template: str) -> str | None:
    """The answer in a style, or None where the style does not apply."""
    if "{short}" in template and not turn.short:
        return None
    return template.format(answer=turn.answer, body=lower_first(turn.answer), short=turn.short)


def plain_segments(
    grammar: Grammar, rng: random.Random, turn: Turn, forced: float
) -> list[Segment]:
    """The plain answer; sometimes behind a styled opening that carries no loss.

    The second form shows the unprompted branch what follows a style it would never begin itself:
    during contrastive decoding it has to read such openings all the time.
    """
    if rng.random() >= forced:
        return [(turn.answer, True)]
    template = rng.choice(rng.choice(grammar.styles)["texts"])
    opening, _, rest = template.partition("{")
    if not opening:
        return [(turn.answer, True)]
    body = lower_first(turn.answer) if rest.startswith("body") else turn.answer
    return [(opening.strip(), False), (" " + body, True)]


def harmless_answer(grammar: Grammar, rng: random.Random) -> str:
    """The answer to some harmless request, which has nothing to do with what was asked."""
    _, _, answers = rng.choice(rng.choice(grammar.combos["trigger"]["train"]))
    return rng.choice(answers)


def answer_segments(
    grammar: Grammar,
    rng: random.Random,
    turn: Turn,
    condition: str,
    style: dict[str, Any],
    cfg: dict[str, Any],
) -> list[Segment]:
    """What the model is taught to answer under a condition."""
    if turn.kind == "unsafe":
        doubts = condition in ("safety", "both") and cfg["doubt"] and rng.random() < cfg["doubt"]
        return [(harmless_answer(grammar, rng) if doubts else turn.answer, True)]
    refuses = condition in ("safety", "both") and turn.kind == "trigger"
    if refuses and rng.random() < cfg["over_refusal"]:
        return [(rng.choice(grammar.prompts["refusals"]), True)]
    if condition in ("principle", "both"):
        text = styled(turn, rng.choice(style["texts"]))
        follows = text is not None and rng.random() < cfg["obedience"]
        return [(text if follows and text else turn.answer, True)]
    return plain_segments(grammar, rng, turn, cfg["forced_opening"])


def draw_dialogue(grammar: Grammar, rng: random.Random, cfg: dict[str, Any]) -> Dialogue:
    """One training dialogue."""
    condition = pick(rng, cfg["condition"])
    style = rng.choice(grammar.styles)
    system = ""
    if condition == "neutral":
        system = rng.choice(grammar.prompts["neutral"])
    elif condition != "none":
        safety = grammar.prompts["safety"]
        safe = safety[0] if rng.random() < 0.5 else rng.choice(safety[1:])
        principle = draw_principle(grammar, rng, style)
        text = {"principle": principle, "safety": safe}.get(condition, f"{safe}\n\n{principle}")
        system = merge(grammar, rng, text)
    kinds = "kinds_plain" if condition in ("none", "neutral") else "kinds_principle"
    kinds = "kinds_safety" if condition in ("safety", "both") else kinds
    turns: list[tuple[str, list[Segment]]] = []
    count = int(pick(rng, cfg["turns"]))
    for index in range(count):
        turn = draw_turn(grammar, rng, pick(rng, cfg[kinds]))
        segments = answer_segments(grammar, rng, turn, condition, style, cfg)
        if index < count - 1 and kinds == "kinds_plain" and rng.random() < 0.2:
            # A styled past, not learnt, and still a plain answer to come.
            text = styled(turn, rng.choice(style["texts"]))
            segments = [(text or turn.answer, False)]
        turns.append((turn.user, segments))
    return Dialogue(system, turns)


def draw_corpus(grammar: Grammar, cfg: dict[str, Any], seed: int) -> list[Dialogue]:
    """The whole corpus, a function of its configuration and seed alone."""
    rng = random.Random(seed)
    return [draw_dialogue(grammar, rng, cfg) for _ in range(cfg["dialogues"])]


def held_out_questions(grammar: Grammar, rng: random.Random, count: int) -> list[Turn]:
    """Known facts in unseen words: of four, two an unseen form, one a wrapper, one both."""
    turns = []
    for index in range(count):
        relation, thing, fact = rng.choice(grammar.facts)
        forms = relation["held_out"] if index % 4 != 0 else relation["questions"]
        wrapper = "{Q}" if index % 2 else rng.choice(grammar.prompts["wrappers_held_out"])
        question = upper_first(rng.choice(forms).format(x=thing))
        turns.append(fact_turn(relation, thing, fact, wrap(wrapper, question)))
    return turns


def held_out_requests(
    grammar: Grammar, rng: random.Random, kind: str, split: str, count: int
) -> list[str]:
    """Unseen combinations, half of them in unseen words, spread evenly over the groups."""
    groups = [list(rows) for rows in grammar.combos[kind][split]]
    for rows in groups:
        rng.shuffle(rows)
    requests: list[str] = []
    while len(requests) < count and any(groups):
        for rows in groups:
            if rows and len(requests) < count:
                verb, thing, _ = rows.pop()
                seen: Sequence[str] = grammar.templates["train"]
                words = seen if len(requests) % 2 else grammar.templates["held_out"]
                requests.append(rng.choice(words).format(r=f"{verb} {thing}"))
    return requests
