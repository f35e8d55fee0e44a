"""Groups: the rows of a request's branches in vLLM's batch, and the choice of one token for all.

    Share   what each engine request carries: its group, its branch, and how the group decodes
    Mixer   rows of one step -> combine, sample once a group, force the token on every row
    Report  what was chosen, for the back end, where it is in the same process

Nothing here knows vLLM: `processors` feeds it with rows, by either interface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trueline.engine.drafts import kind_of
from trueline.engine.sampling import Choice, choose_tokens, uniforms
from trueline.errors import ModelError
from trueline.types import Method, SamplingParams, first_tokens, rest_branch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

KEY = "trueline"
"""Where an engine request's extra arguments hold its `Share`."""
FORCED = torch.finfo(torch.float32).max
"""Logit of the chosen token: greater than any that a model gives, so that greedy takes it."""


@dataclass(frozen=True, eq=False)
class Plan:
    """How a group decodes; one object for all of its members."""

    group: str
    """Different for every completion under way."""
    branches: int
    method: Method
    sampling: SamplingParams
    seed: int
    tokens: int
    """How many it may have."""
    prompt: tuple[int, ...] = ()
    """Ids of the first branch, where a repetition penalty needs them."""
    forced: tuple[int, ...] = ()
    """Given tokens: they are taken instead of drawn ones, and only the logits are wanted."""

    def alive(self, position: int) -> list[int]:
        """Return the branches that the token at a position is chosen from."""
        count = first_tokens(self.method)
        if count is not None and position >= count:
            return [rest_branch(self.method)]
        return list(range(self.branches))

    def limit(self, branch: int) -> int:
        """Return how many tokens a branch may have."""
        count = first_tokens(self.method)
        if count is None or branch == rest_branch(self.method):
            return self.tokens
        return min(self.tokens, count)


@dataclass(frozen=True, eq=False)
class Share:
    """One member of a group: what its engine request carries."""

    plan: Plan
    branch: int


class Drawn:
    """What a lot of groups chose in one step; read only when its tokens have arrived."""

    def __init__(self, choice: Choice, record: bool, logprobs: bool) -> None:
        self.tokens, self.finite = choice.tokens, choice.finite
        self.logprobs = choice.logprobs() if logprobs else None
        self.branches = choice.branches.clone() if record else None
        self.combined = choice.combined.clone() if record else None

    @cached_property
    def lists(self) -> tuple[list[int], list[bool]]:
        """Tokens, and whether their logits are finite."""
        return self.tokens.tolist(), self.finite.tolist()


@dataclass
class Report:
    """What was chosen for a group, position by position, until the back end takes it."""

    record: int = 0
    """Positions at a multiple of this keep their logits; 0 keeps none."""
    drawn: dict[int, tuple[Drawn, int]] = field(default_factory=dict)

    def records(self, position: int) -> bool:
        """Return whether the logits at a position are kept."""
        return self.record > 0 and position % self.record == 0

    def take(self, position: int) -> Chosen | None:
        """Return the choice at a position and forget it; None if nothing was chosen there."""
        if position not in self.drawn:
            return None
        drawn, i = self.drawn.pop(position)
        extra: dict[str, Any] = {}
        if drawn.logprobs is not None:
            extra = {"logprob": drawn.logprobs[0][i], "branch_logprob": drawn.logprobs[1][i]}
        if self.records(position) and drawn.branches is not None and drawn.combined is not None:
            extra |= {"logits": drawn.branches[i], "combined": drawn.combined[i]}
        return Chosen(drawn.lists[0][i], drawn.lists[1][i], extra)


@dataclass(frozen=True)
class Chosen:
    """A group's token at one position."""

    token: int
    finite: bool
    """Whether its logit is; otherwise model or method are broken."""
    extra: dict[str, Any]
    """Further fields of its `Step`."""


REPORTS: dict[str, Report] = {}
"""Reports of the groups that a back end of this process has under way."""


@dataclass
class _State:
    """A group where the model runs."""

    plan: Plan
    chosen: dict[int, int] = field(default_factory=dict)
    """Tokens by position, where a repetition penalty needs them."""

    @cached_property
    def numbers(self) -> Tensor | None:
        """What decides its tokens, position by position: given ones, or draws in [0, 1)."""
        plan = self.plan
        if plan.forced:
            return torch.tensor(plan.forced)
        return None if plan.sampling.greedy else uniforms(plan.seed, plan.tokens)

    def seen(self, position: int) -> set[int]:
        """Return the tokens of the prompt and of the positions before this one."""
        return {*self.plan.prompt, *(t for at, t in self.chosen.items() if at < position)}


@dataclass
class Lot:
    """Groups whose tokens are chosen together, and their rows."""

    states: list[_State]
    width: int
    """Rows of each."""
    index: Tensor
    """Rows, group after group."""
    place: slice | None
    """The same where they follow each other."""
    heads: list[int]
    """The first row of each group."""
    numbers: Tensor | None
    """Of the groups, (group, position); None where decoding is greedy."""

    @property
    def plan(self) -> Plan:
        """How the first group decodes, and so all."""
        return self.states[0].plan

    def choose(self, logits: Float[Tensor, "row vocab"], at: Sequence[int]) -> Choice:
        """Choose a token for each group, which stand at positions `at`."""
        own = logits[self.place] if self.place is not None else logits[self.index]
        own = own.view(len(self.states), self.width, -1)
        penalty = self.plan.sampling.repetition_penalty != 1
        numbers = None
        if self.numbers is not None:
            # A row of a chunk may stand behind the last position; its token is dropped.
            places = torch.tensor(at, device=logits.device).clamp_(max=self.numbers.shape[1] - 1)
            numbers = self.numbers.gather(1, places[:, None])[:, 0]
        choice = choose_tokens(
            self.plan.method,
            self.plan.sampling,
            own,
            [s.seen(p) for s, p in zip(self.states, at, strict=True)] if penalty else (),
            None if self.plan.forced else numbers,
            contrasted=self.width == self.plan.branches,
        )
        if self.plan.forced and numbers is not None:
            choice = Choice(numbers, choice.combined, choice.branches)
        if penalty:
            for state, position, token in zip(self.states, at, choice.tokens.tolist(), strict=True):
                state.chosen[position] = token
        return choice


class Mixer:
    """Chooses the tokens of groups from the rows of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._states: dict[str, _State] = {}

    def lots(self, shares: Mapping[int, Share], positions: Mapping[int, int]) -> list[Lot]:
        """Return which rows of a batch are chosen from together.

        Of a group whose living members are not all there no token is chosen: its rows are chunks of
        prompts, whose tokens vLLM drops.

        Args:
            shares: Row -> what its engine request carries.
            positions: Row -> how many tokens it has.
        """
        rows: dict[str, dict[int, int]] = {}
        for row, share in shares.items():
            rows.setdefault(share.plan.group, {})[share.branch] = row
        plans = {share.plan.group: share.plan for share in shares.values()}
        old, self._states = self._states, {}
        kinds: dict[Any, list[tuple[list[int], _State]]] = {}
        for name, plan in plans.items():
            own = rows[name]
            state = self._states[name] = old.get(name) or _State(plan)
            living = plan.alive(positions[next(iter(own.values()))])
            if own.keys() >= set(living):
                key = (kind_of(plan.method, plan.sampling, len(living)), bool(plan.forced))
                kinds.setdefault(key, []).append(([own[branch] for branch in living], state))
        return [self._lot(found) for found in kinds.values()]

    def _lot(self, found: list[tuple[list[int], _State]]) -> Lot:
        # In the order of the batch, so that rows often follow each other and need no copy.
        found.sort(key=lambda pair: pair[0])
        flat = [row for rows, _ in found for row in rows]
        follows = slice(flat[0], flat[0] + len(flat))
        states = [state for _, state in found]
        numbers = [state.numbers for state in states if state.numbers is not None]
        return Lot(
            states,
            len(found[0][0]),
            torch.tensor(flat, device=self.device),
            follows if flat == list(range(follows.start, follows.stop)) else None,
            [rows[0] for rows, _ in found],
            pad_sequence(numbers, batch_first=True).to(self.device) if numbers else None,
        )

    def mix(
        self, logits: Float[Tensor, "row vocab"], lots: Sequence[Lot], positions: Mapping[int, int]
    ) -> None:
        """Choose a token for each group and force it on its rows, in place.

        Args:
            logits: Of all rows of the step, in float32.
            lots: From `lots`, of these very rows.
            positions: Row -> how many tokens it has.
        """
        for lot in lots:
            at = [positions[row] for row in lot.heads]
            choice = lot.choose(logits, at)
            reports = [REPORTS.get(state.plan.group) for state in lot.states]
            record = any(r.records(p) for r, p in zip(reports, at, strict=True) if r is not None)
            drawn = Drawn(choice, record, lot.plan.sampling.logprobs)
            for i, (report, position) in enumerate(zip(reports, at, strict=True)):
                if report is not None:
                    report.drawn[position] = (drawn, i)
            if not REPORTS and not drawn.finite.all():
                raise ModelError("The model or its method gave logits that are not finite.")
            tokens = choice.tokens.repeat_interleave(lot.width)
            logits[lot.index, tokens] = FORCED
