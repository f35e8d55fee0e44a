"""What a training run says of itself: a row of numbers a step, and how far it is."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from trueline.records.checkpoints import step_of
from trueline.records.lines import plain
from trueline.records.run_folder import RunFolder
from trueline.records.style import brief
from trueline.types import Progress

LOG = "log.jsonl"


class TrainingLog(TrainerCallback):
    """Writes a row for every log of a trainer, and tells how far it is.

    Args:
        trainer: Whose run it is; its own bar and prints are taken away.
        run: Where the rows go; None only tells.
        config: The run's settings as TOML.
        shown: Name in the log -> short name beside the progress.
        progress: Told after every step.

    Raises `DataError` for a log to go on with that a run did not write.
    """

    def __init__(
        self,
        trainer: Any,
        run: RunFolder | None,
        config: str,
        shown: Mapping[str, str],
        progress: Progress | None,
    ) -> None:
        self.trainer, self.run, self.config, self.shown = trainer, run, config, shown
        self.progress, self.what = progress, ""
        self.start = time.perf_counter()
        self.first = 0
        self.kept = (0, 0.0)
        """Where the checkpoint's last row ends in the log, and the seconds up to there."""
        if run is not None and LOG in run.files and not run.overwrite:
            self.kept = _kept(run)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the folder: it is the run's from here on."""
        before = 0.0 if self.run is None else self._take(self.run)
        self.start, self.first = time.perf_counter() - before, state.global_step
        self._tell(state)

    def _take(self, run: RunFolder) -> float:
        """Take the folder; cut the log to the checkpoint, and return the seconds up to there."""
        run.start({name: getattr(self.trainer, name, None) for name in ("effect", "warning")})
        run.write("config.toml", self.config)
        end, seconds = self.kept
        run.lines(LOG).cut(end)
        return seconds

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the row; the trainer's own summary at the end is no step."""
        row = {k: v for k, v in (logs or {}).items() if not k.startswith("train_")}
        row.pop("total_flos", None)
        if not row or not state.is_world_process_zero or "train_runtime" in (logs or {}):
            return
        if self.run is not None:
            seconds = round(time.perf_counter() - self.start, 3)
            row = plain({"step": state.global_step, **row, "seconds": seconds})
            self.run.lines(LOG).append([row], sync=False)
        if named := [f"{short} {brief(row[k])}" for k, short in self.shown.items() if k in row]:
            self.what = "  ".join(named)
            self._tell(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell how far the run is."""
        self._tell(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep how long it took."""
        if self.run is not None:
            seconds = round(time.perf_counter() - self.start, 3)
            steps = state.global_step - self.first
            self.run.note({"from_step": self.first, "steps": steps, "seconds": seconds})

    def _tell(self, state: Any) -> None:
        if self.progress is not None and state.is_world_process_zero:
            self.progress(self.what, state.global_step, state.max_steps)


def _kept(run: RunFolder) -> tuple[int, float]:
    """Return where in the log the checkpoint's rows end, and its seconds up to there."""
    log, end, seconds = run.lines(LOG), 0, 0.0
    last = step_of(run.checkpoint) if run.checkpoint else -1
    for line, place, row in log.rows():
        step, took = row.get("step"), row.get("seconds")
        if not isinstance(step, int) or not isinstance(took, (int, float)):
            raise log.foreign(line)
        if step > last:
            break
        end, seconds = place, float(took)
    return end, seconds


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back what transformers and datasets print about themselves; errors stay."""
    names = ("transformers", "accelerate", "datasets", "peft")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module=rf"{name}\b")
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Hold back transformers' own bars over the files that it writes."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
