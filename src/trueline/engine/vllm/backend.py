"""The back end on vLLM: K engine requests a completion, kept in step by our scheduler.

    Prompt -> K engine requests with one `Plan` -> vLLM's steps, a token on each -> Step

The engine runs in this process; the model may run in others (`tensor_parallel_size`), in which case
neither log-probabilities nor logits come back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from trueline.engine.drafts import Draft, begin, not_finite
from trueline.engine.encoding import Encoder
from trueline.engine.protocol import Continuation, Prompt, Step, Ticket
from trueline.engine.vllm.groups import KEY, REPORTS, Plan, Report, Share
from trueline.engine.vllm.start import start
from trueline.errors import ConfigError, ModelError
from trueline.models.adapter import BASE
from trueline.models.prompts import check_length
from trueline.models.weightless import Weightless
from trueline.types import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class Flight:
    """A completion under way in vLLM."""

    draft: Draft
    plan: Plan
    report: Report | None
    tokens: list[list[int]]
    """Tokens that came, branch by branch."""
    ended: set[int] = field(default_factory=set)
    """Branches that vLLM has ended."""

    def name(self, branch: int) -> str:
        """Return the id of a branch's engine request."""
        return f"{self.plan.group}-{branch}"


@dataclass(frozen=True)
class Beside:
    """The branches side by side, nothing combined: what scoring decodes under."""

    name: ClassVar[str] = "beside"

    def prompts(self, messages: Any) -> list[Any]:
        """Not used: scoring brings token ids."""
        raise NotImplementedError

    def combine(self, logits: Tensor) -> Tensor:
        """Return the first branch."""
        return logits[:, 0]


class VllmBackend(Encoder):
    """Decodes on vLLM. After an error in a step nothing is under way any more."""

    _numbers = itertools.count()

    def __init__(self, model: Weightless) -> None:
        self.model: Weightless = model
        self.engine = start(model)
        self.flights: dict[str, tuple[Flight, int]] = {}
        """Engine request -> completion and branch."""
        self._tickets = itertools.count()
        self._ended = False
        self._kept: list[Step] = []
        """Steps that came while somebody scored."""
        self._loras: dict[str, int] = {name: i + 1 for i, name in enumerate(model.adapter_folders)}

    @classmethod
    def of(cls, model: Weightless) -> VllmBackend:
        """Return the back end of a model, started if it was not."""
        if model.running is None:
            model.running = cls(model)
        found: VllmBackend = model.running
        return found

    @property
    def scheduler(self) -> Any:
        """The `GroupScheduler`."""
        return self.engine.engine_core.engine_core.scheduler

    @property
    def apart(self) -> bool:
        """Whether the model runs in other processes."""
        return bool(self.engine.vllm_config.parallel_config.world_size > 1)

    def add(self, prompt: Prompt, *, record: int = 0, text: bool = True) -> Ticket:
        """Take an encoded request in; it decodes once its branches fit in beside the others."""
        check_length(self.model, prompt.branches)
        if self.apart and (record or prompt.sampling.logprobs):
            raise ConfigError(
                "Log-probabilities and traces need the model in this process; vLLM runs it in "
                "others (`tensor_parallel_size`). Leave out one of the two."
            )
        ticket = Ticket(next(self._tickets), prompt, int(record), text)
        adapters = [self.adapter_of(prompt, k) for k in range(len(prompt.branches))]
        for draft in begin(ticket, self.model):
            penalty = prompt.sampling.repetition_penalty != 1
            plan = Plan(
                f"g{next(self._numbers)}",
                len(prompt.branches),
                prompt.method,
                prompt.sampling,
                prompt.seed + draft.sample,
                draft.limit,
                tuple(prompt.branches[0]) if penalty else (),
            )
            self._send(draft, plan, adapters)
        return ticket

    def step(self) -> list[Step]:
        """Run vLLM until there is a token, and return what came."""
        steps, self._kept = self._kept, []
        return steps or self._next()

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request, wherever it is."""
        found = {f.plan.group: f for f, _ in self.flights.values() if f.draft.ticket is ticket}
        for flight in found.values():
            self._forget(flight)

    def score(self, items: Sequence[Continuation], *, rows: int = 16) -> Iterator[Tensor]:
        """Yield the logits (time, branch, vocab) that predict each item's tokens, in order.

        The tokens are decoded one by one, each forced: vLLM hands out no logits of prompts.
        """
        if self.apart:
            raise ConfigError("Scoring needs the model in this process: `tensor_parallel_size` 1.")
        waiting, under_way = list(enumerate(items)), dict[Ticket, int]()
        found: dict[int, list[Tensor]] = {}
        first = 0
        try:
            while first < len(items):
                while waiting and len(under_way) * len(waiting[0][1].branches) < rows:
                    i, item = waiting.pop(0)
                    under_way[self._add_forced(item)] = i
                    found[i] = []
                for step in self._next():
                    if step.ticket not in under_way:
                        self._kept.append(step)
                        continue
                    assert step.logits is not None
                    found[under_way[step.ticket]].append(step.logits)
                    if step.finish_reason:
                        del under_way[step.ticket]
                while first in found and len(found[first]) == len(items[first].tokens):
                    yield torch.stack(found.pop(first))
                    first += 1
        finally:
            for ticket in under_way:
                self.cancel(ticket)

    def _next(self) -> list[Step]:
        """Run vLLM until there is a token, and return what came; nothing if nothing is left."""
        while self.flights:
            if steps := [step for flight in self._run() for step in self._take(flight)]:
                return steps
        return []

    def _add_forced(self, item: Continuation) -> Ticket:
        """Send a continuation whose tokens are given; every step of it carries its logits."""
        tokens = tuple(item.tokens)
        prompt = Prompt([list(b) for b in item.branches], Beside(), SamplingParams(len(tokens)))
        ticket = Ticket(next(self._tickets), prompt, 1, False)
        on = item.adapters or (True,) * len(prompt.branches)
        draft = Draft(ticket, 0, len(tokens), None, None, set(), list(range(len(on))))
        plan = Plan(
            f"g{next(self._numbers)}", len(on), prompt.method, prompt.sampling, 0, len(tokens),
            forced=tokens,
        )  # fmt: skip
        self._send(draft, plan, [self.model.adapter if own else BASE for own in on])
        return ticket

    def _send(self, draft: Draft, plan: Plan, adapters: Sequence[str]) -> None:
        """Hand a completion to vLLM, an engine request for each branch."""
        from vllm import SamplingParams as EngineParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        if self._ended:
            raise ModelError("vLLM's engine has ended with an error. Load the model again.")
        branches = draft.ticket.prompt.branches
        lengths = [len(ids) + plan.limit(k) for k, ids in enumerate(branches)]
        self.scheduler.check_fits(lengths)
        report = None if self.apart else Report(draft.ticket.record)
        flight = Flight(draft, plan, report, [[] for _ in branches])
        if report is not None:
            REPORTS[plan.group] = report
        ends = [] if plan.forced else sorted(self.model.eos_token_ids)
        for branch, ids in enumerate(branches):
            self.flights[flight.name(branch)] = flight, branch
            params = EngineParams(
                temperature=0.0,
                max_tokens=plan.limit(branch),
                stop_token_ids=ends,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
                skip_clone=True,
                extra_args={KEY: Share(plan, branch)},
            )
            self.engine.add_request(
                flight.name(branch), tokens_input(list(ids)), params,
                lora_request=self._lora(adapters[branch]),
            )  # fmt: skip

    def _lora(self, name: str) -> Any:
        """Return vLLM's name for an adapter; None for the model alone."""
        if name == BASE:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, self._loras[name], str(self.model.adapter_folders[name]))

    def _run(self) -> list[Flight]:
        """Run one of vLLM's steps; return the completions that it gave tokens."""
        try:
            outputs = self.engine.step()
        except BaseException:
            # A half-done step leaves an engine that nobody knows the state of.
            self._ended = True
            for flight, _ in self.flights.values():
                REPORTS.pop(flight.plan.group, None)
            self.flights.clear()
            raise
        touched: dict[str, Flight] = {}
        for output in outputs:
            if output.request_id in self.flights:
                flight, branch = self.flights[output.request_id]
                flight.tokens[branch] += output.outputs[0].token_ids
                if output.finished:
                    flight.ended.add(branch)
                touched[flight.plan.group] = flight
        return list(touched.values())

    def _take(self, flight: Flight) -> list[Step]:
        """Return the steps of the tokens that came on every branch."""
        steps: list[Step] = []
        draft, model = flight.draft, self.model
        while draft.finish_reason is None:
            position = len(draft.token_ids)
            own = [flight.tokens[branch] for branch in draft.branches]
            if not all(len(tokens) > position for tokens in own):
                break
            tokens = {branch[position] for branch in own}
            chosen = flight.report.take(position) if flight.report else None
            if len(tokens) > 1 or (
                flight.report and (chosen is None or chosen.token not in tokens)
            ):
                self._forget(flight)
                raise ModelError("vLLM gave the branches of a request tokens that were not chosen.")
            if chosen is not None and not chosen.finite:
                self._forget(flight)
                raise ModelError(not_finite(model, flight.plan.method, False))
            ends = frozenset() if flight.plan.forced else model.eos_token_ids
            steps.append(draft.advance(tokens.pop(), ends, chosen.extra if chosen else {}))
        if draft.finish_reason is not None:
            self._forget(flight)
        elif len(flight.ended) == flight.plan.branches:
            self._forget(flight)
            raise ModelError("vLLM ended a request before its text had ended.")
        return steps

    def _forget(self, flight: Flight) -> None:
        """Let go of a completion, in vLLM too where it still runs there."""
        names = [flight.name(branch) for branch in range(flight.plan.branches)]
        for name in names:
            self.flights.pop(name, None)
        REPORTS.pop(flight.plan.group, None)
        running = [n for k, n in enumerate(names) if k not in flight.ended]
        if running and not self._ended:
            self.engine.abort_request(running)
