"""Stacking: tasks trained one after the other, each measured on all after each.

    results = stack(StackConfig(tasks="stream.toml", keep="drift"), "runs/stacked")
    results.R, results.measures["average_accuracy"]

The folder of a run:

    manifest.json     what decides the result, and what it was called with
    log.jsonl         the training loss and the penalties, a row for every logged step
    stages/01-NAME/   `adapter/` (PEFT's format), `done.json` with the scores
    R.json, R.csv     the scores of every task after every stage, the measures
    R.png, time.png   the same to look at
    config.toml       the settings as a file
    README.md         a model card

A killed run goes on when it is called again with the same settings: at the stage where it stopped,
from its last checkpoint, and with the same result as unbroken (bit-equal on a CPU).
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trueline.errors import ConfigError
from trueline.evals.transfer import summary, trained
from trueline.jobs.stack_cards import run_card
from trueline.models.places import BUNDLED
from trueline.records.hashes import versions
from trueline.records.lines import LineFile, plain
from trueline.records.manifest import read_manifest
from trueline.records.run_folder import MANIFEST, RunFolder
from trueline.settings.reader import build, check, explain, merge, write_toml
from trueline.train.chain import Scores, chain, links
from trueline.train.keep import Keep, find_keep, make_keep
from trueline.train.tasks.fresh import model_factory
from trueline.train.tasks.scores import matrices
from trueline.train.tasks.stages import TaskStages, places
from trueline.train.tasks.stream_config import StreamConfig
from trueline.train.tasks.stream_files import read_stream
from trueline.train.tasks.task_trainer import calm
from trueline.types import Progress, check_threads

KIND, LOG = "stack", "log.jsonl"


@dataclass(frozen=True)
class StackConfig(StreamConfig):
    """Which tasks are trained into which model, and how what came before is kept."""

    tasks: str | None = None
    """TOML file of the stream; see docs/streams.md."""
    data: str | None = None
    """Folder of the tasks' data, instead of the file's `data`."""
    model: str = "tiny"
    """Folder or hub name of a causal, encoder-decoder or classification model, or "tiny"."""
    keep: str = "o-lora"
    """How earlier tasks are kept: o-lora, inf-lora, drift, ella, replay, or none."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the way to keep, e.g. {"strength": 100.0} for drift."""
    threads: int | None = None
    """CPU threads; none is torch's choice, 1 for "tiny"."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tasks is None:
            raise ConfigError("`--tasks FILE` is missing: a TOML file that names the tasks.")
        make_keep(self.keep, **self.options)
        check_threads(self.threads)

    @classmethod
    def layered(cls, layers: Sequence[tuple[Mapping[str, Any], str]]) -> StackConfig:
        """Return the config of layers of settings, each with where it was said; the last wins.

        The way to keep has its own settings among them.
        """
        way = cls._way(layers)
        values = merge(*(check(given, [cls, way], source) for given, source in layers))
        own = {f.name: values[f.name] for f in fields(way) if f.name in values}
        return build(cls, {**values, "options": own})

    @classmethod
    def explained(cls, layers: Sequence[tuple[Mapping[str, Any], str]] = ()) -> list[Any]:
        """Return (name, default, what it is) of every setting, the way's that `layers` name."""
        rows = explain([cls, cls._way(layers)])
        return [row for row in rows if row[0] != "options"]

    @classmethod
    def _way(cls, layers: Sequence[tuple[Mapping[str, Any], str]]) -> type[Keep]:
        given = [values["keep"] for values, _ in layers if "keep" in values]
        return find_keep(str(given[-1] if given else cls.keep))

    def training(self) -> StreamConfig:
        """Return what decides how each task is trained and measured."""
        return StreamConfig(**{f.name: getattr(self, f.name) for f in fields(StreamConfig)})

    def as_toml(self) -> str:
        """Return the settings as a file, those of the way to keep among them."""
        own = asdict(self)
        own.pop("options")
        return write_toml({**own, **asdict(make_keep(self.keep, **self.options))})


@dataclass(frozen=True)
class StackResults:
    """What a stream gave."""

    tasks: tuple[str, ...]
    strategy: str
    """The way to keep."""
    R: NDArray[np.float64]
    """Scores of every task (columns) after every stage (rows), by the run's `scoring`."""
    untouched: NDArray[np.float64]
    """Scores of the model before any training."""
    views: dict[str, dict[str, NDArray[np.float64]]] = field(repr=False)
    """`R` and `untouched` by every way of scoring that was measured."""
    measures: dict[str, float]
    """`trueline.evals.transfer.summary` of R; while it goes on, of the tasks so far."""
    text_loss: list[float]
    """Cross-entropy on unrelated texts before any training and after each stage; may be empty."""
    folder: Path
    adapters: tuple[Path, ...]
    """Folders of the adapters that make up the last model, for export."""
    about: dict[str, Any] = field(repr=False)
    """Family of the model, labels, seed, scoring."""
    finished: bool
    broken: tuple[str, ...] = ()
    """Checkpoints that could not be gone on from; the ones before were taken."""

    def as_dict(self) -> dict[str, Any]:
        """Return what R.json holds."""
        found = {
            "tasks": list(self.tasks),
            "strategy": self.strategy,
            **self.about,
            "R": self.R.tolist(),
            "untouched": self.untouched.tolist(),
            "measures": self.measures,
            "views": {v: {k: a.tolist() for k, a in d.items()} for v, d in self.views.items()},
            "text_loss": self.text_loss,
            "adapters": [str(path.relative_to(self.folder)) for path in self.adapters],
            "finished": self.finished,
        }
        plain_: dict[str, Any] = plain(found)
        return plain_

    def as_csv(self) -> str:
        """Return R as a table."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["after", *self.tasks])
        for name, row in self.rows():
            table.writerow([name, *("" if np.isnan(v) else f"{v:.6f}" for v in row)])
        return text.getvalue()

    def rows(self) -> list[tuple[str, NDArray[np.float64]]]:
        """Return the scores before any training and after each stage, with their names."""
        names = self.tasks if len(self.R) == len(self.tasks) else ["all"] * len(self.R)
        return [("untouched", self.untouched), *zip(names, self.R, strict=True)]


def stack(
    config: StackConfig,
    folder: str | Path,
    *,
    resume: bool | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> StackResults:
    """Train the tasks in their order, each on top of those before, and measure all after each.

    Args:
        config: What is trained, and how.
        folder: Of the run; an unfinished run in it goes on, a finished one is read.
        resume: False refuses an unfinished run.
        overwrite: Remove what a run left in the folder.
        command: What the user typed, for the model card.
        progress: Told of each step.

    Raises:
        ConfigError: An option is out of range, or the folder is another run's.
        DataError: The stream or its data cannot be read.
        ModelError: The model does not fit the tasks.
    """
    from trueline.records.style import need_matplotlib

    need_matplotlib()
    assert config.tasks is not None
    stream = read_stream(config.tasks, data=config.data)
    if not overwrite:
        _check_log(Path(folder))
    if config.threads is not None or config.model in BUNDLED:
        torch.set_num_threads(config.threads or 1)
    with calm():
        stages = TaskStages(
            stream.tasks,
            model_factory(config.model, stream.tasks, trust_remote_code=config.trust_remote_code),
            make_keep(config.keep, **config.options),
            config.training(),
            prompt=stream.prompt,
            progress=progress,
        )
        run = open_run(
            stages, config.keep, folder, resume=resume, overwrite=overwrite, command=command
        )
        with contextlib.closing(run):
            before = run.finished
            run.write("config.toml", config.as_toml())
            results = run_stages(stages, config.keep, run)
            if not before:  # what a finished run says of itself stays as it was
                run.write("README.md", run_card(stream, config, results, run))
                run.finish(results.as_dict())
    return results


def _check_log(folder: Path) -> None:
    """Refuse a log to go on with that no stream wrote, before a model is loaded."""
    kept = read_manifest(folder / MANIFEST)
    if kept is not None and kept["settings"].get("kind") == KIND and (folder / LOG).is_file():
        with contextlib.closing(LineFile(folder / LOG)) as log:
            places(log)


def open_run(stages: TaskStages, name: str, folder: str | Path, **options: Any) -> RunFolder:
    """Return the folder of a run, taken for it; `options` are those of `RunFolder`."""
    settings = {"strategy": {"name": name, **asdict(stages.keep)}, **stages.settings()}
    run = RunFolder(folder, KIND, settings, **options)
    try:
        run.start({"versions": versions()})
    except BaseException:
        run.close()
        raise
    return run


def run_stages(
    stages: TaskStages,
    name: str,
    run: RunFolder,
    *,
    figures: bool = True,
    after: Callable[[StackResults], object] = lambda results: None,
) -> StackResults:
    """Do what is not done yet of the stages, and write what they gave.

    Args:
        stages: What is trained and measured.
        name: Of the way to keep, or of a strategy.
        run: An open folder.
        figures: Draw after each stage; needs matplotlib.
        after: Called with the results after each stage.
    """
    stages.log = run.lines(LOG)

    def write(found: Sequence[Scores]) -> StackResults:
        results = results_of(stages, name, run.folder, found)
        run.write("R.json", json.dumps(results.as_dict(), ensure_ascii=False, indent=1) + "\n")
        run.write("R.csv", results.as_csv())
        if figures and not (results.finished and (run.folder / "time.png").exists()):
            _draw(results, run)
        return results

    def stage_done(found: Sequence[Scores]) -> None:
        after(write([*found]))

    folder, seed = run.subfolder("stages"), stages.config.seed
    return write(
        chain(stages.names, folder, stages.train, stages.measure, seed=seed, after=stage_done)
    )


def results_of(
    stages: TaskStages, name: str, folder: Path, found: Sequence[Scores]
) -> StackResults:
    """Return the results of the stages so far."""
    config, done = stages.config, len(found) - 1
    views = matrices(found, len(stages.names))
    main = views[config.scoring]
    part, before = main["R"], main["untouched"]
    if done < len(stages.names):
        part, before = trained(part), before[:done]
    family = stages.family
    about = {"family": family.name, "chat": family.chat, "labels": list(family.union)}
    about["asked"] = stages.prompt.text(stages.tasks[0], "SENTENCE")
    about |= {key: getattr(config, key) for key in ("seed", "scoring", "evaluate_on")}
    folders = [link.folder for link in links(stages.names, folder / "stages")][:done]
    return StackResults(
        tuple(task.name for task in stages.tasks),
        name,
        main["R"],
        main["untouched"],
        views,
        summary(part, before) if part.size else {},
        [scores["text_loss"] for scores in found if "text_loss" in scores],
        folder,
        stages.weights.adapters(folders),
        about,
        done == len(stages.names),
        tuple(stages.broken),
    )


def _draw(results: StackResults, run: RunFolder) -> None:
    from trueline.evals.transfer_figures import draw_matrix, draw_over_time

    R, tasks = results.R, results.tasks
    run.draw("R.png", draw_matrix(R, tasks, results.strategy, results.untouched), dpi=100)
    run.draw("time.png", draw_over_time(R, tasks, results.strategy), dpi=100)
