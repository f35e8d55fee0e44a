"""The prompts of a project: read or written by the model, cut into three parts, kept.

train        to learn from
validation   to choose settings on
held out     to report on

A hash of the prompt's words decides its part, unless a row says `split` or held-out prompts have a
file of their own. A finished project keeps the last two parts, so that it can be extended, and its
earlier principles measured again, when their files are gone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.engine.decoding import generate
from trueline.errors import ConfigError, DataError, ModelError
from trueline.evals.datasets import Source, load_prompts
from trueline.evals.items import Item, bundled, spread
from trueline.evals.patterns import check_pattern, matches
from trueline.jobs.projects import AlignConfig, Principle, Safety
from trueline.models.prompts import render
from trueline.records.hashes import digest
from trueline.records.lines import read_jsonl
from trueline.types import Progress, Request, SamplingParams

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

Row = dict[str, Any]
"""`prompt`, and perhaps `context`, `fact`, `pattern`, `split`."""
PARTS = ("train", "validation", "held_out")
SHARES = (0.6, 0.75)
"""Where the hash of a prompt leaves the training part, and the validation part."""
OWN = SamplingParams(max_new_tokens=64, temperature=1.0, top_p=0.95)
"""How a model writes prompts of its own."""
SHORTEST, LONGEST = 12, 300
"""Characters of a prompt that a model wrote."""


@dataclass(frozen=True)
class Prompts:
    """The three parts of a set of prompts; `train` is None where its file is gone."""

    train: tuple[Row, ...] | None = ()
    validation: tuple[Row, ...] = ()
    held_out: tuple[Row, ...] = ()
    sha256: str = ""
    """Of the training part."""
    unlike: int = 0
    """Prompts that do not meet the principle's condition."""

    @classmethod
    def of(cls, rows: Sequence[Row], own: Sequence[Row] | None = None, unlike: int = 0) -> Prompts:
        """Return rows in their parts; with held-out rows of their own none of these is held out."""
        parts: dict[str, list[Row]] = {part: [] for part in PARTS}
        for row in rows:
            part = row.get("split") or part_of(row["prompt"], own is not None)
            parts[part].append({k: v for k, v in row.items() if k != "split"})
        parts["held_out"] += own or []
        train, validation, held_out = (tuple(found) for found in parts.values())
        return cls(train, validation, held_out, sha256=digest(train), unlike=unlike)

    def kept(self) -> dict[str, Any]:
        """Return what a project keeps of them."""
        return {"sha256": self.sha256, "unlike": self.unlike,
                "validation": self.validation, "held_out": self.held_out}  # fmt: skip


@dataclass(frozen=True)
class ProjectPrompts:
    """All prompts of a project."""

    principles: Mapping[str, Prompts]
    """Name of a principle that is for adherence -> its prompts."""
    safe: Prompts = field(default_factory=Prompts)
    unsafe: Prompts = field(default_factory=Prompts)
    other: Prompts = field(default_factory=Prompts)
    written: int = 0
    """Prompts that the model wrote."""

    @property
    def sets(self) -> dict[str, Prompts]:
        """Every set by name."""
        return {**self.principles, "safe": self.safe, "unsafe": self.unsafe, "other": self.other}


def part_of(prompt: str, held_out_elsewhere: bool = False) -> str:
    """Return the part that a prompt's words put it into."""
    place = int(hashlib.sha256(words(prompt).encode()).hexdigest()[:8], 16) / 2**32
    train, validation = (0.8, 1.0) if held_out_elsewhere else SHARES
    return PARTS[0] if place < train else PARTS[1] if place < validation else PARTS[2]


def words(prompt: str) -> str:
    """Return a prompt without case, signs and doubled spaces: what makes two of them the same."""
    return " ".join(re.findall(r"\w+", prompt.lower()))


def read_source(source: Source) -> list[Row]:
    """Return the rows of a file or list, each prompt once.

    Raises:
        DataError: A row has no prompt, or a `fact`, `pattern` or `split` that is none.
    """
    rows: dict[str, Row] = {}
    for item in load_prompts(source):
        row: Row = {"prompt": item.prompt}
        row |= {"context": list(item.context)} if item.context else {}
        for name in ("fact", "pattern", "split"):
            if item.row.get(name):
                row[name] = item.row[name]
        if row.get("split", PARTS[0]) not in PARTS:
            raise DataError(f'{source}: `split` must be one of {", ".join(PARTS)}, got '
                            f"{row['split']!r}.")  # fmt: skip
        for name in ("fact", "pattern"):
            check_pattern(row.get(name), f'{source}: prompt "{item.id}", `{name}`')
        rows.setdefault(words(item.prompt), row)
    return list(rows.values())


def bundled_rows(*kinds: str) -> list[Row]:
    """Return prompts of these kinds that ship with the bundled model, to learn from."""
    path = Path(str(resources.files("trueline") / "assets/tiny/prompts.jsonl"))
    rows = [row for _, row in read_jsonl(path) if row["kind"] in kinds]
    return [{k: v for k, v in row.items() if k != "kind"} for row in rows]


def bundled_sets() -> dict[str, Prompts]:
    """Return the bundled model's prompts: of facts, other chat, and both kinds of requests."""
    held = bundled()
    facts = {r["question"]: {"prompt": r["question"], "fact": r["fact"]} for r in held["questions"]}
    requests = {k: [{"prompt": t} for t in dict.fromkeys(held[k])] for k in ("safe_triggers",
                                                                         "unsafe")}  # fmt: skip
    return {
        "principle": Prompts.of(bundled_rows("fact"), list(facts.values())),
        "other": Prompts.of(bundled_rows("ordinary", "small_talk")),
        "safe": Prompts.of(bundled_rows("trigger"), requests["safe_triggers"]),
        "unsafe": Prompts.of(bundled_rows("unsafe"), requests["unsafe"]),
    }


def own_prompts(
    model: LanguageModel, count: int, seed: int, progress: Progress | None = None
) -> list[Row]:
    """Return at most `count` prompts that the model writes itself in the place of the user.

    As Xu et al., "Magpie", ICLR 2025, arXiv 2406.08464: the chat template up to the user's text,
    then sampling. Kept are different ones of one line that end by themselves.

    Raises:
        ModelError: The template has no such place, or too few of the texts are prompts.
    """
    mark = "a-user-text-0"
    parts = render(model, [{"role": "user", "content": mark}]).split(mark)
    if len(parts) != 2 or not parts[0].strip():
        raise ModelError(f'"{model.name}" cannot write prompts of its own: give `prompts`.')
    start = parts[0].removeprefix(str(model.tokenizer.bos_token or ""))
    raw = dataclasses.replace(model, raw=True)
    found: dict[str, Row] = {}
    drawn, most = 0, 4 * count
    while len(found) < count and drawn < most:
        asked = [Request(start, seed=seed * most + drawn + i) for i in range(min(64, most - drawn))]
        drawn += len(asked)
        for completion in generate(raw, asked, sampling=OWN, batch_size=64):
            text = completion.text.strip()
            fits = SHORTEST <= len(text) <= LONGEST and "\n" not in text and " " in text
            if completion.finish_reason == "stop" and fits and text.isprintable():
                found.setdefault(words(text), {"prompt": text})
        if progress is not None:
            progress("prompts of the model's own", min(len(found), count), count)
    if len(found) < min(count, 24):
        raise ModelError(
            f'"{model.name}" wrote {len(found)} prompts in {drawn} tries; {min(count, 24)} are '
            "needed. Give `prompts`."
        )
    return list(found.values())[:count]


def read_project_prompts(
    config: AlignConfig, written: Sequence[Row] | None, kept: Mapping[str, Any]
) -> ProjectPrompts:
    """Return all prompts of a project.

    Args:
        config: The project, its paths absolute.
        written: Prompts of the model's own, for principles that have none.
        kept: Name -> what the project kept of a set whose file is gone.

    Raises:
        DataError: A file cannot be read and nothing was kept of it, or leaves a part empty.
        ConfigError: Prompts are missing and nothing stands in for them.
    """
    tiny = config.model == "tiny"
    stock = bundled_sets() if tiny else {}

    def read(name: str, source: Source | None, own: Source | None = None) -> Prompts | None:
        try:
            rows = None if source is None else read_source(source)
            held = None if own is None else read_source(own)
        except DataError:
            if name in kept and not all(Path(str(s)).is_file() for s in (source, own) if s):
                return _restored(kept[name])
            raise
        return None if rows is None else Prompts.of(rows, held)

    other = read("other", config.other) or stock.get("other") or Prompts()
    found = {}
    for principle in config.principles:
        if principle.goal != "adherence":
            continue
        own = read(principle.title, principle.prompts, principle.held_out)
        own = own or stock.get("principle") or (Prompts.of(written) if written else None)
        if own is None:
            raise ConfigError(f'Principle "{principle.title}" has no prompts. Give `prompts`.')
        own, unlike = _conditioned(principle, own)
        for part in PARTS[1:]:
            if not getattr(own, part):
                raise DataError(
                    f'Principle "{principle.title}": no {part.replace("_", "-")} prompt meets it. '
                    "Give more prompts, or rows with a `split`."
                )
        other = _joined(other, unlike)
        found[principle.title] = own
    if any(own.train is None for own in found.values()) and "other" in kept:
        # What did not meet their conditions went with their files, but for what was kept.
        other = _joined(other, dataclasses.replace(_restored(kept["other"]), train=()))
    safety = config.safety or Safety()
    safe = read("safe", safety.safe) or stock.get("safe") or Prompts()
    unsafe = read("unsafe", safety.unsafe) or stock.get("unsafe") or Prompts()
    if any(p.goal == "refusal" for p in config.principles) and not (safe.train and unsafe.train):
        known = kept.keys() >= {"safe", "unsafe"}
        if not known:
            raise ConfigError("Taking over-refusal away needs `safe` and `unsafe` in [safety].")
    return ProjectPrompts(found, safe, unsafe, other, len(written or ()))


def needs_own(config: AlignConfig) -> bool:
    """Return whether the model has to write prompts."""
    bare = [p for p in config.principles if p.goal == "adherence" and p.prompts is None]
    return bool(bare) and config.model != "tiny"


def items(
    rows: Sequence[Row], group: str, limit: int | None, seed: int, principle: Principle | None
) -> tuple[Item, ...]:
    """Return at most `limit` rows as what is asked, with what tells an answer that follows."""
    chosen = spread(rows, [group] * len(rows), limit, seed)
    rule = None if principle is None else principle.rule
    text = None if principle is None else principle.text
    return tuple(
        Item(digest([row["prompt"], row.get("context", [])])[:8], row["prompt"], group, text,
             row.get("pattern") or rule, row.get("fact"), context=tuple(row.get("context", ())))
        for row in chosen
    )  # fmt: skip


def chat(row: Row) -> dict[str, Any]:
    """Return a row as what trains and measures read: `messages`."""
    return {"messages": [*row.get("context", ()), {"role": "user", "content": row["prompt"]}]}


def shared(sets: Iterable[Prompts]) -> list[str]:
    """Return prompts that stand both in what is learned or chosen from and in what is reported."""
    sets = list(sets)
    learned = {words(r["prompt"]) for s in sets for r in (*(s.train or ()), *s.validation)}
    asked = {words(r["prompt"]): r["prompt"] for s in sets for r in s.held_out}
    return [prompt for key, prompt in asked.items() if key in learned]


def _conditioned(principle: Principle, own: Prompts) -> tuple[Prompts, Prompts]:
    """Return the prompts that meet the condition, and the others."""
    if principle.condition is None:
        return own, Prompts()
    condition = principle.condition
    parts: list[dict[str, Any]] = []
    for met in (True, False):
        cut = {part: None if (rows := getattr(own, part)) is None else
               tuple(r for r in rows if matches(condition, r["prompt"]) == met)
               for part in PARTS}  # fmt: skip
        parts.append(cut)
    unlike = sum(len(rows or ()) for rows in parts[1].values())
    kept, gone = own.sha256, own.train is None
    hashes = [kept if gone else digest(cut["train"]) for cut in parts]
    unlike = own.unlike if gone else unlike
    first = Prompts(**parts[0], sha256=hashes[0], unlike=unlike)
    return first, Prompts(**parts[1], sha256=hashes[1])


def _joined(first: Prompts, second: Prompts) -> Prompts:
    """Return two sets as one, each prompt once."""
    if not (second.train or second.validation or second.held_out):
        return first
    parts: dict[str, Any] = {}
    for part in PARTS:
        rows = [*(getattr(first, part) or ()), *(getattr(second, part) or ())]
        parts[part] = tuple({words(r["prompt"]): r for r in rows}.values())
    return Prompts(**parts, sha256=digest([first.sha256, second.sha256]))


def _restored(kept: Mapping[str, Any]) -> Prompts:
    parts: dict[str, Any] = {part: tuple(kept[part]) for part in PARTS[1:]}
    return Prompts(None, **parts, sha256=kept["sha256"], unlike=kept["unlike"])


def training_text(rows: Iterable[Row]) -> str:
    """Return rows as a file of prompts to train on."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
