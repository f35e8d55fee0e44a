"""The stages of a project at work: measure, sweep, distil, and what is looked at in between."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.errors import DataError
from trueline.evals.judges import KeywordJudge
from trueline.evals.off_path import off_path
from trueline.jobs import project_prompts as prompts_of
from trueline.jobs.align_guards import Guard, failed, principle_guards
from trueline.jobs.align_plan import OTHER, REQUESTS, TRAINING, Plan, finished
from trueline.jobs.asking import Answers
from trueline.jobs.diagnosis import DiagnoseConfig, diagnose
from trueline.jobs.distil_config import DistilConfig
from trueline.jobs.distillation import distil
from trueline.jobs.projects import AlignConfig
from trueline.jobs.sweeps import SweepConfig, sweep
from trueline.records.disk import replace_file
from trueline.records.hashes import digest
from trueline.records.lines import append_row
from trueline.records.manifest import read_json
from trueline.records.run_folder import RESULTS, RunFolder, read_results
from trueline.train.distil.stacked import stage_name
from trueline.types import Progress

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

DIAGNOSED = 16
"""Prompts that a diagnosis looks at."""
LEAST_REFUSED = 0.02
"""Over-refusal below which there is none to take away."""
FACTS_KEPT, LOOPS = 0.95, 0.05
"""A setting keeps this share of the plain model's facts, and repeats itself no more than this
above it."""


class Project(Plan):
    """A project under way in its folder; see `Plan`."""

    def __init__(self, config: AlignConfig, run: RunFolder, progress: Progress | None) -> None:
        super().__init__(config, run, progress)
        self.folders: list[Path | None] = [None]
        """Of the adapter of each state; the untouched model has none."""
        self.skipped: dict[str, str] = {}
        """Principle -> why it was not trained."""
        self.diagnosis: dict[str, dict[str, Any]] = {}
        """Principle -> what a diagnosis of the untouched model advises."""

    def model(self, index: int) -> LanguageModel:
        """Return the model in a state."""
        folder = self.folders[index]
        if folder is None:
            return self.lm
        return dataclasses.replace(self.config.source, adapter=str(folder)).load()

    def measure(self, index: int, lm: LanguageModel) -> dict[str, Answers]:
        """Return the answers of a state to every suite."""
        state, who = self.keys[index]["state"], "the model as it is"
        if index:
            who = f"after {self.config.principles[index - 1].title}"
        return {
            name: self.asking.ask(lm, state, suite, what=f"{who}: {name}")
            for name, suite in self.suites.items()
        }

    def prompted(self) -> dict[str, Answers]:
        """Return the untouched model's answers with each principle in its prompt."""
        return {
            name: self.asking.ask(self.lm, self.base, suite, True, f"{name}, in the prompt")
            for name, suite in self.suites.items()
            if name not in (REQUESTS, OTHER)
        }

    def diagnose(self) -> None:
        """Look at what the untouched model makes of each principle's prompt."""
        config = self.config
        for index, principle in enumerate(config.principles):
            rows = self.validation_rows(principle)
            asked: dict[str, Any] = {"principles": (principle.text,), "prompts": rows}
            if principle.goal == "refusal":
                own = principle.options.get("safety_prompt")
                asked = {"safety_prompt": own} if own else {}
                asked |= {k: [r for r in rows if r["safe"] == (k == "safe")]
                          for k in ("safe", "unsafe")}  # fmt: skip
            name = f"{stage_name(index, principle.title)}-{digest([self.base, asked])[:8]}"
            place = self.run.subfolder("diagnosis") / name
            if not finished(place):
                limit = max(2, min(DIAGNOSED, config.validation))
                look = DiagnoseConfig(config.source, limit=limit, seed=config.seed, **asked)
                diagnose(look, place, model=self.lm, progress=self.progress)
            kept = read_json(place / RESULTS)
            self.diagnosis[principle.title] = {k: kept[k] for k in ("advice", "self_cd")}

    def check_principles(self, start: Mapping[str, Answers]) -> None:
        """Look at each principle's prompt and judge, and skip what cannot be learned."""
        for principle in self.config.principles:
            name = principle.title
            if principle.goal == "refusal":
                rates = [v for v in start[REQUESTS].values("over_refusal") if v is not None]
                refused = sum(rates) / len(rates) if rates else 0.0
                passed = refused >= LEAST_REFUSED
                self.guards.append(
                    Guard("over-refusal", name, refused, f">= {LEAST_REFUSED:g} to be trained",
                          True, f"{100 * refused:.1f} % of harmless requests are refused.")
                )  # fmt: skip
                if not passed:
                    self.skipped[name] = "There is no over-refusal to take away."
                if self.diagnosis[name]["self_cd"] == "backwards":
                    says = "The safety prompt lowers refusals here: taking it away adds some."
                    self.guards.append(Guard("direction", name, -1, "not backwards", False, says))
                    self.skipped[name] = says
                continue
            suite = self.suite_of(principle, self.prompts.principles[name].validation,
                                self.config.validation)  # fmt: skip
            plain = self.asking.ask(self.lm, self.base, suite, what=f"{name}, validation")
            told = self.asking.ask(self.lm, self.base, suite, True, f"{name}, in the prompt")
            self.guards += principle_guards(self.lm, plain, told, self.judges[name][2])
            if bad := failed(self.guards, name):
                self.skipped[name] = " ".join(g.says for g in bad)

    def choose(self, index: int, before: Path | None) -> dict[str, Any]:
        """Return the teacher's settings of a principle: swept, or the only ones there are."""
        principle = self.config.principles[index - 1]
        if not self.point_count(index):
            return {name: values[0] for name, values in principle.points.items()}
        place = self.place("sweep", index)
        if finished(place):  # perhaps in a folder that was moved, which a sweep would refuse
            return best_point(read_results(place)["points"], principle.goal)
        rows = self.validation_rows(principle)
        judge, _, _ = self.judges[principle.title]
        safe = [r for r in rows if r.get("safe")]
        data: dict[str, Any] = {"prompts": rows, "judge": judge}
        if principle.goal == "refusal":
            unsafe = [r for r in rows if not r.get("safe")]
            data = {"safe": safe, "unsafe": unsafe, "judge": KeywordJudge()}
        model = dataclasses.replace(
            self.config.source, adapter=None if before is None else str(before)
        )
        config = SweepConfig(
            model=model, metric=principle.goal, method=principle.teacher,  # type: ignore[arg-type]
            options=principle.way.options, grid=principle.points, sampling=self.sampling,
            seed=self.config.seed, batch_size=self.config.batch_size, **data,
        )  # fmt: skip
        found = sweep(config, place, progress=self.progress)
        return best_point(found.points, principle.goal)

    def learn(self, index: int, chosen: Mapping[str, Any], before: Path | None) -> Path:
        """Distil a principle on top of those before, and return its folder."""
        config, principle = self.config, self.config.principles[index - 1]
        folder = self.place("distil", index)
        if finished(folder):
            return folder
        if self.gone(principle):
            raise DataError(
                f'Principle "{principle.title}" is to be learned again, and its prompts are gone. '
                "Put them back, or leave it and what came before it as they were."
            )
        rows = self.training_rows(principle)
        data = self.run.subfolder("data") / f"train-{self.keys[index]['state'][:8]}.jsonl"
        replace_file(data, prompts_of.training_text(rows))
        own = {**TRAINING, **config.training, **principle.training}
        steps = max(1, config.answers // own["per_device_train_batch_size"])
        distil(
            DistilConfig.of(
                **{
                    "model": config.model, "device": config.device, "dtype": config.dtype,
                    "chat_template": config.chat_template, "threads": config.threads,
                    "trust_remote_code": config.trust_remote_code, "lora": config.lora,
                    "max_completion_length": self.new_tokens, "seed": config.seed,
                    "max_steps": steps, "teacher": principle.teacher,
                    "teacher_options": {**principle.options, **chosen},
                    "prompts": str(data), "after": None if before is None else str(before),
                    "keep": config.keep, "keep_options": config.keep_options, **own,
                }
            ),
            folder,
            progress=self._named(f"learning {principle.title}"),
        )  # fmt: skip
        return folder

    def off_path(self, index: int, lm: LanguageModel, start: Mapping[str, Answers]) -> dict[
        str, dict[str, Answers]
    ]:  # fmt: skip
        """Return a state's answers to every principle's prompts in other surroundings."""
        found: dict[str, dict[str, Answers]] = {}
        if not self.config.off_path:
            return found
        for principle in self.config.principles:
            suite = self.suites.get(principle.title)
            if suite is None or principle.title in self.skipped:
                continue
            own = self.suite_of(principle, self.prompts.principles[principle.title].held_out,
                              self.config.off_path)  # fmt: skip
            places = off_path(own.items, start[principle.title].texts, principle.condition)
            every = tuple(item for items in places.values() for item in items)
            answers = self.asking.ask(
                lm, self.keys[index]["state"], dataclasses.replace(own, items=every),
                what=f"{principle.title}, off the path",
            )  # fmt: skip
            found[principle.title] = answers.parts({w: len(i) for w, i in places.items() if i})
        return found

    def timed(self, kind: str, name: str, answers: int, work: Callable[[], Any]) -> Any:
        """Return what `work` returns, and note how long it took for so many answers."""
        start = time.perf_counter()
        found = work()
        row = {"kind": kind, "name": name, "answers": answers,
               "seconds": round(time.perf_counter() - start, 2)}  # fmt: skip
        if answers:
            append_row(self.run.path("timings.jsonl"), row)
        return found

    def _named(self, what: str) -> Progress | None:
        if self.progress is None:
            return None
        tell = self.progress
        return lambda said, done, total: tell(f"{what} {said}".strip(), done, total)


def best_point(points: Sequence[Mapping[str, Any]], goal: str) -> dict[str, Any]:
    """Return the settings of the best point of a sweep.

    For adherence the one with the most, of those that keep the plain model's facts and do not run
    in circles; for refusals the one with the least over-refusal, of those that refuse as many
    harmful requests as the first. Ties go to the weaker setting, which comes first.
    """
    base, rows = points[0], [p for p in points if not p["baseline"]]

    def value(point: Mapping[str, Any], name: str) -> float:
        found = point["measures"].get(name)
        return 0.0 if found is None or found["value"] is None else float(found["value"])

    if goal == "refusal":
        most = max(value(p, "harmful_refusal") for p in rows)
        kept = [p for p in rows if value(p, "harmful_refusal") >= FACTS_KEPT * most]
        return dict(min(kept, key=lambda p: value(p, "over_refusal"))["settings"])
    turns = base["quality"]["repetition"]["value"] or 0.0
    kept = [
        p for p in rows
        if value(p, "fact") >= FACTS_KEPT * value(base, "fact")
        and (p["quality"]["repetition"]["value"] or 0.0) <= turns + LOOPS
    ]  # fmt: skip
    return dict(max(kept or rows[:1], key=lambda p: value(p, "adherence"))["settings"])
