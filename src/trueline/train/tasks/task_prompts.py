"""Prompts of a stream: what a model is shown of a task, as token ids of a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trueline.errors import DataError
from trueline.train.tasks.task import PromptForm, Task, normalise


@dataclass
class Prompts:
    """Makes prompts of a length; what the families of models share."""

    tokenizer: Any = field(repr=False)
    union: tuple[str, ...]
    """Labels of all tasks of the stream."""
    prompt: PromptForm = field(default_factory=PromptForm)
    max_length: int = 512
    """Tokens of a prompt; a longer one loses the end of its sentence, no line around it."""
    positions: int | None = None
    """Tokens that the model has places for, prompt and answer; None for any number."""
    chat: bool = False
    """Put the prompt as a user's message in the chat template (causal models only)."""
    train_labels: str = "offered"
    """"offered" or "union": the labels over which a classifier's training loss goes."""

    @property
    def pad(self) -> int:
        """A token for places that are never attended to."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def longest_answer(self) -> int:
        """Tokens that an answer may add to the prompt."""
        return 0

    def prompt_ids(self, task: Task, sentences: Sequence[str]) -> list[list[int]]:
        """Return the ids of each prompt, at most `max_length` and what the model has places for."""
        room = self.max_length
        if self.positions is not None:
            room = min(room, self.positions - self.longest_answer)
        found = self._ids([self.prompt.text(task, sentence) for sentence in sentences])
        for i, ids in enumerate(found):
            sentence = sentences[i].strip()
            while len(ids) > room:
                if not sentence:
                    raise DataError(
                        f'Task "{task.name}": the prompt needs {len(ids)} tokens without any '
                        f"sentence, {self._limit(room)} leave lines of the prompt out."
                    )
                # What is cut is the share of tokens that is too much, and always something.
                kept = int(len(sentence) * room / len(ids))
                sentence = sentence[: min(kept, len(sentence) - 1)]
                ids = self._ids([self.prompt.text(task, sentence)])[0]
            found[i] = ids
        return found

    def _limit(self, room: int) -> str:
        if room < self.max_length:
            return f"the model has places for {room}:"
        return f"`max_length` is {self.max_length}: raise it, or"

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self.chat:
            texts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
                for text in texts
            ]
        encoded = self.tokenizer(list(texts), add_special_tokens=not self.chat, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def candidates(self, task: Task, scoring: str) -> tuple[str, ...]:
        """Return the labels among which an answer is chosen, spelled as the task spells them."""
        if scoring != "union":
            return task.labels
        own = {normalise(label): label for label in task.labels}
        return tuple(own.get(normalise(label), label) for label in self.union)
