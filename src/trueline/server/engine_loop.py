"""The engine's side of a server: orders in, news out, one message a step.

Whoever runs it (a thread, or a process of its own) gives it a way to take orders and a way to tell
news; what passes is plain data. A request that cannot go on is told its error; an error of the
engine itself ends the loop, and the last news says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from trueline.engine.torch_backend import TorchBackend
from trueline.engine.trace import TokenTexts, kl_divergence, token_row, trace_step
from trueline.errors import TruelineError
from trueline.server.logprobs import token_logprobs

if TYPE_CHECKING:
    from trueline.engine.protocol import Prompt, Step, Ticket
    from trueline.models.load import LanguageModel
    from trueline.server.config import ServeConfig
    from trueline.types import FinishReason

LOG = logging.getLogger(__name__)
TRACED = 16
"""Of a method with several branches, every token at a multiple of this is measured for metrics."""


class Add(NamedTuple):
    """Take a prompt in."""

    number: int
    """What its news will bear; no two prompts of a server share one."""
    prompt: Prompt
    top: int | None = None
    """Alternatives a token, None for no log-probabilities."""
    traced: bool = False


class Drop(NamedTuple):
    """Free the rows of a prompt at the next step; one that has ended is let be."""

    number: int


class Stop(NamedTuple):
    """End after the step under way."""


Order = Add | Drop | Stop


class Told(NamedTuple):
    """A token of a completion."""

    number: int
    sample: int
    token_id: int
    text: str | None
    """What became final with it; None where the listener turns the ids into text."""
    finish_reason: FinishReason | None
    logprobs: dict[str, Any] | None = None
    """Of the token and its alternatives, if asked for."""
    trace: dict[str, Any] | None = None
    """What the method changed, if asked for."""


class Counts(NamedTuple):
    """What is under way after a step."""

    running: int = 0
    waiting: int = 0
    rows: int = 0
    """Branches of completions in the batch."""
    groups: int = 0
    """Requests with several branches, under way or waiting."""


class News(NamedTuple):
    """All that a step brought."""

    told: Sequence[Told] = ()
    failed: Sequence[tuple[int, TruelineError]] = ()
    """Prompts that cannot go on, and why."""
    contrasts: Sequence[tuple[float, bool]] = ()
    """Of tokens that were measured: KL of combined from the first branch in nats, and whether the
    first branch, decoding greedily, would have said something else."""
    counts: Counts = Counts()
    ended: str | None = None
    """Why there is no more news, in the last of all."""


@dataclass(eq=False)
class Held:
    """A prompt that the engine has."""

    order: Add
    ticket: Ticket
    left: int
    """Completions that have not ended."""


class EngineLoop:
    """Runs a scheduler until it is told to stop.

    Args:
        backend: Admits requests at each step.
        orders: Returns the orders that came in; waits for one where it is told to.
        tell: Passes news on.
    """

    def __init__(
        self,
        backend: TorchBackend,
        orders: Callable[[bool], list[Order]],
        tell: Callable[[News], None],
    ) -> None:
        self.backend, self.orders, self.tell = backend, orders, tell
        self.texts = TokenTexts(backend.model.tokenizer)
        self._held: dict[int, Held] = {}
        self._numbers: dict[Ticket, int] = {}

    def run(self) -> None:
        """Work until a `Stop`, or an error that is nobody's request."""
        reason = "The server is shutting down."
        try:
            while self._turn():
                pass
        except EOFError:  # nobody is there any more
            return
        except BaseException as error:  # whatever it was, every client is told
            LOG.exception("the engine has ended")
            said = str(error) if isinstance(error, TruelineError) else type(error).__name__
            reason = f"The engine has ended: {said}"
        self.tell(News(ended=reason))

    def _turn(self) -> bool:
        """Take in what changed, run one step; False when it is time to end."""
        dropped = False
        for order in self.orders(not self._held):
            if isinstance(order, Stop):
                return False
            if isinstance(order, Add):
                self._take(order)
            else:
                dropped |= self._forget(order.number)
        if not self._held:
            if dropped:
                self.tell(News())
            return True
        try:
            steps = self.backend.step()
        except TruelineError as error:  # the model's fault: whoever was under way is told
            waiting = self.backend.scheduler.waiting
            running = [n for n, held in self._held.items() if held.ticket not in waiting]
            for number in running:
                self._forget(number)
            self.tell(News(failed=[(n, error) for n in running], counts=self._counts()))
            return True
        contrasts = [c for step in steps if (c := _contrast(step)) is not None]
        told = [self._told(step) for step in steps]
        self.tell(News(told, (), contrasts, self._counts()))
        return True

    def _take(self, order: Add) -> None:
        whole = order.traced or order.top is not None
        every = 1 if whole else TRACED if len(order.prompt.branches) > 1 else 0
        # Without stop strings the listener makes the text, beside the next step.
        ticket = self.backend.add(order.prompt, record=every, text=order.traced)
        self._held[order.number] = Held(order, ticket, order.prompt.sampling.n)
        self._numbers[ticket] = order.number

    def _forget(self, number: int) -> bool:
        held = self._held.pop(number, None)
        if held is None:
            return False
        del self._numbers[held.ticket]
        self.backend.cancel(held.ticket)
        return True

    def _told(self, step: Step) -> Told:
        number = self._numbers[step.ticket]
        held = self._held[number]
        order, prompt = held.order, held.order.prompt
        logprobs = trace = None
        if order.top is not None:
            logprobs = token_logprobs(step, order.top, self.texts)
        if order.traced:
            trace = token_row(trace_step(step, prompt.method, self.texts))
        if step.finish_reason is not None:
            held.left -= 1
            if not held.left:
                del self._held[number], self._numbers[step.ticket]
        text = step.text if order.traced or prompt.sampling.stop else None
        return Told(
            number, step.sample, step.token_id, text, step.finish_reason, logprobs, trace
        )  # fmt: skip

    def _counts(self) -> Counts:
        waiting, held = len(self.backend.scheduler.waiting), self._held.values()
        groups = sum(len(h.order.prompt.branches) > 1 for h in held)
        rows = len(self.backend.rows) if held else 0
        return Counts(len(held) - waiting, waiting, rows, groups)


def _contrast(step: Step) -> tuple[float, bool] | None:
    """Return (KL, flipped) of a step that is measured for metrics; None of the others."""
    if step.logits is None or step.position % TRACED or len(step.logits) < 2:
        return None
    assert step.combined is not None
    p, q = step.combined.log_softmax(-1), step.logits[0].log_softmax(-1)
    return kl_divergence(p, q), int(q.argmax()) != step.token_id


def new_backend(model: LanguageModel, config: ServeConfig) -> TorchBackend:
    """Return the back end that a server's engine works on."""
    return TorchBackend(model, batch_size=config.max_running, admission="each_step")
