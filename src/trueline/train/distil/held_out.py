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
    from trueline.train.distil.trainer import InverseQTrainer


class HeldOut:
    """Measures a student's answers, decoded greedily after the prompt that it is trained on.

    Args:
        items: Prompts, with what it takes to judge an answer.
        metric: "adherence" or "refusal".
        judge: One of `trueline.evals.judges`; None uses the items' patterns.
        max_new_tokens: Of an answer.
    """

    def __init__(
        self, items: Sequence[Item], metric: str, judge: Any, max_new_tokens: int = 64
    ) -> None:
        self.items, self.metric, self.judge = items, metric, judge
        self.max_new_tokens = max_new_tokens
        self.teacher: Teacher | None = None
        """Of the trainer: it knows what the student is shown."""

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """Return the mean of each measure over the answers that the judge could read."""
        sampling = SamplingParams(max_new_tokens=self.max_new_tokens)
        requests = [Request(self._messages(item)) for item in self.items]
        texts = [c.text for c in generate(model, requests, sampling=sampling)]
        verdicts = judge_responses(self.metric, self.items, texts, self.judge)
        means = {}
        for name in METRICS[self.metric]:
            values = [v[name] for v in verdicts if v.get(name) is not None]
            if values:
                means[name] = sum(values) / len(values)
        return means

    def _messages(self, item: Item) -> str | list[Message]:
        if self.teacher is None:
            return item.prompt
        principle = item.principle if self.teacher.takes_principle else None
        return self.teacher.student_messages({"prompt": item.prompt, "principle": principle})


class Evaluation(TrainerCallback):
    """Runs a judge before training, every `eval_steps` steps and at the end."""

    def __init__(
        self,
        trainer: InverseQTrainer,
        evaluate: Callable[[LanguageModel], Mapping[str, float]],
    ) -> None:
        self.trainer, self.evaluate = trainer, evaluate
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
            model = trainer.accelerator.unwrap_model(trainer.model)
            training = model.training
            model.eval()
            trainer.student.model = model
            try:
                with _same_random_numbers(), trainer._fast(model):
                    found = self.evaluate(trainer.student)
            finally:
                model.train(training)
            logs = {k if k.startswith("eval_") else f"eval_{k}": float(v) for k, v in found.items()}
            # Past TRL's `log`, which would empty the means of the steps under way, and without
            # the step's own log, if one is due, being taken for done.
            due = trainer.control.should_log
            Trainer.log(trainer, logs)
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
