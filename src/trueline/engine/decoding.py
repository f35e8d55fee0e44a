"""Decoding: requests under a method in, tokens or completions out; the public face of the engine.

`Decoder.add`, `step` and `cancel` are the engine itself; `run`, `stream`, `each` and `complete`
stand on them. `generate` is all of it in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from trueline.engine.backends import make_backend
from trueline.engine.protocol import Backend, Continuation, Prompt, Step, Ticket
from trueline.engine.scheduler import Admission
from trueline.errors import ConfigError, check_kind
from trueline.models.load import LanguageModel
from trueline.types import Completion, Message, Method, Request, SamplingParams, check_call

if TYPE_CHECKING:
    from torch import Tensor


Chat = Request | str | Sequence[Message]
OnStep = Callable[[Step], None]


class Decoder:
    """Decodes requests on one model and remembers the keys and values of shared prefixes.

    Keep one for a whole run: the system prompts of its methods are then computed once.

    >>> decoder = Decoder(load_model("tiny"))
    >>> for step in decoder.stream([Request("Hello!")]):
    ...     print(step.text, end="")

    Requests that come one by one are added, and decode together with what is under way:

    >>> decoder = Decoder(load_model("tiny"), admission="each_step")
    >>> ticket = decoder.add(decoder.encode("Hello!"))
    >>> for step in decoder.step():
    ...     print(step.ticket is ticket, step.text)
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch_size: int = 32,
        admission: Admission = "when_empty",
        share_prefixes: bool = True,
        keep_turns: bool = False,
        backend: Backend | None = None,
    ) -> None:
        """Make a decoder with nothing under way.

        Args:
            model: From `load_model`.
            batch_size: Requests decoded together at most; the others wait.
            admission: "when_empty" begins the next batch when the last is done, so that the same
                requests give the same bits again; "each_step" begins a request as soon as there is
                room, so that no place stays empty (`trueline.engine.scheduler`).
            share_prefixes: Compute system prompts that requests share once.
            keep_turns: Keep a finished conversation, so that its next turn costs only what is new;
                for one conversation at a time.
            backend: Another engine than the model's own; the options above are then its matter, as
                they are for a model on vLLM.
        """
        if model is None or isinstance(model, (str, bytes)):
            raise ConfigError(f"The model must be a loaded one, from load_model(), got {model!r}.")
        self.model = model
        self.backend: Backend = backend or make_backend(
            model,
            batch_size=batch_size,
            admission=admission,
            share_prefixes=share_prefixes,
            keep_turns=keep_turns,
        )
        self._taken: list[Step] = []

    def encode(
        self,
        request: Chat,
        method: Method | None = None,
        sampling: SamplingParams | None = None,
    ) -> Prompt:
        """Return the request as token ids of its branches; no compute on the model.

        Raises:
            DataError: The messages are not a chat, or a branch exceeds the model's positions.
            ModelError: No chat template, or the method needs an adapter and there is none.
        """
        check_kind("request", request, (Request, str, Sequence), "a Request, text or messages")
        check_call(method, sampling)
        if not isinstance(request, Request):
            request = Request(request)
        method, sampling = request.method or method, request.sampling or sampling
        return self.backend.encode(replace(request, method=method, sampling=sampling))

    def add(self, prompt: Prompt, *, record: int = 0, text: bool = True) -> Ticket:
        """Take an encoded request in and return what its steps will carry.

        `record` attaches the logits of every n-th step (1: of all), for traces; `text=False` leaves
        the steps' text out (but for completions with stop strings).
        """
        return self.backend.add(prompt, record=record, text=text)

    def step(self) -> list[Step]:
        """Decode one token of every completion under way; an empty list when none is left."""
        steps, self._taken = self._taken, []
        return steps or self.backend.step()

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request, whether it waits or is under way."""
        self.backend.cancel(ticket)
        self._taken = [step for step in self._taken if step.ticket is not ticket]

    def score(self, items: Sequence[Continuation], *, rows: int = 16) -> Iterator[Tensor]:
        """Yield the logits (time, branch, vocab) that predict each item's tokens, in order.

        At most `rows` rows share a forward; see `trueline.engine.scoring`.
        """
        return self.backend.score(items, rows=rows)

    def stream(
        self,
        requests: Sequence[Chat],
        method: Method | None = None,
        sampling: SamplingParams | None = None,
        *,
        record: bool = False,
    ) -> Iterator[Step]:
        """Decode requests and yield their steps as they come; see `run`."""
        prompts = [self.encode(request, method, sampling) for request in requests]
        return self.run(prompts, record=record)

    def run(
        self, prompts: Sequence[Prompt], *, record: bool = False, text: bool = True
    ) -> Iterator[Step]:
        """Add encoded prompts, in order, and yield their steps until all have ended."""
        return self.follow([self.add(p, record=record, text=text) for p in prompts])

    def follow(self, tickets: Sequence[Ticket]) -> Generator[Step, None, None]:
        """Yield the steps of requests that were added until all have ended.

        Whoever stops listening cancels what is left.
        """
        left = {ticket: ticket.prompt.sampling.n for ticket in tickets}
        try:
            while left and (steps := self._next(left)):
                for step in steps:
                    left[step.ticket] -= step.finish_reason is not None
                    if not left[step.ticket]:
                        del left[step.ticket]
                    yield step
        finally:
            for ticket in left:
                self.cancel(ticket)

    def each(
        self, prompts: Sequence[Prompt], *, on_step: OnStep | None = None
    ) -> Iterator[list[Completion]]:
        """Decode encoded prompts and yield the n completions of each, in the order given.

        They come as soon as those before them are done; `on_step` sees every token.
        """
        tickets = [self.add(p, text=False) for p in prompts]
        gathering, done, first = Gathering(self.model), dict[Ticket, list[Completion]](), 0
        steps = self.follow(tickets)
        try:
            for step in steps:
                if on_step is not None:
                    on_step(step)
                if (own := gathering.take(step)) is not None:
                    done[step.ticket] = own
                while first < len(tickets) and tickets[first] in done:
                    yield done.pop(tickets[first])
                    first += 1
        finally:
            steps.close()

    def complete(
        self, prompts: Sequence[Prompt], *, on_step: OnStep | None = None
    ) -> list[Completion]:
        """Decode encoded prompts; return the n completions of each, in order."""
        return [c for own in self.each(prompts, on_step=on_step) for c in own]

    def _next(self, tickets: Mapping[Ticket, int]) -> list[Step]:
        """Return the next steps of these requests; those of others wait for who asks for them."""
        own: list[Step] = []
        while not own:
            steps = [] if any(s.ticket in tickets for s in self._taken) else self.backend.step()
            if not steps and not self._taken:
                break
            both = self._taken + steps
            own = [step for step in both if step.ticket in tickets]
            self._taken = [step for step in both if step.ticket not in tickets]
            if not own and not steps:
                break
        return own


class Gathering:
    """Steps, as they come, gathered into completions."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._steps: dict[Ticket, list[list[Step]]] = {}

    def take(self, step: Step) -> list[Completion] | None:
        """Return the n completions of the step's request if they have all ended with it."""
        prompt = step.ticket.prompt
        samples = self._steps.setdefault(step.ticket, [[] for _ in range(prompt.sampling.n)])
        samples[step.sample].append(step)
        if not all(own and own[-1].finish_reason for own in samples):
            return None
        del self._steps[step.ticket]
        return [self._completion(prompt, j, own) for j, own in enumerate(samples)]

    def _completion(self, prompt: Prompt, sample: int, steps: Sequence[Step]) -> Completion:
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


def generate(
    model: LanguageModel,
    requests: Sequence[Chat] | str,
    method: Method | None = None,
    sampling: SamplingParams | None = None,
    *,
    batch_size: int = 32,
    refill: bool = False,
) -> list[Completion]:
    """Decode requests under a method and return their completions in order.

    Args:
        model: From `load_model`.
        requests: Strings, chats (lists of messages) or `Request`s; one string is one request.
        method: For requests that name none; plain decoding by default.
        sampling: For requests that name none; greedy by default. With n > 1 the n completions of a
            request follow each other.
        batch_size: Requests decoded together; the result does not depend on it.
        refill: Let the next requests take the places of those that have ended, instead of waiting
            for the whole batch: faster where lengths differ. Texts then depend on the batch as far
            as rounding decides: not at all in float32 but for ties.

    Raises:
        DataError: A request is not a chat or does not fit the model, before any compute.
        ModelError: The model lacks a chat template or an adapter that is needed.

    >>> model = load_model("tiny")
    >>> method = LinearAlignment(principle="Talk like a pirate.")
    >>> generate(model, "What is the moon?", method)[0].text
    """
    if isinstance(requests, (str, Request)):
        requests = [requests]
    check_kind("requests", requests, Sequence, "a list of requests, or one text")
    decoder = Decoder(
        model,
        batch_size=batch_size,
        admission="each_step" if refill else "when_empty",
        share_prefixes=len(requests) > 1,
    )
    return decoder.complete([decoder.encode(request, method, sampling) for request in requests])
