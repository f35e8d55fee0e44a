"""The loop: K prompt branches of B requests as rows of one batch, one forward a step.

    Request -> method.prompts -> encode -> prefill -> logits (row, vocab)
    every step: / temperature -> method.combine -> sample -> one token to all branches of a request

Branches are rows, never a second model call. All rows share one cache; they are padded on the
left and carry explicit positions. A request that has finished leaves the batch, and so does a
branch that its method no longer needs. `stream` yields a `Step` per request and token; `generate`
collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trueline.engine.batch import Batch
from trueline.engine.cache import PrefixStore
from trueline.engine.sampling import penalise_repetition, sample, uniforms
from trueline.errors import DataError, ModelError, check_number
from trueline.methods import Plain
from trueline.models.detokenizer import Detokenizer
from trueline.models.load import LanguageModel
from trueline.models.prompts import chat_of, encode, system_prefix
from trueline.types import (
    Completion,
    FinishReason,
    Message,
    Method,
    Request,
    SamplingParams,
)

if TYPE_CHECKING:
    from torch import Tensor

MIN_PREFIX = 4
"""Shorter shared prefixes are not worth keeping."""


@dataclass(frozen=True)
class Step:
    """One token of one completion."""

    request: int
    """Index of the request in the call."""
    sample: int
    """Which of the request's n completions."""
    position: int
    """0 for the first token."""
    token_id: int
    text: str
    """Text that became final with this token; may be empty, or more than this token's."""
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    branch_logprob: float | None = None
    logits: Tensor | None = None
    """Logits of the branches (branch, vocab) after temperature, if recorded."""
    combined: Tensor | None = None
    """Logits (vocab) that the token was drawn from, before top-k, top-p and min-p, if recorded."""


@dataclass(frozen=True)
class Prompt:
    """An encoded request: what the loop works on."""

    branches: list[list[int]]
    method: Method = field(default_factory=Plain)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    prefixes: tuple[tuple[int, ...], ...] = ()
    """Leading ids of each branch that other requests are likely to share."""


@dataclass
class _Sequence:
    """One completion under way."""

    request: int
    sample: int
    prompt: Prompt
    limit: int
    draws: Tensor
    detokenizer: Detokenizer | None
    seen: set[int]
    branches: list[int]
    """Which branches still run."""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Decoder:
    """Decodes requests on one model and remembers the keys and values of shared prefixes.

    Keep one for a whole run: the system prompts of its methods are then computed once. With
    `keep_turns` also finished conversations are kept, so that a chat's next turn costs only what is
    new in it.

    >>> decoder = Decoder(load_model("tiny"))
    >>> for step in decoder.stream([Request("Hello!")]):
    ...     print(step.text, end="")
    """

    def __init__(
        self, model: LanguageModel, *, share_prefixes: bool = True, keep_turns: bool = False
    ) -> None:
        self.model = model
        self.share_prefixes, self.keep_turns = share_prefixes, keep_turns
        self.store = PrefixStore()
        self._system_prefixes: dict[str, tuple[int, ...]] = {}

    def encode(
        self,
        request: Request | str | Sequence[Message],
        method: Method | None = None,
        sampling: SamplingParams | None = None,
    ) -> Prompt:
        """Return the request as token ids of its branches; no compute on the model.

        Raises:
            DataError: The messages are not a chat, or a branch exceeds the model's positions.
            ModelError: No chat template, or the method needs an adapter and there is none.
        """
        if not isinstance(request, Request):
            request = Request(request)
        method = request.method or method or Plain()
        sampling = request.sampling or sampling or SamplingParams()
        if method.base_branches and not self.model.has_adapter:
            raise ModelError(
                f'Method "{method.name}" switches the adapter off in one branch, but model '
                f'"{self.model.name}" has no adapter. Pass --adapter FOLDER (`adapter=`).'
            )
        chats = method.prompts(chat_of(self.model, request.messages))
        branches = [encode(self.model, chat) for chat in chats]
        self.check_length(branches)
        prefixes = tuple(map(self._prefix, chats)) if self.share_prefixes else ()
        return Prompt(branches, method, sampling, request.seed, prefixes)

    def check_length(self, branches: Sequence[Sequence[int]]) -> None:
        """Raise `DataError` if a branch is empty or longer than the model has positions."""
        longest, limit = max(map(len, branches)), self.model.max_positions
        if not min(map(len, branches)):
            raise DataError("The prompt has no tokens. Give it some text.")
        if limit is not None and longest > limit:
            raise DataError(
                f"The prompt has {longest} tokens in its longest branch; model "
                f'"{self.model.name}" has {limit} positions. Shorten it.'
            )

    def stream(
        self,
        requests: Sequence[Request | str | Sequence[Message]],
        method: Method | None = None,
        sampling: SamplingParams | None = None,
        *,
        record: bool = False,
    ) -> Iterator[Step]:
        """Decode all requests as one batch and yield their steps as they come.

        `record` attaches the logits of every step, for traces.
        """
        prompts = [self.encode(request, method, sampling) for request in requests]
        return self.run(prompts, record=record)

    def collect(
        self, prompts: Sequence[Prompt], *, on_step: Callable[[Step], None] | None = None
    ) -> list[Completion]:
        """Decode encoded prompts as one batch; return n completions for each, in order."""
        steps: dict[tuple[int, int], list[Step]] = {}
        for step in self.run(prompts, text=False):
            steps.setdefault((step.request, step.sample), []).append(step)
            if on_step is not None:
                on_step(step)
        return [self._completion(prompts[i], j, steps[i, j]) for i, j in sorted(steps)]

    @torch.inference_mode()
    def run(
        self, prompts: Sequence[Prompt], *, record: bool = False, text: bool = True
    ) -> Iterator[Step]:
        """Decode encoded prompts as one batch: the loop itself.

        `text=False` leaves the steps' text out (but for completions with stop strings).
        """
        if not prompts:
            return
        batch, rows, logits = self._prefill(prompts, text)
        groups = _groups(rows)
        while rows:
            steps: list[Step] = []
            for group in groups:
                z = logits if len(groups) == 1 else logits[group.rows]
                steps += self._choose(group.sequences, z, record)
            yield from steps
            if self.keep_turns:
                self._store_turns(batch, rows)
            kept = [
                i
                for i, (s, branch) in enumerate(rows)
                if s.finish_reason is None and branch in s.branches
            ]
            if kept and len(kept) < len(rows):
                groups = _groups([rows[i] for i in kept])
                batch.select(kept)
            rows = [rows[i] for i in kept]
            if rows:
                logits = batch.forward([s.token_ids[-1] for s, _ in rows])

    def _choose(self, sequences: list[_Sequence], logits: Tensor, record: bool) -> list[Step]:
        """Draw the next token of sequences that share method, branches and sampling settings."""
        first = sequences[0]
        params, method = first.prompt.sampling, first.prompt.method
        z = logits.view(len(sequences), -1, logits.shape[-1])
        if not params.greedy and params.temperature != 1:
            z = z / params.temperature
        contrasted = len(first.branches) == len(first.prompt.branches)
        combined = method.combine(z) if contrasted else z[:, 0]
        if params.repetition_penalty != 1:
            seen = [sorted(s.seen) for s in sequences]
            combined = penalise_repetition(combined.clone(), seen, params.repetition_penalty)
        draws = None
        if not params.greedy:
            draws = torch.stack([s.draws[len(s.token_ids)] for s in sequences])
        tokens = sample(combined, params, draws)
        if not combined.gather(-1, tokens[:, None]).isfinite().all():
            raise ModelError(
                f'Model "{self.model.name}" gave logits that are not finite. Load it with '
                "--dtype float32 or bfloat16 (`dtype=`)."
            )
        logprobs = _logprobs(combined, z[:, 0], tokens) if params.logprobs else None
        steps = []
        for i, (s, token) in enumerate(zip(sequences, tokens.tolist(), strict=True)):
            extra: dict[str, Any] = {}
            if logprobs is not None:
                extra = {"logprob": logprobs[0][i], "branch_logprob": logprobs[1][i]}
            if record:
                extra |= {"logits": z[i].clone(), "combined": combined[i].clone()}
            steps.append(self._advance(s, token, extra))
        return steps

    def _advance(self, s: _Sequence, token: int, extra: dict[str, Any]) -> Step:
        """Add a token to a sequence and see whether it ends."""
        position, text = len(s.token_ids), s.detokenizer
        s.token_ids.append(token)
        s.seen.add(token)
        piece = text.push(token) if text else ""
        if token in self.model.eos_token_ids or (text and text.stopped):
            s.finish_reason = "stop"
        elif len(s.token_ids) >= s.limit:
            s.finish_reason = "length"
        elif len(s.token_ids) == s.prompt.method.first_tokens:
            s.branches = [s.prompt.method.rest_branch]
        if text and s.finish_reason:
            piece += text.finish()
        return Step(s.request, s.sample, position, token, piece, s.finish_reason, **extra)

    def _completion(self, prompt: Prompt, sample: int, steps: list[Step]) -> Completion:
        ids = [step.token_id for step in steps]
        if prompt.sampling.stop:
            text = "".join(step.text for step in steps)
        else:
            text = str(self.model.tokenizer.decode(ids, skip_special_tokens=True))
        assert steps[-1].finish_reason is not None
        logprobs = branch_logprobs = None
        if prompt.sampling.logprobs:
            logprobs = [step.logprob for step in steps if step.logprob is not None]
            branch_logprobs = [s.branch_logprob for s in steps if s.branch_logprob is not None]
        return Completion(
            text=text,
            token_ids=ids,
            finish_reason=steps[-1].finish_reason,
            seed=prompt.seed + sample,
            prompt_tokens=tuple(map(len, prompt.branches)),
            logprobs=logprobs,
            branch_logprobs=branch_logprobs,
        )

    def _prefill(self, prompts: Sequence[Prompt], text: bool) -> tuple[Batch, _Rows, Tensor]:
        """Run all prompts once, then repeat rows for requests that want several completions."""
        ids = [branch for p in prompts for branch in p.branches]
        self.check_length(ids)
        adapters = [_adapter_on(p, k) for p in prompts for k in range(len(p.branches))]
        if self.share_prefixes:
            for p in prompts:
                self._store_prefixes(p)
        batch = Batch(self.model, ids, adapters)
        logits = batch.prefill(self.store)
        rows: _Rows = []
        select: list[int] = []
        first_row = 0
        for i, p in enumerate(prompts):
            for j in range(p.sampling.n):
                s = self._sequence(i, j, p, text)
                rows += [(s, branch) for branch in s.branches]
                select += range(first_row, first_row + len(p.branches))
            first_row += len(p.branches)
        if len(select) > len(ids):
            batch.select(select)
            logits = logits[torch.tensor(select, device=logits.device)]
        return batch, rows, logits

    def _sequence(self, request: int, sample: int, prompt: Prompt, text: bool) -> _Sequence:
        params, limit = prompt.sampling, self.model.max_positions
        # The last token is never fed back, so one more than the free positions can be had.
        room = params.max_new_tokens
        if limit is not None:
            room = min(room, limit - max(map(len, prompt.branches)) + 1)
        detokenizer = None
        if text or params.stop:
            detokenizer = Detokenizer(self.model.tokenizer, params.stop)
        return _Sequence(
            request,
            sample,
            prompt,
            limit=room,
            draws=uniforms(prompt.seed + sample, room),
            detokenizer=detokenizer,
            seen=set(prompt.branches[0]),
            branches=list(range(len(prompt.branches))),
        )

    def _prefix(self, chat: list[Message]) -> tuple[int, ...]:
        if self.model.raw or chat[0]["role"] != "system":
            return ()
        text = chat[0]["content"]
        if text not in self._system_prefixes:
            self._system_prefixes[text] = tuple(system_prefix(self.model, chat))
        return self._system_prefixes[text]

    def _store_prefixes(self, prompt: Prompt) -> None:
        for branch, prefix in enumerate(prompt.prefixes):
            adapter = _adapter_on(prompt, branch)
            known = self.store.longest(adapter, prefix)[1]
            if len(prefix) >= MIN_PREFIX and known < len(prefix):
                batch = Batch(self.model, [list(prefix)], [adapter])
                batch.prefill(None)
                self.store.put(adapter, prefix, batch.cache, 0)

    def _store_turns(self, batch: Batch, rows: _Rows) -> None:
        for row, (s, branch) in enumerate(rows):
            if s.finish_reason is not None:
                ids = [*s.prompt.branches[branch], *s.token_ids[:-1]]
                self.store.put(_adapter_on(s.prompt, branch), ids, batch.cache, row)


_Rows = list[tuple[_Sequence, int]]
"""What each row of the batch is: a completion and one of its branches."""


def _adapter_on(prompt: Prompt, branch: int) -> bool:
    return branch not in prompt.method.base_branches


@dataclass
class _Group:
    """Completions whose logits are combined together, and their rows."""

    sequences: list[_Sequence] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def _groups(rows: _Rows) -> list[_Group]:
    """Gather completions by method, number of live branches and sampling settings."""
    groups: dict[Any, _Group] = {}
    for row, (s, branch) in enumerate(rows):
        key = (s.prompt.method, len(s.branches), s.prompt.sampling)
        group = groups.setdefault(key, _Group())
        group.rows.append(row)
        if branch == s.branches[0]:
            group.sequences.append(s)
    return list(groups.values())


def _logprobs(combined: Tensor, branch: Tensor, tokens: Tensor) -> tuple[list[float], list[float]]:
    """Return the tokens' log-probabilities under the combined and the first branch's logits."""
    index = tokens[:, None]
    return tuple(  # type: ignore[return-value]
        (z.gather(-1, index)[:, 0] - z.logsumexp(-1)).tolist() for z in (combined, branch)
    )


def generate(
    model: LanguageModel,
    requests: Sequence[Request | str | Sequence[Message]] | str,
    method: Method | None = None,
    sampling: SamplingParams | None = None,
    *,
    batch_size: int = 32,
) -> list[Completion]:
    """Decode requests under a method and return their completions in order.

    Args:
        model: From `load_model`.
        requests: Strings, chats (lists of messages) or `Request`s; one string is one request.
        method: For requests that name none; plain decoding by default.
        sampling: For requests that name none; greedy by default. With n > 1 the n completions of a
            request follow each other.
        batch_size: Requests decoded together; the result does not depend on it.

    Raises:
        DataError: A request is not a chat or does not fit the model, before any compute.
        ModelError: The model lacks a chat template or an adapter that is needed.

    >>> model = load_model("tiny")
    >>> method = LinearAlignment(principle="Talk like a pirate.")
    >>> generate(model, "What is the moon?", method)[0].text
    """
    check_number("batch_size", batch_size, low=1, whole=True)
    if isinstance(requests, (str, Request)):
        requests = [requests]
    decoder = Decoder(model, share_prefixes=len(requests) > 1)
    prompts = [decoder.encode(request, method, sampling) for request in requests]
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    return [completion for batch in batches for completion in decoder.collect(batch)]
