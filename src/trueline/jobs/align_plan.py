"""The stages of a project: each told by a hash of what goes into it, run once, found again.

    data            prompts, read or written by the model
    measure 0       the untouched model, plain and with each principle in its prompt; guards
    sweep i         the teacher's settings, on validation prompts, on the stack so far
    distil i        the principle on top of those before
    measure i       every principle, requests and other chat again

The key of a stage is a function of the project and its prompts alone, so that what has to run can
be said before anything does.
"""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.evals.items import Item, bundled
from trueline.evals.judges import ContrastJudge
from trueline.evals.judging import JudgeConfig, keywords, make_judge
from trueline.jobs import project_prompts as prompts_of
from trueline.jobs.align_guards import Guard, data_guards
from trueline.jobs.asking import Asking, Suite
from trueline.jobs.project_prompts import ProjectPrompts, Row
from trueline.jobs.projects import AlignConfig, Principle
from trueline.methods import make_method
from trueline.models.device import SMALL
from trueline.models.prompts import chat_of
from trueline.records.hashes import digest, versions
from trueline.records.lines import read_jsonl
from trueline.records.manifest import read_json, write_json
from trueline.records.run_folder import RESULTS, RunFolder
from trueline.settings.reader import as_values
from trueline.train.distil.stacked import stage_name
from trueline.types import Progress, SamplingParams

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

KIND = "alignment"
REQUESTS, OTHER = "requests", "other chat"
NEVER = "(?!)"
"""Pattern of other chat: there is no principle that its answers could follow."""
TRAINING = {
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "linear",
    "warmup_steps": 4,
    "save_steps": 16,
    "min_effect": 0,
}
"""Settings of a distillation where the project gives no others."""

SECONDS = {"measure": 0.05, "sweep": 0.08, "distil": 0.15}
"""Seconds an answer takes where nothing was timed in the folder: of a model of 2M parameters on one
core; larger ones take longer in proportion to the power of 0.7."""


@dataclass(frozen=True)
class Stage:
    """One thing that a project does."""

    kind: str
    """measure, sweep or distil."""
    name: str
    key: str
    answers: int
    """How many it decodes or samples, of which `missing` are not there."""
    missing: int


class Plan:
    """What a project asks, learns and measures, and what tells each of its stages.

    Args:
        config: Its paths absolute.
        run: The folder, held.
        progress: Told what is under way.
    """

    def __init__(self, config: AlignConfig, run: RunFolder, progress: Progress | None) -> None:
        self.config, self.run, self.progress = config, run, progress
        self.lm: LanguageModel = config.source.load()
        small = sum(p.numel() for p in self.lm.model.parameters()) < SMALL
        self.new_tokens = config.max_new_tokens or (40 if small else 96)
        self.sampling = SamplingParams(max_new_tokens=self.new_tokens)
        self.base = digest([config.source.identity(self.lm), versions(), self.new_tokens])
        self.prompts = self._read()
        self.judges = {p.title: self._judge(p) for p in config.principles}
        self.guards: list[Guard] = data_guards(config, self.prompts, self.lm, self.new_tokens)
        self.asking = Asking(run, self.sampling, config.batch_size, config.seed, progress)
        self.suites = {s.name: s for s in self._suites()}
        self.lessons = {p.title: self._lesson(p) for p in config.principles}
        self.keys = self._keys()
        self._remember()

    # -- prompts

    def _read(self) -> ProjectPrompts:
        config, written = self.config, None
        if prompts_of.needs_own(config):
            key = digest([self.base, config.own_prompts, config.seed])[:8]
            path = self.run.subfolder("data") / f"own-{key}.json"
            if not path.exists():
                rows = prompts_of.own_prompts(self.lm, config.own_prompts, config.seed,
                                              self.progress)  # fmt: skip
                write_json(path, {"rows": rows})
            written = read_json(path)["rows"]
        place = self.run.subfolder("data") / "kept.json"
        self.kept = read_json(place) if place.exists() else {}
        return prompts_of.read_project_prompts(config, written, self.kept.get("sets", {}))

    def _remember(self) -> None:
        """Keep what the project needs when the files of its prompts are gone."""
        kept: dict[str, Any] = {name: own.kept() for name, own in self.prompts.sets.items()}
        lessons = {
            p.title: {"own": self._own_hash(p), "lesson": self.lessons[p.title]}
            for p in self.config.principles
        }
        write_json(self.run.subfolder("data") / "kept.json", {"sets": kept, "lessons": lessons})

    def _judge(self, principle: Principle) -> tuple[Any, dict[str, Any], Any]:
        """Return the judge of a principle, what tells it, and how it was given."""
        if principle.goal == "refusal":
            return *keywords(), None
        rule = self.rule(principle)
        if rule is not None or self._own_patterns(principle):
            return None, {"name": "patterns"}, None
        if principle.judge is None:
            return ContrastJudge(self.lm), {"name": "contrast", "model": self.base}, None
        given = JudgeConfig(principle.judge, principle.judge_model, principle.judge_url)
        made, about = make_judge(given, "adherence", self.run.folder, self.lm)
        return made, about, given

    def rule(self, principle: Principle) -> str | None:
        """Return the pattern of a principle: its own, or that of a bundled one in these words."""
        if principle.rule or principle.judge or self.config.model != "tiny":
            return principle.rule
        known = {p["text"]: p["pattern"] for p in bundled()["principles"]}
        pattern = known.get(str(principle.text))
        return None if pattern is None else f"(?i)(?:{pattern.removeprefix('(?i)')})"

    def _own_patterns(self, principle: Principle) -> bool:
        own = self.prompts.principles[principle.title]
        return all("pattern" in row for row in (*own.validation, *own.held_out))

    def _suites(self) -> list[Suite]:
        config, found = self.config, []
        for principle in config.principles:
            if principle.goal == "adherence":
                own = self.prompts.principles[principle.title]
                found.append(self.suite_of(principle, own.held_out, config.questions))
        context = self._request_context()
        asked: list[Item] = []
        for group in ("safe", "unsafe"):
            rows = getattr(self.prompts, group).held_out
            items = prompts_of.items(rows, group, config.questions, config.seed, None)
            asked += [dataclasses.replace(i, context=(*context, *i.context)) for i in items]
        if asked:
            judge, about = keywords()
            found.append(Suite(REQUESTS, "refusal", tuple(asked), judge, about))
        rows = self.prompts.other.held_out
        if rows:
            items = prompts_of.items(rows, OTHER, config.questions, config.seed, None)
            plain = tuple(dataclasses.replace(i, pattern=NEVER) for i in items)
            found.append(Suite(OTHER, "adherence", plain, None, {"name": "patterns"}))
        return found

    def suite_of(self, principle: Principle, rows: Sequence[Row], limit: int) -> Suite:
        """Return prompts of a principle with what tells the answers that follow it."""
        judge, about, _ = self.judges[principle.title]
        seed = self.config.seed
        items = prompts_of.items(rows, principle.title, limit, seed, principle)
        rule = self.rule(principle)
        items = tuple(dataclasses.replace(i, pattern=i.pattern or rule) for i in items)
        return Suite(principle.title, "adherence", items, judge, about)

    def leak_suite(self, principle: Principle) -> Suite | None:
        """Return other chat judged as answers that follow a principle with a condition."""
        if principle.condition is None or OTHER not in self.suites:
            return None
        judge, about, _ = self.judges[principle.title]
        text, rule = principle.text, self.rule(principle) or NEVER
        items = tuple(
            dataclasses.replace(i, principle=text, pattern=rule) for i in self.suites[OTHER].items
        )
        return Suite(OTHER, "adherence", items, judge, about)

    def _request_context(self) -> tuple[Any, ...]:
        """Return what requests are asked under: the safety prompt of the first such teacher."""
        given = self.config.safety.system if self.config.safety else None
        if given is not None:
            return ({"role": "system", "content": given},)
        for principle in self.config.principles:
            if principle.goal == "refusal":
                chat = chat_of(self.lm, [{"role": "user", "content": "?"}])
                method = make_method(principle.teacher, principle.options)
                return tuple(method.prompts(chat)[0][:-1])
        return ()

    # -- what is learned from

    def _own_hash(self, principle: Principle) -> str:
        """Return what tells the prompts that a principle is about."""
        own = self.prompts.principles.get(principle.title)
        return own.sha256 if own else digest([self.prompts.safe.sha256, self.prompts.unsafe.sha256])

    def gone(self, principle: Principle) -> bool:
        """Return whether the prompts that a principle is learned from are no longer there."""
        own = self.prompts.principles.get(principle.title)
        sets = [own] if own else [self.prompts.safe, self.prompts.unsafe]
        return any(part.train is None for part in sets)

    def _lesson(self, principle: Principle) -> str:
        """Return what tells the rows that a principle is trained on.

        Where files are gone, from which rows were drawn for others too, it is what it was.
        """
        kept = self.kept.get("lessons", {}).get(principle.title)
        gone = any(own.train is None for own in self.prompts.sets.values())
        if gone and kept and kept["own"] == self._own_hash(principle):
            return str(kept["lesson"])
        return digest(self.training_rows(principle))

    def training_rows(self, principle: Principle) -> list[dict[str, Any]]:
        """Return the rows that a principle is trained on, in an order drawn from the seed."""
        config, every = self.config, self.prompts
        rng = random.Random(f"{config.seed} {principle.title}")
        requests = _mixed(rng, [every.safe.train, every.unsafe.train])
        stay = _mixed(rng, [every.other.train, requests])  # half other chat, half requests
        if principle.goal == "refusal":
            own = requests
            stay = _mixed(rng, [every.other.train, *(p.train for p in every.principles.values())])
            taught, left = {}, {}
        else:
            own = list(every.principles[principle.title].train or ())
            taught, left = {"principle": principle.text}, {"principle": ""}
        most = round(config.answers * (1 - config.stay)) if stay else config.answers
        own = rng.sample(own, min(len(own), most))
        share = round(len(own) * config.stay / (1 - config.stay))
        rows = [{**prompts_of.chat(row), **taught} for row in own]
        rows += [{**prompts_of.chat(row), **left} for row in stay[:share]]
        rng.shuffle(rows)
        return rows

    # -- keys

    def _keys(self) -> list[dict[str, str]]:
        """Return the keys of every state: of its sweep, and of itself."""
        config = self.config
        found = [{"state": self.base}]
        for principle in config.principles:
            judged = self.judges[principle.title][1]
            asked = [getattr(self.prompts, group).validation for group in ("safe", "unsafe")]
            if principle.goal == "adherence":
                asked = [self.prompts.principles[principle.title].validation]
            grid, rule = as_values(principle.grid), self.rule(principle)
            about = [principle.text, principle.teacher, principle.options, grid, rule, judged,
                     asked, config.validation]  # fmt: skip
            swept = digest([found[-1]["state"], about, config.seed])
            training = [config.keep, config.keep_options, config.answers, as_values(config.lora),
                        config.training, principle.training, TRAINING]  # fmt: skip
            lesson = self.lessons[principle.title]
            found.append({"sweep": swept, "state": digest([swept, training, lesson, config.seed])})
        return found

    def place(self, kind: str, index: int) -> Path:
        """Return the folder of a stage."""
        principle = self.config.principles[index - 1]
        key = self.keys[index]["sweep" if kind == "sweep" else "state"][:8]
        parent = self.run.subfolder("sweeps" if kind == "sweep" else "stages")
        return parent / f"{stage_name(index - 1, principle.title)}-{key}"

    def planned(self) -> list[Stage]:
        """Return every stage, and what of it is not there."""
        config, ask = self.config, self.asking
        suites = list(self.suites.values())
        named = [s for s in suites if s.name not in (REQUESTS, OTHER)]
        stages = []
        for i, key in enumerate(self.keys):
            if i:
                principle, points = config.principles[i - 1], self.point_count(i)
                count = points * len(self.validation_rows(principle))
                if points:
                    stages.append(self._stage("sweep", i, key["sweep"], count))
                stages.append(self._stage("distil", i, key["state"], config.answers))
            state = key["state"]
            total = sum(len(s.items) for s in suites) + (0 if i else sum(len(s.items)
                                                                      for s in named))  # fmt: skip
            missing = sum(ask.missing(state, s) for s in suites)
            missing += 0 if i else sum(ask.missing(state, s, prompted=True) for s in named)
            name = config.principles[i - 1].title if i else "the model as it is"
            stages.append(Stage("measure", name, state, total, missing))
        return stages

    def _stage(self, kind: str, index: int, key: str, answers: int) -> Stage:
        done = finished(self.place(kind, index))
        name = self.config.principles[index - 1].title
        return Stage(kind, name, key, answers, 0 if done else answers)

    def validation_rows(self, principle: Principle) -> list[dict[str, Any]]:
        """Return the prompts that a principle's settings are chosen on."""
        limit, seed = self.config.validation, self.config.seed
        if principle.goal == "refusal":
            rows = []
            for safe in (True, False):
                own = (self.prompts.safe if safe else self.prompts.unsafe).validation
                kept = prompts_of.items(own, "request", limit, seed, None)
                rows += [{"messages": i.chat, "safe": safe} for i in kept]
            return rows
        own = self.prompts.principles[principle.title].validation
        suite = self.suite_of(principle, own, limit)
        return [
            {"messages": i.chat, **{k: v for k in ("principle", "pattern", "fact")
                                    if (v := getattr(i, k)) is not None}}
            for i in suite.items
        ]  # fmt: skip

    def point_count(self, index: int) -> int:
        """Return how many settings a sweep has, the plain model with them; 0 for no sweep."""
        count = 1
        for values in self.config.principles[index - 1].points.values():
            count *= len(values)
        return 0 if count <= 1 else count + 1


def finished(folder: Path) -> bool:
    """Return whether a run in a folder has ended."""
    if not (folder / RESULTS).is_file():
        return False
    kept = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return bool(kept.get("finished"))


def _mixed(rng: random.Random, sets: Sequence[Sequence[Row] | None]) -> list[Row]:
    """Return the rows of several sets in turn, each set in an order that is drawn."""
    drawn = [rng.sample(list(rows), len(rows)) for rows in sets if rows]
    turns = max(map(len, drawn), default=0)
    return [rows[i] for i in range(turns) for rows in drawn if i < len(rows)]


@dataclass(frozen=True)
class PlannedStage(Stage):
    """A stage, and how long what is missing of it may take."""

    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def plan_alignment(config: AlignConfig, folder: str | Path) -> list[PlannedStage]:
    """Return every stage of a project: what is there, and about how long the rest would take.

    Seconds are those of stages of the same kind in the folder where there are some. Prompts are
    read, and where the model has to write them itself it does so: their words are part of the keys.
    """
    config, place = config.placed(), Path(folder).expanduser()
    if not place.exists() and not prompts_of.needs_own(config):
        with tempfile.TemporaryDirectory() as nowhere:  # nothing is written where nothing was
            return _planned(config, Path(nowhere))
    return _planned(config, place)


def _planned(config: AlignConfig, folder: Path) -> list[PlannedStage]:
    run = RunFolder(folder, KIND, {"format": 1})
    try:
        run.start()
        project = Plan(config, run, None)
        rates = _rates(run.folder / "timings.jsonl", project.lm)
        return [
            PlannedStage(**vars(s), seconds=round(s.missing * rates[s.kind], 1))
            for s in project.planned()
        ]
    finally:
        run.close()


def _rates(path: Path, lm: LanguageModel) -> dict[str, float]:
    """Return the seconds of an answer, by the kind of the stage."""
    size = sum(p.numel() for p in lm.model.parameters())
    rates = {kind: s * max(1.0, size / 2e6) ** 0.7 for kind, s in SECONDS.items()}
    rows = [row for _, row in read_jsonl(path)] if path.is_file() else []
    for kind in rates:
        own = [row for row in rows if row["kind"] == kind]
        if own:
            rates[kind] = sum(r["seconds"] for r in own) / sum(r["answers"] for r in own)
    return rates
