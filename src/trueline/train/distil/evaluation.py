"""How a student does on held-out prompts while it is trained."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from trueline.engine.decoding import generate
from trueline.evals.items import Item
from trueline.evals.metrics import METRICS, judge_responses
from trueline.types import Message, Request, SamplingParams

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel
    from trueline.train.distil.teachers import Teacher


class HeldOut:
    """Measures a student's answers, decoded greedily after the prompt that it is trained on.

    Args:
        items: Prompts, with what it takes to judge an answer.
        metric: "adherence" or "refusal".
        judge: One of `trueline.evals.judges`; None uses the items' patterns.
        teacher: It knows what the student is shown.
        max_new_tokens: Of an answer.
    """

    def __init__(
        self, items: Sequence[Item], metric: str, judge: Any, teacher: Teacher, max_new_tokens: int
    ) -> None:
        self.items, self.metric, self.judge = items, metric, judge
        self.teacher, self.max_new_tokens = teacher, max_new_tokens

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """Return the mean of each measure over the answers that the judge could read."""
        sampling = SamplingParams(max_new_tokens=self.max_new_tokens)
        requests = [Request(self._messages(model, item)) for item in self.items]
        texts = [c.text for c in generate(model, requests, sampling=sampling)]
        verdicts = judge_responses(self.metric, self.items, texts, self.judge)
        means = {}
        for name in METRICS[self.metric]:
            values = [v[name] for v in verdicts if v.get(name) is not None]
            if values:
                means[name] = sum(values) / len(values)
        return means

    def _messages(self, model: LanguageModel, item: Item) -> list[Message]:
        principle = item.principle if self.teacher.takes_principle else None
        row = {"prompt": item.prompt, "principle": principle}
        return self.teacher.student_messages(model, row)


class Evaluation(TrainerCallback):
    """Logs `measure()` before training, every `eval_steps` steps and at the end.

    What it returns is logged as `eval_NAME`; random states are given back as they were.
    """

    def __init__(self, trainer: Trainer, measure: Callable[[], Mapping[str, float]]) -> None:
        self.trainer, self.measure = trainer, measure
        self.last = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the start, but not that of a resumed run."""
        self.last = state.global_step if state.global_step else -1
        self._run(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure where a step is due."""
        if args.eval_steps and state.global_step % int(args.eval_steps) == 0:
            self._run(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the end."""
        self._run(state)

    def _run(self, state: Any) -> None:
        if state.global_step == self.last:
            return
        self.last = state.global_step
        trainer = self.trainer
        if trainer.accelerator.is_main_process:
            with _same_random_numbers():
                found = self.measure()
            logs = {k if k.startswith("eval_") else f"eval_{k}": float(v) for k, v in found.items()}
            # The step's own log, if one is due, is not to be taken for done.
            due = trainer.control.should_log
            trainer.log(logs)
            trainer.control.should_log = due
        trainer.accelerator.wait_for_everyone()


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Give back the global random states as they were."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
