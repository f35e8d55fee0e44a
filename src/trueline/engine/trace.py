"""Traces: what a method changed at every token, in numbers.

    p = softmax of the combined logits        q_k = softmax of branch k's, alone
    KL(p || q_k) = sum_i p_i (log p_i - log q_k,i)          nats; 0 log 0 = 0
    total variation(p, q_k) = 1/2 sum_i |p_i - q_k,i|       0 to 1
    entropy(p) = - sum_i p_i log p_i                        nats

All of them after temperature and repetition penalty, before top-k, top-p and min-p. After the
method's `first_tokens` only its `rest_branch` is left to compare with. The numbers say how far the
method moved the distribution, not whether it moved it to a better answer.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trueline.engine.decoding import Decoder
from trueline.engine.protocol import Step, Ticket
from trueline.errors import DataError
from trueline.methods import Plain
from trueline.models.prompts import chat_of
from trueline.records.style import shortened
from trueline.types import (
    FinishReason,
    Message,
    Method,
    Request,
    SamplingParams,
    base_branches,
    check_messages,
    first_tokens,
    rest_branch,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


LONGEST_NAME = 32
"""Characters of a system text in a prompt's name."""


@dataclass(frozen=True)
class Alternative:
    """A token that a distribution offered."""

    token_id: int
    token: str
    probability: float
    combined: float | None = None
    """Of a branch's token, its probability in the combined distribution; 0 where the method's mask
    leaves it out."""


@dataclass(frozen=True)
class BranchTrace:
    """One branch at one position."""

    branch: int
    """Its index among the method's prompts."""
    logprob: float
    """Log-probability of the chosen token in this branch alone."""
    kl: float
    """KL(combined || branch) in nats; infinite where the branch rules out what combined allows."""
    total_variation: float
    alternatives: tuple[Alternative, ...]
    """The likeliest tokens of this branch alone."""


@dataclass(frozen=True)
class TokenTrace:
    """One token of a completion: the combined distribution beside every branch's own."""

    request: int
    sample: int
    position: int
    token_id: int
    token: str
    """The token by itself, also where it shows in no text (end of text, half a character)."""
    text: str
    """Text that became final with it."""
    logprob: float
    """Log-probability in the combined distribution."""
    entropy: float
    """Of the combined distribution, in nats."""
    flipped: bool
    """Whether the first running branch, decoding greedily, would have taken another token."""
    alternatives: tuple[Alternative, ...]
    """The likeliest tokens of the combined distribution; none without mass."""
    branches: tuple[BranchTrace, ...]
    gate: float | None = None
    """Share of the method's step that its gate let through, 0 to 1; None without a gate."""

    @property
    def kl(self) -> float:
        """KL(combined || first running branch): how far the method moved the distribution."""
        return self.branches[0].kl


class TokenTexts:
    """What single tokens look like, each looked up once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # A token decoded alone may lose its leading space: decode it behind another one.
        self._anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._anchor_text = self._decode(self._anchor)
        self._known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        """Return the token's text, or its name in the vocabulary where it is no whole text."""
        if token_id not in self._known:
            text = self._decode([*self._anchor, token_id]).removeprefix(self._anchor_text)
            if not text or "\ufffd" in text:
                text = str(self.tokenizer.convert_ids_to_tokens(token_id) or f"<{token_id}>")
            self._known[token_id] = text
        return self._known[token_id]

    def _decode(self, ids: list[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(ids, **options))


def trace_step(
    step: Step, method: Method, texts: Callable[[int], str], *, top: int = 5
) -> TokenTrace:
    """Return the numbers of a step from `Decoder.stream(..., record=True)`.

    Raises `ValueError` for a step without logits.
    """
    if step.logits is None or step.combined is None:
        raise ValueError("The step has no logits. Stream it with record=True.")
    first = first_tokens(method)
    alone = first is not None and step.position >= first
    names = [rest_branch(method)] if alone else range(step.logits.shape[0])
    p = step.combined.cpu().double().log_softmax(-1)
    q = step.logits.cpu().double().log_softmax(-1)
    branches = tuple(
        BranchTrace(
            branch=name,
            logprob=float(row[step.token_id]),
            kl=kl_divergence(p, row),
            # TV = 1/2 sum |p - q|
            total_variation=float((p.exp() - row.exp()).abs().sum() / 2),
            alternatives=_alternatives(row, texts, top, p),
        )
        for name, row in zip(names, q, strict=True)
    )
    return TokenTrace(
        request=step.ticket.number,
        sample=step.sample,
        position=step.position,
        token_id=step.token_id,
        token=texts(step.token_id),
        text=step.text,
        logprob=float(p[step.token_id]),
        # H = - sum p log p
        entropy=max(0.0, -float((p.exp() * p).nan_to_num(0.0).sum())),
        flipped=int(q[0].argmax()) != step.token_id,
        alternatives=_alternatives(p, texts, top),
        branches=branches,
        gate=None if alone else _gate(step, method),
    )


def _gate(step: Step, method: Method) -> float | None:
    """Return how far a method's gate is open at a step; None where it has none that acts."""
    openness = getattr(method, "openness", None)
    if openness is None or step.logits is None:
        return None
    sampling = step.ticket.prompt.sampling
    found = openness(step.logits[None], 1.0 if sampling.greedy else sampling.temperature)
    return None if found is None else float(found)


def kl_divergence(p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"]) -> float:
    """Return KL(p || q) in nats of log-probabilities; tokens without mass in p add nothing."""
    # sum_{p_i > 0} p_i (log p_i - log q_i); rounding may leave a tiny negative sum
    some = p > -math.inf
    return max(0.0, float((p[some].exp() * (p[some] - q[some])).sum()))


def _alternatives(
    logprobs: Float[Tensor, " vocab"],
    texts: Callable[[int], str],
    top: int,
    combined: Float[Tensor, " vocab"] | None = None,
) -> tuple[Alternative, ...]:
    values, ids = logprobs.exp().topk(min(top, logprobs.shape[-1]))
    also = [None] * len(ids) if combined is None else combined[ids].exp().tolist()
    found = zip(ids.tolist(), values.tolist(), also, strict=True)
    return tuple(Alternative(i, texts(i), p, c) for i, p, c in found if p > 0)


@dataclass(frozen=True)
class Comparison:
    """What the model says with one prompt alone."""

    branch: int | None
    """Which branch of the method, or None for the plain prompt that is none of them."""
    system: str | None
    """The system text of the prompt."""
    adapter: bool
    """Whether the adapter was on, if the model has one."""
    text: str
    finish_reason: FinishReason
    added: str | None = None
    """What the method added to the system text of the chat; none leaves the chat as it was."""
    from_template: bool = False
    """Whether the chat template put the system text there."""

    @property
    def name(self) -> str:
        """What a reader calls this prompt: "plain prompt", `with "Be brief."`."""
        if self.added is None:
            name = "plain prompt"
        else:
            name = f"with “{shortened(' '.join(self.added.split()), LONGEST_NAME)}”"
        return name if self.adapter else f"{name}, adapter off"


@dataclass(frozen=True)
class Recording:
    """A traced completion, and what each of the method's prompts gives alone."""

    tokens: list[TokenTrace]
    text: str
    finish_reason: FinishReason
    comparisons: list[Comparison]


@dataclass(frozen=True)
class _Alone:
    """One prompt of a method by itself; no branch: the plain prompt."""

    method: Method
    branch: int | None

    name: ClassVar[str] = "one branch"

    @property
    def base_branches(self) -> tuple[int, ...]:
        return (0,) if self.branch in base_branches(self.method) else ()

    def prompts(self, messages: Sequence[Message]) -> list[list[Message]]:
        return [
            list(messages) if self.branch is None else self.method.prompts(messages)[self.branch]
        ]

    def combine(self, logits: Tensor) -> Tensor:
        return logits[:, 0]


def record(
    decoder: Decoder,
    messages: str | Sequence[Message],
    method: Method | None = None,
    sampling: SamplingParams | None = None,
    *,
    seed: int = 0,
    top: int = 5,
    on_token: Callable[[TokenTrace], None] | None = None,
) -> Recording:
    """Decode one request, traced, together with each of the method's prompts alone.

    `on_token` sees each token as it comes; sampling with n > 1 keeps the first completion.
    """
    method = method or Plain()
    chat = chat_of(decoder.model, messages)
    given = _system(check_messages(messages)) is not None
    prompts = method.prompts(chat)
    names: list[int | None] = list(range(len(prompts)))
    if not any(p == chat and k not in base_branches(method) for k, p in enumerate(prompts)):
        names.insert(0, None)
    methods: list[Method] = [method, *(_Alone(method, k) for k in names)]
    requests = [Request(chat, m, sampling, seed) for m in methods]
    texts, tokens = TokenTexts(decoder.model.tokenizer), []
    tickets = [decoder.add(decoder.encode(r), record=True) for r in requests]
    pieces: dict[Ticket, str] = dict.fromkeys(tickets, "")
    ends: dict[Ticket, FinishReason] = {}
    for step in decoder.follow(tickets):
        if step.sample:
            continue
        pieces[step.ticket] += step.text
        if step.finish_reason:
            ends[step.ticket] = step.finish_reason
        if step.ticket is tickets[0]:
            tokens.append(trace_step(step, method, texts, top=top))
            if on_token is not None:
                on_token(tokens[-1])
    comparisons = []
    for ticket, name in zip(tickets[1:], names, strict=True):
        prompt = chat if name is None else prompts[name]
        own, system = _system(chat), _system(prompt)
        added = system.removeprefix(own or "").strip() if system and system != own else None
        adapter = name not in base_branches(method)
        filled = system is not None and added is None and not given
        text, end = pieces[ticket], ends[ticket]
        comparisons.append(Comparison(name, system, adapter, text, end, added, filled))
    return Recording(tokens, pieces[tickets[0]], ends[tickets[0]], comparisons)


def _system(chat: Sequence[Message]) -> str | None:
    return chat[0]["content"] if chat[0]["role"] == "system" else None


def trace_lines(tokens: Iterable[TokenTrace]) -> Iterator[str]:
    """Yield a line of JSON a token; numbers that are not finite become "inf" and "-inf"."""
    for token in tokens:
        yield json.dumps(token_row(token), ensure_ascii=False, allow_nan=False) + "\n"


def token_row(token: TokenTrace) -> dict[str, Any]:
    """Return a token's numbers as plain values; what is not finite is "inf" or "-inf"."""
    row: dict[str, Any] = _plain(dataclasses.asdict(token))
    return row


def write_jsonl(path: str | Path, tokens: Iterable[TokenTrace]) -> None:
    """Write a token a line, as `trace_lines` gives them."""
    with Path(path).open("w", encoding="utf-8") as file:
        file.writelines(trace_lines(tokens))


def read_jsonl(path: str | Path) -> list[TokenTrace]:
    """Return the tokens that `write_jsonl` wrote, equal to the last bit.

    Raises:
        DataError: The file cannot be read, or a row is not a token's trace.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from None
    tokens = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            tokens.append(_token(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}:{number}: not a row of a trace: {error}.") from None
    return tokens


def _token(row: dict[str, Any]) -> TokenTrace:
    branches = tuple(
        BranchTrace(
            **b
            | {key: float(b[key]) for key in ("logprob", "kl", "total_variation")}
            | {"alternatives": tuple(Alternative(**a) for a in b["alternatives"])}
        )
        for b in row["branches"]
    )
    numbers = {key: float(row[key]) for key in ("logprob", "entropy")}
    top = tuple(Alternative(**a) for a in row["alternatives"])
    return TokenTrace(**row | numbers | {"alternatives": top, "branches": branches})


def _plain(value: Any) -> Any:
    """Return `value` with floats that JSON does not know as strings."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
