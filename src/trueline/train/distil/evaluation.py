"""How a student does on held-out prompts while it is trained."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from trueline.engine.decoding import generate
from trueline.errors import DataError
from trueline.evals.datasets import load_prompts
from trueline.evals.items import Item, adherence_items
from trueline.evals.judging import JudgeConfig, check_judge, make_judge
from trueline.evals.metrics import METRICS, judge_responses
from trueline.types import Message, Request, SamplingParams

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel
    from trueline.train.distil.teachers import Teacher


@dataclass(frozen=True)
class Questions:
    """Held-out prompts, what is measured on them, and who judges the answers."""

    items: Sequence[Item]
    metric: str
    """"adherence" or "refusal"."""
    judge: Any
    """One of `trueline.evals.judges`; None uses the items' patterns."""

    @classmethod
    def read(
        cls, path: str, goal: str, principle: str | None, judge: JudgeConfig, folder: Path
    ) -> Questions | None:
        """Return the questions in a file; None where only losses can be measured on them.

        Args:
            path: JSONL rows.
            goal: What the teacher's method is for: adherence or refusal.
            principle: For rows that name none.
            judge: Instead of the rows' patterns; "keywords" judges refusals.
            folder: Of the run; answers of an endpoint are kept in it.
        """
        if judge.name == "keywords" or goal == "refusal":
            rows = load_prompts(path)
            items = [Item(r.id, r.prompt, "unsafe" if r.safe is False else "safe") for r in rows]
            metric = "refusal"
        else:
            items, _ = adherence_items(path, principle=principle)
            metric = "adherence"
            if judge.name is None and not any(item.pattern for item in items):
                return None
            odd = [item.id for item in items if not item.pattern]
            if judge.name is None and odd:
                raise DataError(f'{path}: prompt "{odd[0]}" has no "pattern", others have.')
        made, _ = make_judge(check_judge(judge, metric), metric, folder)
        return cls(items, metric, made)


class HeldOutAnswers:
    """Measures a student's answers, decoded greedily after the prompt that it is trained on.

    Args:
        questions: What is asked.
        teacher: It knows what the student is shown.
        max_new_tokens: Of an answer.
    """

    def __init__(self, questions: Questions, teacher: Teacher, max_new_tokens: int) -> None:
        self.questions = questions
        self.teacher, self.max_new_tokens = teacher, max_new_tokens

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """Return the mean of each measure over the answers that the judge could read."""
        sampling = SamplingParams(max_new_tokens=self.max_new_tokens)
        requests = [Request(self._messages(model, item)) for item in self.questions.items]
        texts = [c.text for c in generate(model, requests, sampling=sampling)]
        asked = self.questions
        verdicts = judge_responses(asked.metric, asked.items, texts, asked.judge)
        means = {}
        for name in METRICS[asked.metric]:
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
