"""The three families of models in a stream: how each is fed a task, trained on it and asked.

    CausalFamily       prompt and label as one text; the loss counts the label's tokens
    Seq2SeqFamily      prompt to the encoder, label from the decoder (T5)
    ClassifierFamily   one head with a place for every label of every task, no task id

Answers are chosen among candidates. A language model takes the one with the highest
log-probability, summed over its tokens and the end mark, or writes one (`generated`: greedy, exact
match after `normalise`). A classifier takes the highest logit.

    offered      candidates are the labels of the task, as the prompt offers them
    union        candidates are the labels of all tasks
    generated    anything may be written
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional

from trueline.errors import ConfigError, ModelError
from trueline.train.tasks.answers import (
    IGNORED,
    answer_logprobs,
    by_length,
    decoder_logprobs,
    drawn,
    drawn_loss,
    padded,
)
from trueline.train.tasks.task import Example, Task, normalise
from trueline.train.tasks.task_prompts import Prompts

if TYPE_CHECKING:
    from torch import Tensor

WRITTEN_MORE = 2
"""Tokens that a written answer may have beyond those of the longest label."""
Row = dict[str, Any]
"""An encoded example: `input_ids`, `labels`, for a classifier also `offered`."""


class Family(Protocol):
    """What the runner needs to know of a model."""

    name: str
    union: tuple[str, ...]
    chat: bool

    def encode(self, task: Task, examples: Sequence[Example]) -> list[Row]:
        """Return encoded rows, the sentence cut where a row would be longer than allowed."""

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return a training batch."""

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return the mean loss of a batch, or None to take the model's own."""

    def own_loss(
        self, logits: Tensor, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Return the loss on labels drawn from the model itself, summed over rows."""

    def predict(
        self, model: Any, task: Task, rows: Sequence[Row], scoring: str, batch_size: int
    ) -> dict[str, list[str]]:
        """Return a label (or a written answer) for each row, by the way it was chosen."""


def family_of(model: Any, tokenizer: Any, *, chat: bool | None = None, **options: Any) -> Family:
    """Return the family that fits a model: by its configuration and its head.

    `chat` None takes the chat template of a causal model that has one. Raises `ModelError` for a
    model that neither writes nor classifies.
    """
    options |= {"positions": _positions(model, tokenizer), "chat": bool(chat)}
    if getattr(model.config, "is_encoder_decoder", False):
        return Seq2SeqFamily(tokenizer, **options)
    if type(model).__name__.endswith("ForSequenceClassification"):
        return ClassifierFamily(tokenizer, places=model.config.num_labels, **options)
    if not hasattr(model, "lm_head") and model.get_output_embeddings() is None:
        raise ModelError(
            f"A {type(model).__name__} neither writes text nor classifies. Give a causal, "
            "sequence-to-sequence or sequence-classification model."
        )
    if chat is None:
        options["chat"] = bool(getattr(tokenizer, "chat_template", None))
    return CausalFamily(tokenizer, **options)


def _positions(model: Any, tokenizer: Any) -> int | None:
    """Return how many tokens the model has places for; None where any number will do."""
    places = getattr(model.config, "max_position_embeddings", None)
    # Of RoBERTa's 514 places two are never used, which only its tokenizer knows.
    return None if not places else min(places, tokenizer.model_max_length)


@dataclass
class _Writer(Prompts):
    """What language models share."""

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return a batch padded on the right."""
        ids, mask = padded([row["input_ids"] for row in rows], self.pad)
        labels, _ = padded([row["labels"] for row in rows], IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return None: the model's own loss is the mean over the answers' tokens."""
        return None

    def _answers_at_once(self, batch_size: int, answers: int) -> int:
        """Return how many prompts to score at once, each with so many answers."""
        return max(1, min(batch_size, 4 * batch_size // answers))


@dataclass
class CausalFamily(_Writer):
    """A causal language model; `max_length` is of the prompt alone."""

    name = "causal"

    def __post_init__(self) -> None:
        if self.chat and not self.tokenizer.chat_template:
            raise ConfigError("The tokenizer has no chat template. Set `chat` to false.")
        self._answers: dict[str, list[int]] = {}

    @property
    def longest_answer(self) -> int:
        """Tokens that an answer may add to the prompt: a label's, and what `generated` adds."""
        return max(len(self.answer_ids(label)) for label in self.union) + WRITTEN_MORE

    def answer_ids(self, label: str) -> list[int]:
        """Return the ids of a label as an answer, with the mark that ends it."""
        if label not in self._answers:
            # In plain text the label follows "Answer:" after a space.
            text = label if self.chat else f" {label}"
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            end = self.tokenizer.eos_token_id
            self._answers[label] = ids + ([end] if end is not None else [])
        return self._answers[label]

    def encode(self, task: Task, examples: Sequence[Example]) -> list[Row]:
        """Return rows with `prompt_length`, the number of tokens before the answer."""
        rows = []
        end = self.tokenizer.eos_token_id
        for ids, e in zip(self.prompt_ids(task, [e.sentence for e in examples]), examples,
                          strict=True):  # fmt: skip
            if not self.chat and ids[-1] == end:
                ids = ids[:-1]
            answer = self.answer_ids(e.label)
            labels = [IGNORED] * len(ids) + answer
            rows.append({"input_ids": ids + answer, "labels": labels, "prompt_length": len(ids)})
        return rows

    def own_loss(
        self, logits: Tensor, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Return the loss on tokens drawn from the model after the true ones, over rows."""
        return drawn_loss(logits[:, :-1], batch["labels"][:, 1:], generator)

    @torch.no_grad()
    def predict(
        self, model: Any, task: Task, rows: Sequence[Row], scoring: str, batch_size: int
    ) -> dict[str, list[str]]:
        """Return the chosen or written answers."""
        prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
        if scoring == "generated":
            longest = max(len(self.answer_ids(label)) for label in task.labels)
            written = [""] * len(rows)
            for places in by_length(prompts, batch_size):
                ids, mask = padded([prompts[i] for i in places], self.pad, left=True)
                ids, mask = ids.to(model.device), mask.to(model.device)
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=longest + WRITTEN_MORE,
                    pad_token_id=self.pad,
                )[:, ids.shape[1] :]
                for i, text in zip(places, self._texts(out), strict=True):
                    written[i] = text
            return {"generated": written}
        labels = self.candidates(task, scoring)
        answers = [self.answer_ids(label) for label in labels]
        size = self._answers_at_once(batch_size, len(labels))
        chosen = [""] * len(rows)
        for places in by_length(prompts, size):
            scores = answer_logprobs(model, [prompts[i] for i in places], answers, self.pad)
            for i, best in zip(places, scores.argmax(-1).tolist(), strict=True):
                chosen[i] = labels[best]
        return {scoring: chosen}

    def _texts(self, ids: Tensor) -> list[str]:
        """Return what was written before the end mark."""
        end, texts = self.tokenizer.eos_token_id, []
        for row in ids.tolist():
            kept = row[: row.index(end)] if end in row else row
            texts.append(self.tokenizer.decode(kept, skip_special_tokens=True).strip())
        return texts


@dataclass
class Seq2SeqFamily(_Writer):
    """An encoder-decoder such as T5."""

    name = "seq2seq"

    def __post_init__(self) -> None:
        if self.chat:
            raise ConfigError("`chat` is for causal models; this one is an encoder-decoder.")

    def answer_ids(self, label: str) -> list[int]:
        """Return the ids of a label as the decoder writes it, with its end."""
        ids = list(self.tokenizer(text_target=label, add_special_tokens=False)["input_ids"])
        return [*ids, self.tokenizer.eos_token_id]

    def encode(self, task: Task, examples: Sequence[Example]) -> list[Row]:
        """Return encoded rows."""
        prompts = self.prompt_ids(task, [e.sentence for e in examples])
        answers = {label: self.answer_ids(label) for label in task.labels}
        return [
            {"input_ids": ids, "labels": answers[e.label]}
            for ids, e in zip(prompts, examples, strict=True)
        ]

    def own_loss(
        self, logits: Tensor, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Return the loss on tokens drawn from the model after the true ones, over rows."""
        return drawn_loss(logits, batch["labels"], generator)

    @torch.no_grad()
    def predict(
        self, model: Any, task: Task, rows: Sequence[Row], scoring: str, batch_size: int
    ) -> dict[str, list[str]]:
        """Return the chosen or written answers."""
        prompts = [row["input_ids"] for row in rows]
        labels = self.candidates(task, scoring)
        answers = [self.answer_ids(label) for label in labels]
        size = self._answers_at_once(batch_size, len(labels))
        found = [""] * len(rows)
        for places in by_length(prompts, batch_size if scoring == "generated" else size):
            ids, mask = padded([prompts[i] for i in places], self.pad)
            batch = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            if scoring == "generated":
                longest = max(map(len, answers))
                most = longest + WRITTEN_MORE
                out = model.generate(**batch, do_sample=False, max_new_tokens=most)
                texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
            else:
                best = decoder_logprobs(model, batch, answers, self.pad).argmax(-1)
                texts = [labels[b] for b in best.tolist()]
            for i, text in zip(places, texts, strict=True):
                found[i] = text
        return {scoring: found}


@dataclass
class ClassifierFamily(Prompts):
    """A sequence classifier: place k of its head is label k of `union`."""

    name = "classifier"
    places: int = 0
    """Outputs of the head; those after the last label are never chosen."""

    def __post_init__(self) -> None:
        if self.chat:
            raise ConfigError("`chat` is for causal models; this one is a classifier.")
        if self.places < len(self.union):
            raise ModelError(
                f"The classifier has {self.places} outputs for {len(self.union)} labels of all "
                f"tasks. Load it with num_labels={len(self.union)}."
            )

    def encode(self, task: Task, examples: Sequence[Example]) -> list[Row]:
        """Return rows with `offered`, the places over which the training loss goes."""
        place = {normalise(label): k for k, label in enumerate(self.union)}
        own = [place[normalise(label)] for label in task.labels]
        loss_over = own if self.train_labels == "offered" else list(range(len(self.union)))
        prompts = self.prompt_ids(task, [e.sentence for e in examples])
        return [
            {"input_ids": ids, "labels": place[normalise(e.label)], "offered": loss_over}
            for ids, e in zip(prompts, examples, strict=True)
        ]

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return a batch padded on the right; `offered` is a mask over the places."""
        ids, mask = padded([row["input_ids"] for row in rows], self.pad)
        offered = torch.zeros(len(rows), self.places, dtype=torch.bool)
        for i, row in enumerate(rows):
            offered[i, row["offered"]] = True
        labels = torch.tensor([row["labels"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "offered": offered}

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return the cross-entropy over the offered places, mean over rows."""
        kept = logits.float().masked_fill(~batch["offered"], -torch.inf)
        return functional.cross_entropy(kept, batch["labels"])

    def own_loss(
        self, logits: Tensor, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Return the loss on labels drawn from the model among the offered, summed over rows."""
        kept = logits.float().masked_fill(~batch["offered"], -torch.inf)
        return functional.cross_entropy(kept, drawn(kept, generator), reduction="sum")

    @torch.no_grad()
    def predict(
        self, model: Any, task: Task, rows: Sequence[Row], scoring: str, batch_size: int
    ) -> dict[str, list[str]]:
        """Return the chosen labels, among the offered and among all: one forward gives both."""
        if scoring == "generated":
            raise ConfigError('A classifier writes nothing: `scoring` must be "offered" or "union"')
        place = {normalise(label): k for k, label in enumerate(self.union)}
        own = torch.tensor([place[normalise(label)] for label in task.labels])
        everything = self.candidates(task, "union")
        offered, union = [""] * len(rows), [""] * len(rows)
        prompts = [row["input_ids"] for row in rows]
        for places in by_length(prompts, batch_size):
            ids, mask = padded([prompts[i] for i in places], self.pad)
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
            logits = logits.logits.float().cpu()
            among_own = logits[:, own].argmax(-1).tolist()
            among_all = logits[:, : len(self.union)].argmax(-1).tolist()
            for i, a, b in zip(places, among_own, among_all, strict=True):
                offered[i], union[i] = task.labels[a], everything[b]
        return {"offered": offered, "union": union}
