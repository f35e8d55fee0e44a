"""What a training run says of itself: a row of numbers a step, a bar, curves, a model card."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from trueline.records.checkpoints import step_of
from trueline.records.lines import plain
from trueline.records.run_folder import RunFolder
from trueline.records.style import BLUE, FAINT, ORANGE, STYLE, brief, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LOG = "log.jsonl"


class Progress(TrainerCallback):
    """Writes a row for every log of the trainer, and shows a bar with the numbers that matter.

    Args:
        trainer: Whose run it is.
        run: Where the rows go; none only shows them.
        config: The run's settings as TOML.
        shown: Name in the log -> short name on the bar.
    """

    def __init__(
        self, trainer: Any, run: RunFolder | None, config: str, shown: Mapping[str, str]
    ) -> None:
        self.trainer, self.run, self.config, self.shown = trainer, run, config, shown
        self.bar: Any = None
        self.start = time.perf_counter()
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar; the folder is the run's from here on."""
        from tqdm import tqdm

        before = 0.0
        if self.run is not None:
            before = self._take(self.run)
        self.start, self.first = time.perf_counter() - before, state.global_step
        if state.is_world_process_zero:
            every = 0.2 if sys.stderr.isatty() else 30.0
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step",
                            mininterval=every, file=sys.stderr, dynamic_ncols=True)  # fmt: skip

    def _take(self, run: RunFolder) -> float:
        """Take the folder; cut the log to the checkpoint, and return the seconds up to there."""
        run.start({"effect": getattr(self.trainer, "effect", None)})
        run.write("config.toml", self.config)
        log, end, seconds = run.lines(LOG), 0, 0.0
        last = step_of(run.checkpoint) if run.checkpoint else -1
        for line, place, row in log.rows():
            step, took = row.get("step"), row.get("seconds")
            if not isinstance(step, int) or not isinstance(took, (int, float)):
                raise log.foreign(line)
            if step > last:
                break
            end, seconds = place, float(took)
        log.cut(end)
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
        if self.bar is not None:
            named = {short: row[name] for name, short in self.shown.items() if name in row}
            self.bar.set_postfix({k: brief(v) for k, v in named.items()}, refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar and keep how long it took."""
        if self.bar is not None:
            self.bar.close()
        if self.run is not None:
            seconds = round(time.perf_counter() - self.start, 3)
            steps = state.global_step - self.first
            self.run.note({"from_step": self.first, "steps": steps, "seconds": seconds})


def attach(trainer: Any, run: RunFolder | None, config: str, shown: Mapping[str, str]) -> None:
    """Replace the trainer's own bar and prints by ours; see `Progress`."""
    from transformers import PrinterCallback
    from transformers.trainer_callback import ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.callback_handler.callbacks.insert(0, Progress(trainer, run, config, shown))


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


def rank_note(rank: int) -> str:
    """Return what vLLM has to be told to serve a LoRA of this rank."""
    from trueline.train.adapters.export import VLLM_RANKS

    fitting = next((r for r in VLLM_RANKS if r >= rank), None)
    if fitting is None:
        return f"vLLM serves ranks up to {VLLM_RANKS[-1]}, and this LoRA has {rank}: merge it."
    return f"vLLM: --enable-lora --max-lora-rank {fitting} --lora-modules NAME=FOLDER"


def draw_curves(
    rows: Sequence[Mapping[str, Any]], panels: Mapping[str, str], title: str
) -> Figure | None:
    """Return a figure with a panel over steps for each name of `panels` that the rows have.

    A panel's second line is the same name with `eval_` before it. None where no row has a number.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = [n for n in panels if _series(rows, n)[0] or _series(rows, f"eval_{n}")[0]]
    if not found:
        return None
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.9 * columns, 2.7 * lines + 0.4), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")
        every = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axes, name in zip(every, found, strict=False):
            for key, colour, marker in ((name, BLUE, ""), (f"eval_{name}", ORANGE, "o")):
                steps, values = _series(rows, key)
                only = "o" if len(steps) == 1 else marker
                axes.plot(steps, values, color=colour, linewidth=1.6, marker=only, markersize=4)
            axes.set_title(panels[name], fontsize=10, weight="normal")
            axes.grid(axis="y", color=FAINT, linewidth=0.8)
            axes.set_xlabel("step")
            axes.tick_params(length=0)
        for axes in every[len(found) :]:
            axes.set_visible(False)
    return figure


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of the rows that have a number under this name."""
    pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    return [step for step, _ in pairs], [value for _, value in pairs]
