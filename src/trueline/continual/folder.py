"""The folder of a stream: whose it is, what is written after each stage, the log."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback

from trueline.errors import ConfigError, DataError
from trueline.records.data import dump, lock, replace_file
from trueline.records.runs import different, plain, versions
from trueline.records.training_folder import step_of

WRITTEN = (
    *("stream.json", "log.jsonl", "R.json", "R.csv", "R.png", "time.png"),
    *("config.toml", "README.md"),
)
"""What a run leaves beside `stages/`; the last two are the command line's."""


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
def hold_folder(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> Iterator[None]:
    """Hold the folder of a run for this process; refuse it where it is another run's."""
    path = folder / "stream.json"
    if not path.exists() and folder.exists() and any(folder.glob("[!.]*")):
        raise ConfigError(f'Folder "{folder}" holds other things. Give an empty one.')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = open(folder / ".lock", "a+b")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f'Cannot write to "{folder}": {error.strerror}.') from None
    with held:
        lock(held, folder)
        if overwrite:
            shutil.rmtree(folder / "stages", ignore_errors=True)
            for name in WRITTEN:
                (folder / name).unlink(missing_ok=True)
        elif path.exists() and (found := different(read_json(path).get("settings"), settings)):
            changes = "; ".join(f"{name} was {a}, now {b}" for name, a, b in found[:6])
            raise ConfigError(
                f'Folder "{folder}" is of another run: {changes}. Give another `output`, or '
                "`overwrite`."
            )
        write_json(path, {"settings": settings, "versions": versions()})
        (folder / "stages").mkdir(exist_ok=True)
        yield


def write_result(
    result: StreamResult, about: Mapping[str, Any], *, final: bool, figures: bool
) -> None:
    """Write R.json, R.csv and the figures; all follow from what is in the stages."""
    folder = result.folder
    content = {
        "tasks": list(result.tasks),
        "strategy": result.strategy,
        **about,
        "R": result.R.tolist(),
        "untouched": result.untouched.tolist(),
        "measures": result.measures,
        "views": {v: {k: a.tolist() for k, a in d.items()} for v, d in result.views.items()},
        "text_loss": result.text_loss,
        "adapters": [str(p.relative_to(folder)) for p in result.adapters],
        "finished": final,
    }
    write_json(folder / "R.json", content)
    text = io.StringIO()
    names = list(result.tasks) if len(result.R) == len(result.tasks) else ["all"]
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["after", *result.tasks])
    for name, row in zip(["untouched", *names], [result.untouched, *result.R], strict=True):
        table.writerow([name, *("" if np.isnan(v) else f"{v:.6f}" for v in row)])
    replace_file(folder / "R.csv", text.getvalue())
    if not figures or (final and (folder / "time.png").exists()):
        return
    from trueline.continual.figures import draw_matrix, draw_over_time

    for name, figure in (
        ("R.png", draw_matrix(result.R, result.tasks, result.strategy, result.untouched)),
        ("time.png", draw_over_time(result.R, result.tasks, result.strategy)),
    ):
        figure.savefig(folder / name, dpi=100)


class Log(TrainerCallback):
    """Writes the trainer's logs as rows and moves the bar."""

    def __init__(
        self, path: Path, stage: int, name: str, bar: Any, checkpoint: Path | None
    ) -> None:
        self.path, self.stage, self.name, self.bar = path, stage, name, bar
        self.seen = step_of(checkpoint) if checkpoint else 0
        cut_log(path, stage, self.seen)
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
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(dump(plain(row)) + "\n")


def cut_log(path: Path, stage: int, step: int) -> None:
    """Drop the rows that a resumed run makes again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if line.endswith("\n") and (row["stage"], row["step"]) <= (stage, step):
                kept.append(line)
    replace_file(path, "".join(kept))


def read_json(path: Path) -> dict[str, Any]:
    """Return what `write_json` wrote; `DataError` where it cannot be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}. Give `overwrite`.") from None
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that at every moment the old or the new file is there, whole."""
    replace_file(path, json.dumps(plain(content), ensure_ascii=False, indent=1) + "\n")
