"""The folder of a stream: whose it is, what is written after each stage, the log."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback

from trueline.records.checkpoints import step_of
from trueline.records.hashes import versions
from trueline.records.lines import LineFile, plain
from trueline.records.manifest import write_json
from trueline.records.run_folder import RunFolder

COMMAND_LINE = ("config.toml", "README.md")
"""What the command line writes into the folder."""


@dataclass(frozen=True)
class StreamResult:
    """What a stream gave."""

    tasks: tuple[str, ...]
    strategy: str
    R: NDArray[np.float64]
    """Scores of every task (columns) after every stage (rows), by the run's `scoring`."""
    untouched: NDArray[np.float64]
    """Scores of the model before any training."""
    views: dict[str, dict[str, NDArray[np.float64]]] = field(repr=False)
    """`R` and `untouched` by every way of scoring that was measured."""
    measures: dict[str, float]
    """`trueline.continual.metrics.summary` of R, for a stream that has ended."""
    text_loss: list[float]
    """Cross-entropy on unrelated texts before any training and after each stage; may be empty."""
    folder: Path
    adapters: tuple[Path, ...]
    """Folders of the adapters that make up the last model, for export."""


@contextlib.contextmanager
def hold_folder(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> Iterator[RunFolder]:
    """Hold the folder of a stream for this process; refuse it where it is another run's."""
    run = RunFolder(folder, "stream", settings, overwrite=overwrite)
    try:
        run.start({"versions": versions()})
        run.subfolder("stages")
        for name in COMMAND_LINE:
            run.path(name)
        yield run
    finally:
        run.close()


def write_result(
    run: RunFolder, result: StreamResult, about: Mapping[str, Any], *, final: bool, figures: bool
) -> None:
    """Write R.json, R.csv and the figures; all follow from what is in the stages."""
    content = {
        "tasks": list(result.tasks),
        "strategy": result.strategy,
        **about,
        "R": result.R.tolist(),
        "untouched": result.untouched.tolist(),
        "measures": result.measures,
        "views": {v: {k: a.tolist() for k, a in d.items()} for v, d in result.views.items()},
        "text_loss": result.text_loss,
        "adapters": [str(p.relative_to(run.folder)) for p in result.adapters],
        "finished": final,
    }
    write_json(run.path("R.json"), content)
    text = io.StringIO()
    names = list(result.tasks) if len(result.R) == len(result.tasks) else ["all"]
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["after", *result.tasks])
    for name, row in zip(["untouched", *names], [result.untouched, *result.R], strict=True):
        table.writerow([name, *("" if np.isnan(v) else f"{v:.6f}" for v in row)])
    run.write("R.csv", text.getvalue())
    if not figures or (final and (run.folder / "time.png").exists()):
        return
    from trueline.continual.figures import draw_matrix, draw_over_time

    for name, figure in (
        ("R.png", draw_matrix(result.R, result.tasks, result.strategy, result.untouched)),
        ("time.png", draw_over_time(result.R, result.tasks, result.strategy)),
    ):
        run.draw(name, figure, dpi=100)


class Log(TrainerCallback):
    """Writes the trainer's logs as rows and moves the bar."""

    def __init__(
        self, file: LineFile, stage: int, name: str, bar: Any, checkpoint: Path | None
    ) -> None:
        self.file, self.stage, self.name, self.bar = file, stage, name, bar
        self.seen = step_of(checkpoint) if checkpoint else 0
        cut_log(file, stage, self.seen)
        bar.set_description(name)
        bar.update(self.seen)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(state.global_step - self.seen)
        self.seen = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append a row."""
        if not logs or "loss" not in logs:
            return
        self.bar.set_postfix(loss=f"{float(logs['loss']):.3g}")
        kept = {k: v for k, v in logs.items() if k == "loss" or k.startswith("penalty/")}
        row = {"stage": self.stage, "task": self.name, "step": state.global_step, **kept}
        self.file.append([plain(row)], sync=False)


def cut_log(file: LineFile, stage: int, step: int) -> None:
    """Drop the rows that a resumed run makes again."""
    end = 0
    for line, place, row in file.rows():
        at = (row.get("stage"), row.get("step"))
        if not all(isinstance(n, int) for n in at):
            raise file.foreign(line)
        if at > (stage, step):
            break
        end = place
    file.cut(end)
