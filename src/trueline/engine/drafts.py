"""Completions under way, the rows they hold, and the choice of their next tokens."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from trueline.engine.protocol import Step, Ticket
from trueline.engine.sampling import choose_tokens, uniforms
from trueline.errors import ModelError
from trueline.models.detokenizer import Detokenizer
from trueline.models.load import LanguageModel
from trueline.types import (
    FinishReason,
    Method,
    SamplingParams,
    first_tokens,
    rest_branch,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class Draft:
    """One completion under way."""

    ticket: Ticket
    sample: int
    limit: int
    """Tokens it may have."""
    draws: Tensor | None
    detokenizer: Detokenizer | None
    seen: set[int]
    """Ids of the first branch and of the completion, for the repetition penalty."""
    branches: list[int]
    """Which branches still run; none where it is not wanted any more."""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def runs(self, branch: int) -> bool:
        """Return whether a branch needs its row any longer."""
        return self.finish_reason is None and branch in self.branches

    def advance(self, token: int, eos: frozenset[int], extra: dict[str, Any]) -> Step:
        """Add a token and see whether the completion ends."""
        position, text = len(self.token_ids), self.detokenizer
        method = self.ticket.prompt.method
        self.token_ids.append(token)
        self.seen.add(token)
        piece = text.push(token) if text else ""
        if token in eos or (text and text.stopped):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
        elif len(self.token_ids) == first_tokens(method):
            self.branches = [rest_branch(method)]
        if text and self.finish_reason:
            piece += text.finish()
        return Step(self.ticket, self.sample, position, token, piece, self.finish_reason, **extra)


Rows = list[tuple[Draft, int]]
"""What each row of the batch is: a completion and one of its branches."""


def begin(ticket: Ticket, model: LanguageModel) -> list[Draft]:
    """Return the completions of a request, nothing decoded yet."""
    prompt, params = ticket.prompt, ticket.prompt.sampling
    room, limit = params.max_new_tokens, model.max_positions
    if limit is not None:
        # The last token is never fed back, so one more than the free positions can be had.
        room = min(room, limit - max(map(len, prompt.branches)) + 1)
    drafts = []
    for j in range(params.n):
        text = ticket.text or params.stop
        drafts.append(
            Draft(
                ticket,
                j,
                room,
                draws=None if params.greedy else uniforms(prompt.seed + j, room),
                detokenizer=Detokenizer(model.tokenizer, params.stop) if text else None,
                seen=set(prompt.branches[0]),
                branches=list(range(len(prompt.branches))),
            )
        )
    return drafts


@dataclass
class Group:
    """Completions whose logits are combined together, and their rows."""

    drafts: list[Draft] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Draft after draft, each in the order of its branches."""
    places: dict[Draft, dict[int, int]] = field(default_factory=dict)


def groups_of(rows: Rows, only: Collection[Draft] | None = None) -> list[Group]:
    """Gather live completions by method, number of live branches and how tokens are chosen.

    Of the completions `only`, if given, count.
    """
    groups: dict[Any, Group] = {}
    for row, (draft, branch) in enumerate(rows):
        if not draft.runs(branch) or (only is not None and draft not in only):
            continue
        prompt = draft.ticket.prompt
        key = kind_of(prompt.method, prompt.sampling, len(draft.branches))
        group = groups.setdefault(key, Group())
        group.places.setdefault(draft, {})[branch] = row
    for group in groups.values():
        group.drafts = list(group.places)
        # A request that took free places may lie anywhere: its branches are put side by side.
        group.rows = [places[k] for d, places in group.places.items() for k in d.branches]
    return list(groups.values())


def kind_of(method: Method, params: SamplingParams, branches: int) -> Hashable:
    """Return what completions share whose tokens may be chosen together."""
    return _identity(method), branches, _choice(params)


def _identity(method: Method) -> Hashable:
    """Return what methods that may be combined together share."""
    try:
        hash(method)
    except TypeError:
        return id(method)
    return cast(Hashable, method)


def _choice(params: SamplingParams) -> tuple[object, ...]:
    """Return the settings that one choice of a token depends on."""
    filters = (params.top_k, params.top_p, params.min_p)
    return (params.temperature, *filters, params.repetition_penalty, params.logprobs)


def choose(model: LanguageModel, drafts: Sequence[Draft], logits: Tensor) -> list[Step]:
    """Draw the next token of each of a group's completions from its rows' logits (row, vocab)."""
    first = drafts[0]
    prompt = first.ticket.prompt
    params, method = prompt.sampling, prompt.method
    z = logits.view(len(drafts), -1, logits.shape[-1])
    draws = [draft.draws[len(draft.token_ids)] for draft in drafts if draft.draws is not None]
    contrasted = len(first.branches) == len(prompt.branches)
    choice = choose_tokens(
        method,
        params,
        z,
        [draft.seen for draft in drafts],
        torch.stack(draws) if draws else None,
        contrasted=contrasted,
    )
    if not choice.finite.all():
        raise ModelError(not_finite(model, method, bool(choice.branches.isfinite().all())))
    logprobs = choice.logprobs() if params.logprobs else None
    steps = []
    for i, (draft, token) in enumerate(zip(drafts, choice.tokens.tolist(), strict=True)):
        extra: dict[str, Any] = {}
        if logprobs is not None:
            extra = {"logprob": logprobs[0][i], "branch_logprob": logprobs[1][i]}
        if (every := draft.ticket.record) and len(draft.token_ids) % every == 0:
            extra |= {"logits": choice.branches[i].clone(), "combined": choice.combined[i].clone()}
        steps.append(draft.advance(token, model.eos_token_ids, extra))
    return steps


def not_finite(model: LanguageModel, method: Method, given: bool) -> str:
    """Return what to say of logits that are not finite; `given`: those of the branches were."""
    if given:
        return f'Method "{method.name}" made logits that are not finite. Give it less strength.'
    if any(p.dtype == torch.float16 for p in model.model.parameters()):
        advice = "Load it with --dtype float32 or bfloat16 (`dtype=`)."
    else:
        own = "weights, or its adapter's," if model.has_adapter else "weights"
        advice = f"Its {own} are broken."
    return f'Model "{model.name}" gave logits that are not finite. {advice}'
