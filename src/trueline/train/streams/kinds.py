"""The three kinds of model in a stream: how each is fed a task, trained on it and asked.

    CausalKind       prompt and label as one text; the loss counts the label's tokens
    Seq2SeqKind      prompt to the encoder, label from the decoder (T5)
    ClassifierKind   one head with a place for every label of every task, no task id

Answers are chosen among candidates. A language model takes the one with the highest
log-probability, summed over its tokens and the end mark, or writes one (`generated`: greedy, exact
match after `normalise`). A classifier takes the highest logit.

    offered      candidates are the labels of the task, as the prompt offers them
    union        candidates are the labels of all tasks
    generated    anything may be written
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional

from trueline.errors import ConfigError, DataError, ModelError
from trueline.train.streams.tasks import Example, PromptForm, Task, normalise, same_label

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Places in `labels` that the loss passes over."""
Row = dict[str, Any]
"""An encoded example: `input_ids`, `labels`, for a classifier also `offered`."""


class Kind(Protocol):
    """What the runner needs to know of a model."""

    name: str

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


def kind_of(model: Any, tokenizer: Any, **options: Any) -> Kind:
    """Return the kind that fits a model: by its configuration and its head."""
    if getattr(model.config, "is_encoder_decoder", False):
        return Seq2SeqKind(tokenizer, **options)
    if type(model).__name__.endswith("ForSequenceClassification"):
        return ClassifierKind(tokenizer, places=model.config.num_labels, **options)
    if not hasattr(model, "lm_head") and model.get_output_embeddings() is None:
        raise ModelError(
            f"A {type(model).__name__} neither writes text nor classifies. Give a causal, "
            "sequence-to-sequence or sequence-classification model."
        )
    return CausalKind(tokenizer, **options)


@dataclass
class _Kind:
    """What the three share: prompts of a length, batches by length."""

    tokenizer: Any = field(repr=False)
    union: tuple[str, ...]
    """Labels of all tasks of the stream."""
    prompt: PromptForm = field(default_factory=PromptForm)
    max_length: int = 512
    """Tokens of a prompt; a longer one loses the end of its sentence, no line around it."""
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

    def prompt_ids(self, task: Task, sentences: Sequence[str]) -> list[list[int]]:
        """Return the ids of each prompt, at most `max_length`."""
        found = self._ids([self.prompt.text(task, sentence) for sentence in sentences])
        for i, ids in enumerate(found):
            sentence = sentences[i].strip()
            while len(ids) > self.max_length:
                if not sentence:
                    raise DataError(
                        f'Task "{task.name}": the prompt needs {len(ids)} tokens without any '
                        f"sentence, `max_length` is {self.max_length}. Raise it, or leave lines "
                        "of the prompt out."
                    )
                # What is cut is the share of tokens that is too much, and always something.
                kept = int(len(sentence) * self.max_length / len(ids))
                sentence = sentence[: min(kept, len(sentence) - 1)]
                ids = self._ids([self.prompt.text(task, sentence)])[0]
            found[i] = ids
        return found

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


@dataclass
class CausalKind(_Kind):
    """A causal language model; `max_length` is of the prompt alone."""

    name = "causal"

    def __post_init__(self) -> None:
        if self.chat and not self.tokenizer.chat_template:
            raise ConfigError("The tokenizer has no chat template. Set `chat` to false.")
        self._answers: dict[str, list[int]] = {}

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

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return a batch padded on the right."""
        ids, mask = padded([row["input_ids"] for row in rows], self.pad)
        labels, _ = padded([row["labels"] for row in rows], IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return None: the model's own loss is the mean over the answers' tokens."""
        return None

    def own_loss(
        self, logits: Tensor, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Return the loss on tokens drawn from the model after the true ones, over rows."""
        return _drawn_loss(logits[:, :-1], batch["labels"][:, 1:], generator)

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
                    max_new_tokens=longest + 2,
                    pad_token_id=self.pad,
                )[:, ids.shape[1] :]
                for i, text in zip(places, self._texts(out), strict=True):
                    written[i] = text
            return {"generated": written}
        labels = self.candidates(task, scoring)
        answers = [self.answer_ids(label) for label in labels]
        size = max(1, min(batch_size, 4 * batch_size // len(labels)))
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
class Seq2SeqKind(_Kind):
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

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return a batch padded on the right."""
        ids, mask = padded([row["input_ids"] for row in rows], self.pad)
        labels, _ = padded([row["labels"] for row in rows], IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Return None: the model's own loss is the mean over the answers' tokens."""
        return None

    def own_loss(
        self, logits: Tensor, batch: Mapping[str, Tensor], generator: torch.Generator
    ) -> Tensor:
        """Return the loss on tokens drawn from the model after the true ones, over rows."""
        return _drawn_loss(logits, batch["labels"], generator)

    @torch.no_grad()
    def predict(
        self, model: Any, task: Task, rows: Sequence[Row], scoring: str, batch_size: int
    ) -> dict[str, list[str]]:
        """Return the chosen or written answers."""
        prompts = [row["input_ids"] for row in rows]
        labels = self.candidates(task, scoring)
        answers = [self.answer_ids(label) for label in labels]
        size = max(1, min(batch_size, 4 * batch_size // len(labels)))
        found = [""] * len(rows)
        for places in by_length(prompts, batch_size if scoring == "generated" else size):
            ids, mask = padded([prompts[i] for i in places], self.pad)
            batch = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            if scoring == "generated":
                longest = max(map(len, answers))
                out = model.generate(**batch, do_sample=False, max_new_tokens=longest + 2)
                texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
            else:
                best = decoder_logprobs(model, batch, answers, self.pad).argmax(-1)
                texts = [labels[b] for b in best.tolist()]
            for i, text in zip(places, texts, strict=True):
                found[i] = text
        return {scoring: found}


@dataclass
class ClassifierKind(_Kind):
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
        return functional.cross_entropy(kept, _drawn(kept, generator), reduction="sum")

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


def accuracy_of(answers: Sequence[str], examples: Sequence[Example]) -> float:
    """Return the share of answers that are the label of their example."""
    right = [same_label(a, e.label) for a, e in zip(answers, examples, strict=True)]
    return sum(right) / len(right)


def answer_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad: int
) -> Tensor:
    """Return log P(answer | prompt), shape (prompt, answer): each prompt is read once.

    The prompts' cache is repeated for the answers, which follow it as one more batch.
    """
    ids, mask = padded(prompts, pad, left=True)
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    n, m, width = len(prompts), len(answers), max(map(len, answers))
    # Each prompt's last logits predict the first token of every answer.
    logits = out.logits[:, -1:].repeat_interleave(m, 0)
    tokens, real = (x.to(model.device).repeat(n, 1) for x in padded(answers, pad))
    if width > 1:
        cache = out.past_key_values
        cache.batch_repeat_interleave(m)
        long_mask = torch.cat([mask.repeat_interleave(m, 0), real[:, :-1]], 1)
        start = mask.sum(-1).repeat_interleave(m, 0)[:, None]
        after = model(
            input_ids=tokens[:, :-1],
            attention_mask=long_mask,
            position_ids=start + torch.arange(width - 1, device=model.device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        logits = torch.cat([logits, after], 1)
    return _summed(logits, tokens, real).view(n, m)


def decoder_logprobs(
    model: Any, batch: Mapping[str, Tensor], answers: Sequence[Sequence[int]], pad: int
) -> Tensor:
    """Return log P(answer | prompt) of an encoder-decoder, shape (prompt, answer)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    n, m = len(batch["input_ids"]), len(answers)
    hidden = base.get_encoder()(**batch).last_hidden_state
    tokens, real = (x.to(hidden.device).repeat(n, 1) for x in padded(answers, pad))
    logits = base(
        encoder_outputs=(hidden.repeat_interleave(m, 0),),
        attention_mask=batch["attention_mask"].repeat_interleave(m, 0),
        labels=tokens,
        use_cache=False,
    ).logits
    return _summed(logits, tokens, real).view(n, m)


@torch.no_grad()
def text_loss(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> float:
    """Return the mean cross-entropy of a causal model on texts, in nats a token.

    Each text is cut to `max_length` tokens; texts of a single token say nothing.
    """
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"][:max_length]])
        if ids.shape[1] > 1:
            ids = ids.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    if not count:
        raise DataError("The unrelated texts have no two tokens in a row.")
    return total / count


def padded(
    rows: Sequence[Sequence[int]], filler: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return rows of unequal length as (ids, mask); mask 1 marks real ones."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(len(row))
        ids[i, part] = torch.tensor(list(row))
        mask[i, part] = 1
    return ids, mask


def by_length(rows: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield places of rows in batches of like length, longest first."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _summed(logits: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """Return the log-probability of each row's real tokens."""
    logprobs = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return (logprobs * real).sum(-1)


def _drawn_loss(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean over tokens with a label, times the number of rows."""
    there = labels != IGNORED
    kept = logits[there].float()
    return functional.cross_entropy(kept, _drawn(kept, generator)) * len(labels)


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a place drawn from each row's softmax; the draw is made on the CPU."""
    probabilities = logits.detach().softmax(-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)


Factory = Callable[[], tuple[Any, Any]]
"""Returns a fresh model and its tokenizer, the same at every call."""
