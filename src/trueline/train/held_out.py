"""How a student does on held-out prompts while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trueline.decoding import generate
from trueline.evals.items import Item
from trueline.evals.measures import METRICS, judge_responses
from trueline.types import Message, Request, SamplingParams

if TYPE_CHECKING:
    from trueline.modeling import LanguageModel
    from trueline.train.teachers import Teacher


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
