"""Sessions: one call of a measurement on its run folder, from the lock to the written results."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trueline.evals import tables
from trueline.evals.endpoint import hide, secrets_of
from trueline.evals.judging import JudgeConfig, spent
from trueline.evals.statistics import Estimate
from trueline.models.load import LanguageModel
from trueline.models.source import ModelConfig
from trueline.records.hashes import digest, model_hash, versions
from trueline.records.lines import Rows, plain
from trueline.records.run_folder import RunFolder
from trueline.records.style import STYLE, need_matplotlib
from trueline.types import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Work = Callable[[Sequence[Any], int], Sequence[Mapping[str, Any]]]
"""(batch, index of its first) -> a row for each."""


@dataclass(frozen=True)
class Calling:
    """How a job is called: where it writes, with what, and who hears of its progress."""

    folder: str | Path | None = None
    model: LanguageModel | None = None
    progress: Progress | None = None
    overwrite: bool = False
    command: str = ""

    def load(self, source: ModelConfig) -> tuple[LanguageModel, dict[str, Any]]:
        """Return the model, and the settings that tell it and the versions."""
        model = self.model or source.load()
        about = source.identity(model)
        if self.model is not None:  # its weights may be no file's
            about["hash"] = model_hash(model)
        return model, {"model": about, "versions": versions()}

    def tell(self, what: str, done: int, total: int) -> None:
        """Say how far the job is."""
        if self.progress is not None:
            self.progress(what, done, total)


@dataclass(frozen=True)
class MeasureResults:
    """What a measurement found; `folder` holds the responses and verdicts behind it."""

    folder: Path
    title: str
    metric: str
    judge: Mapping[str, Any]
    points: tuple[Mapping[str, Any], ...] = ()
    """Of each setting: label, method, fields, measures, quality."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Of what has no settings, such as a win rate."""
    recommendation: Mapping[str, Any] | None = None
    written: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """All of results.json."""

    @property
    def rates(self) -> dict[str, Estimate]:
        """Measure -> estimate, of the last point, which is the method's own, or of `numbers`."""
        found = self.points[-1]["measures"] if self.points else self.numbers
        names = Estimate.__dataclass_fields__
        return {
            name: Estimate(**{k: value[k] for k in names})
            for name, value in found.items()
            if isinstance(value, Mapping) and "low" in value
        }

    def as_dict(self) -> dict[str, Any]:
        """Return what results.json holds, with the folder."""
        return {"folder": str(self.folder), **self.written}

    def table(self) -> str:
        """Return the numbers as text for a terminal."""
        return tables.render_results(self.written)

    def _repr_markdown_(self) -> str:
        return tables.results_markdown(self.written)


class Session:
    """One call of a job on its run folder; leaving it frees the folder and notes the seconds.

    >>> with Session("refusal", settings, calling) as session:
    ...     session.responses.compute(...)
    ...     results = session.finish(results, draw)
    """

    def __init__(
        self, kind: str, settings: Mapping[str, Any], calling: Calling, judge: Any = None
    ) -> None:
        own = digest(plain(settings))[:8]
        folder = Path("runs") / f"{kind}-{own}" if calling.folder is None else calling.folder
        folder, command = Path(folder).expanduser(), _without_secrets(calling.command, judge)
        self.run = RunFolder(folder, kind, settings, command=command, overwrite=calling.overwrite)
        try:
            self.run.start()
            self.responses: Rows = self.run.rows("responses.jsonl")
            self.verdicts: Rows = self.run.rows("verdicts.jsonl")
        except BaseException:
            self.run.close()
            raise
        self.calling, self.judge = calling, None
        self.counts: dict[str, int] = {}
        self._start = time.perf_counter()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        seconds = round(time.perf_counter() - self._start, 1)
        self.run.close({**self.counts, "seconds": seconds, **spent(self.judge)[1]})

    def finish(
        self, results: Mapping[str, Any], draw: Callable[[], Figure] | None = None
    ) -> MeasureResults:
        """Write the numbers and the plot."""
        found: dict[str, Any] = plain({**results, **spent(self.judge)[0]})
        found["plot"] = draw is not None
        if draw is not None:
            from matplotlib import rc_context  # an extra, loaded only where something is drawn

            with rc_context(STYLE):
                self.run.draw("plot.png", draw())
        text = tables.render_run(found, self.run.settings, self.run.command)
        self.run.write("results.md", text)
        written = self.run.finish(found)
        return MeasureResults(
            self.run.folder,
            written["title"],
            written["metric"],
            written["judge"],
            tuple(written.get("points", ())),
            written.get("numbers", {}),
            written.get("recommendation"),
            written,
        )


def measure_rows(
    kind: str,
    title: str,
    settings: Mapping[str, Any],
    items: Sequence[Any],
    start: Callable[[Path], tuple[Work, Mapping[str, Any], Any]],
    numbers: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    calling: Calling,
    *,
    batch_size: int,
    of: int,
    judge: Any = None,
    draw: Callable[[Mapping[str, Any]], Figure] | None = None,
) -> MeasureResults:
    """Compute a row for every item in the run's folder, and the numbers of them all.

    `start` makes the work from the folder, with a description of its judge and the judge; of `of`
    items in the data these were taken.
    """
    with Session(kind, {"versions": versions(), **settings}, calling, judge) as session:
        work, judged_by, session.judge = start(session.run.folder)
        key = digest([kind, session.run.settings, judged_by])
        done = session.verdicts.done(key, len(items))
        calling.tell(kind.replace("_", " "), done, len(items))

        def count(new: int) -> None:
            nonlocal done
            done += new
            calling.tell(kind.replace("_", " "), done, len(items))

        session.counts["rows"] = len(items)
        rows = session.verdicts.compute(key, items, batch_size, work, count)
        found = numbers(rows)
        results = {"title": title, "metric": kind, "judge": dict(judged_by), "numbers": found}
        results["prompts"] = {"n": len(items), "of": of}
        return session.finish(results, None if draw is None else lambda: draw(found))


def check_plot(wanted: bool) -> None:
    """Raise `ConfigError` where a plot is wanted and nothing can draw it."""
    if wanted:
        need_matplotlib()


def _without_secrets(command: str, judge: Any) -> str:
    """Return the command without the secrets of the judge's address."""
    if not isinstance(judge, JudgeConfig) or not judge.url:
        return command
    secrets = secrets_of(judge.url)
    words = [hide(word, secrets) for word in shlex.split(command)]
    return shlex.join(words)
