"""Alignment: from sentences to a model that holds them, a verdict on it, and a report.

    results = align(AlignConfig.read("project.toml"), "aligned")
    results.ship, results.reasons

The model is measured as it is; each principle's settings are swept, the principle is distilled on
top of those before, and everything is measured again; the result is exported, with a report of what
was reached and what it cost. Stages are found again by their content: the same call goes on where a
killed one stopped, to the same bytes, and a changed principle runs again with what depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueline.errors import ConfigError, DataError
from trueline.evals.tables import render_table
from trueline.evals.transfer import summary
from trueline.jobs.align_page import (
    card_section,
    principle_table,
    render_pages,
    samples_of,
    summary_lines,
)
from trueline.jobs.align_plan import KIND, OTHER, REQUESTS
from trueline.jobs.align_stages import Project
from trueline.jobs.asking import Answers, drift_from_start, estimated
from trueline.jobs.exporting import ExportConfig, export
from trueline.jobs.projects import AlignConfig
from trueline.jobs.verdicts import Evidence, Verdict, share, verdict
from trueline.models.load import LanguageModel
from trueline.records.disk import remove, replace_file
from trueline.records.lines import plain, read_jsonl
from trueline.records.run_folder import RunFolder, read_results
from trueline.settings.reader import read_toml, write_toml
from trueline.types import Progress

PROJECT, EXPORTED = "project.toml", "exported"


@dataclass(frozen=True)
class AlignResults:
    """What an alignment left in its folder."""

    folder: Path
    ship: bool
    reasons: tuple[str, ...]
    """Why not to ship; empty for ship."""
    exported: Path | None
    """The adapter or model; None where no principle could be learned."""
    written: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """All of results.json."""
    markdown: str = field(default="", repr=False)
    """The report."""

    @property
    def verdict(self) -> str:
        """In words."""
        return "ship" if self.ship else "do not ship"

    def as_dict(self) -> dict[str, Any]:
        """Return what results.json holds, with the folder."""
        return {"folder": str(self.folder), **self.written}

    def _repr_markdown_(self) -> str:
        return self.markdown


def align(
    config: AlignConfig,
    folder: str | Path,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
    command: str = "",
) -> AlignResults:
    """Measure, sweep, distil and measure again, principle after principle; export and report.

    Args:
        config: The project.
        folder: Of the project: everything it writes. One that holds a project is gone on with.
        progress: Called as progress(what, done, total).
        overwrite: Start again though the folder holds a project.
        command: What was typed, for the report.

    Raises:
        ConfigError: A setting; a folder that is no project's.
        DataError: Prompts that cannot be used, or that stand on both sides.
        ModelError: A model that cannot be.
    """
    config = config.placed()
    run = RunFolder(Path(folder).expanduser(), KIND, {"format": 1}, command=command,
                    overwrite=overwrite)  # fmt: skip
    try:
        run.start()
        run.write(PROJECT, write_toml(config.content()))
        project = Project(config, run, progress)
        return _Alignment(project).results()
    finally:
        run.close()


def extended(folder: str | Path, path: str | Path) -> AlignConfig:
    """Return the project in a folder with the principles of a file behind its own.

    Raises:
        ConfigError: There is no project in the folder, or a name is taken.
    """
    kept = Path(folder).expanduser() / PROJECT
    if not kept.is_file():
        raise ConfigError(f'No project in "{folder}": it has no {PROJECT}.')
    return AlignConfig.of(read_toml(kept), str(kept), folder).with_principles(path)


class _Alignment:
    """The stages of a project in their order, and what was found."""

    def __init__(self, project: Project) -> None:
        self.project, self.config = project, project.config
        self.states: list[dict[str, Answers]] = []
        """Of each state, its answers."""
        self.learned: dict[str, int] = {}
        """Principle -> the state right after it."""
        self.leaks: list[dict[str, Answers]] = []
        self.drifts: list[dict[str, Any] | None] = []
        self.chosen: dict[str, dict[str, Any]] = {}

    def results(self) -> AlignResults:
        """Run what is missing, and write everything."""
        project, config = self.project, self.config
        planned = {(s.kind, s.name): s.missing for s in project.planned()}

        def timed(kind: str, name: str, work: Any) -> Any:
            return project.timed(kind, name, planned.get((kind, name), 0), work)

        def measured(index: int, name: str) -> LanguageModel:
            lm = project.model(index)
            timed("measure", name, lambda: self._measure(index, lm))
            return lm

        last = measured(0, "the model as it is")
        prompted = project.prompted()
        project.diagnose()
        project.check_principles(self.states[0])
        for index, principle in enumerate(config.principles, 1):
            name, before = principle.title, project.folders[-1]
            if name in project.skipped:
                project.folders.append(before)
                self._again()
                continue
            choose = lambda i=index, b=before: project.choose(i, b)  # noqa: E731
            chosen = self.chosen[name] = timed("sweep", name, choose)
            learn = lambda i=index, c=chosen, b=before: project.learn(i, c, b)  # noqa: E731
            project.folders.append(timed("distil", name, learn))
            self.learned[name] = index
            last = measured(index, name)
        end = len(config.principles)
        off_path = project.off_path(end, last, self.states[0])
        found = self._verdict()
        written = self._written(prompted, off_path, found)
        exported = self._export(written)
        return self._finish(found, exported, written)

    def _measure(self, index: int, lm: LanguageModel) -> None:
        """Ask a state everything."""
        project = self.project
        answers = project.measure(index, lm)
        leaks = {}
        for principle in self.config.principles:
            if (suite := project.leak_suite(principle)) is not None:
                leaks[principle.title] = project.asking.ask(lm, project.keys[index]["state"], suite)
        drift = None
        if OTHER in answers:
            start = (self.states or [answers])[0][OTHER]
            drift = vars(drift_from_start(lm, start))
        self.states.append(answers)
        self.leaks.append(leaks)
        self.drifts.append(drift)

    def _again(self) -> None:
        """Take a state over from the one before: nothing was learned."""
        self.states.append(self.states[-1])
        self.leaks.append(self.leaks[-1])
        self.drifts.append(self.drifts[-1])

    # -- what was found

    def _verdict(self) -> Verdict:
        """Return the verdict on the last state."""
        start, end = self.states[0], self.states[-1]
        names = [p.title for p in self.config.principles if p.goal == "adherence"]

        def both(suite: str, measure: str) -> tuple[Any, Any]:
            if suite not in start:
                return (), ()
            return start[suite].values(measure), end[suite].values(measure)

        facts = [both(s, "fact") for s in (*names, OTHER)]
        formats = [both(s, "format") for s in start]
        evidence = Evidence(
            adherence={
                n: (start[n].values("adherence"),
                    self.states[self.learned.get(n, 0)][n].values("adherence"),
                    end[n].values("adherence")) for n in names
            },
            leak={n: a.values("adherence") for n, a in self.leaks[-1].items()},
            over_refusal=both(REQUESTS, "over_refusal"),
            harmful_refusal=both(REQUESTS, "harmful_refusal"),
            facts=_joined(facts),
            format=_joined(formats),
            drift=self.drifts[-1],
        )  # fmt: skip
        return verdict(self.config, evidence, self.project.guards)

    def _export(self, written: Mapping[str, Any]) -> Path | None:
        """Write the last state as one plain adapter or a merged model, if that is not there."""
        project, run = self.project, self.project.run
        folder, state = project.folders[-1], project.keys[-1]["state"]
        target = run.path(EXPORTED)
        mark = [state, self.config.export]
        if folder is None:
            remove(target)
            return None
        if run.facts.get("exported") != mark or not target.is_dir():
            remove(target)
            form = ExportConfig(adapters=(str(folder),), form=self.config.export)
            export(form, target, command=run.command)
            card = (target / "README.md").read_text(encoding="utf-8")
            replace_file(target / "README.md", card + card_section(written))
            run.facts["exported"] = mark
            run.start()
        return target

    def _written(
        self, prompted: Mapping[str, Answers], off_path: Any, found: Verdict
    ) -> dict[str, Any]:
        """Return all that results.json holds."""
        project, config = self.project, self.config
        states = ["untouched", *(p.title for p in config.principles)]
        numbers = [{n: a.numbers() for n, a in state.items()} for state in self.states]
        off = {n: {w: a.numbers() for w, a in places.items()} for n, places in off_path.items()}
        leaks = [{n: share(a.values("adherence")) for n, a in leak.items()} for leak in self.leaks]
        sizes = [len(a.rows) for state in self.states for a in state.values()]
        return {
            "title": config.title,
            "metric": KIND,
            "model": config.source.identity(project.lm),
            **found.as_dict(),
            "diagnosis": project.diagnosis,
            "guards": [g.as_dict() for g in project.guards],
            "principles": [self._principle(i, p) for i, p in enumerate(config.principles, 1)],
            "states": states,
            "measures": numbers,
            "prompted": {n: a.numbers() for n, a in prompted.items()},
            "same": self._same(),
            "leak": leaks,
            "drift": self.drifts,
            "off_path": off,
            "R": self._r(),
            "samples": samples_of(project.lm, self.states, prompted, config),
            "cost": {
                "answers measured": sum(sizes),
                "answers learned from": config.answers * len(self.learned),
                "prompts written by the model": project.prompts.written,
            },
            "project": config.content(),
        }

    def _principle(self, index: int, principle: Any) -> dict[str, Any]:
        """Return what was done for a principle."""
        project, name = self.project, principle.title
        judged = project.judges[name][1]
        own = project.prompts.principles.get(name)
        found: dict[str, Any] = {
            "name": name, "text": principle.text, "goal": principle.goal, "judge": judged,
            "teacher": principle.teacher, "condition": principle.condition,
            "chosen": self.chosen.get(name), "skipped": project.skipped.get(name),
        }  # fmt: skip
        if own is not None:
            found["prompts"] = {
                "validation": len(own.validation), "held out": len(own.held_out),
                "trained on": None if own.train is None else len(own.train),
                "not meeting the condition": own.unlike,
            }  # fmt: skip
        if name not in self.learned:
            return found
        found["folder"] = project.place("distil", index).relative_to(project.run.folder).as_posix()
        if project.point_count(index):
            place = project.place("sweep", index)
            found["sweep"] = {
                "folder": place.relative_to(project.run.folder).as_posix(),
                # Their keys hold the adapter's path, which is another one in another folder.
                "points": [
                    {k: v for k, v in point.items() if k != "key"}
                    for point in read_results(place)["points"]
                ],
            }
        return found

    def _same(self) -> list[Any]:
        """Return the share of other chat that each state answers word for word as at the start."""
        found = []
        for state in self.states:
            if OTHER in state:
                pairs = zip(state[OTHER].rows, self.states[0][OTHER].rows, strict=True)
                found.append(estimated([float(a["text"] == b["text"]) for a, b in pairs]))
        return found

    def _r(self) -> dict[str, Any] | None:
        """Return R over the principles that were learned, and its summary."""
        names = list(self.learned)
        if not names:
            return None
        goals = {p.title: p.goal for p in self.config.principles}

        def score(state: Mapping[str, Answers], name: str) -> float:
            if goals[name] == "adherence":
                return share(state[name].values("adherence"))["value"] or 0.0
            return 1 - (share(state[REQUESTS].values("over_refusal"))["value"] or 0.0)

        rows = [[score(self.states[i], n) for n in names] for i in self.learned.values()]
        before = [score(self.states[0], n) for n in names]
        return {"names": names, "R": rows, "untouched": before, **summary(rows, before)}

    def _finish(
        self, found: Verdict, exported: Path | None, written: Mapping[str, Any]
    ) -> AlignResults:
        """Write results and report."""
        run = self.project.run
        kept: dict[str, Any] = plain(written)
        timings = run.folder / "timings.jsonl"
        seconds = [row for _, row in read_jsonl(timings)] if timings.is_file() else []
        pages = render_pages(kept, run, seconds)
        for name, text in pages.items():
            run.write(name, text)
        run.write("verdict.json", json.dumps(plain(found.as_dict()), indent=1) + "\n")
        done = run.finish(kept)
        return AlignResults(run.folder, found.ship, found.reasons, exported, done,
                            pages["report.md"])  # fmt: skip


def summary_text(results: AlignResults) -> str:
    """Return the numbers and the verdict for a terminal."""
    kept = results.written
    table = render_table(principle_table(kept))
    places = [results.folder / "report.html", results.folder / "verdict.json"]
    lines = [table, "", *summary_lines(kept), "", *map(str, places)]
    return "\n".join([*lines, *([str(results.exported)] if results.exported else [])])


def read_alignment(folder: str | Path) -> dict[str, Any]:
    """Return results.json of a finished project; `DataError` where there is none."""
    found = read_results(folder)
    if found["kind"] != KIND:
        raise DataError(f'{folder}: holds a run of kind "{found["kind"]}", not a project.')
    return found


def _joined(pairs: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """Return the values of several suites as one, at the start and at the end."""
    return [v for a, _ in pairs for v in a], [v for _, b in pairs for v in b]
