"""Speculative decoding: tokens proposed cheaply, checked by all branches in one forward.

Sources: Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023,
arXiv 2211.17192; prompt lookup: Saxena, 2023.

    proposed    d_1 ... d_q, by a source: `Lookup` or `DraftModel`
    checked     logits behind the last token and behind each d, of every branch, from one forward
    taken       x_1, x_2 ...: x_t is chosen from the combined logits, as long as x_(t-1) = d_(t-1)

Each x_t is what the loop without proposals chooses there, by the request's own draw for that place.
So texts stay what they were, greedy or sampled, but for rounding; and d_t is taken with its
probability under the combined distribution, which is what rejection sampling grants one token.

How many to propose follows from what a forward of so many tokens costs on this machine, and from
the share of proposals taken in this completion so far: none where they fail. Both are free of the
clock of this run, so that the same run gives the same bits again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import torch

from trueline.engine.batch import Batch
from trueline.engine.drafts import Draft
from trueline.engine.sampling import choose_tokens
from trueline.models.adapter import BASE
from trueline.models.load import LanguageModel
from trueline.models.products import Times, machine, nearest
from trueline.models.prompts import shared_length

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS = (1, 2, 4, 8, 16)
"""Tokens of a forward, the last one and the proposals behind it, that are considered."""
MOST = 64
"""Rows times tokens of a forward at most; more costs as much as it brings."""
GAIN = 1.05
"""Proposals must promise so much more than none."""
MEMORY = 0.97
"""What an earlier token counts beside the next one, in the share of proposals taken."""
PROBE = 32
"""A draft model that does not pay is tried again after so many tokens."""
HOPE = 1.2
"""Of two proposals of a draft model so many are believed to be taken, before there were any."""
PROMPT = 48
"""Columns before the tokens, where the cost of a forward is measured."""
ROUNDS, ASSUMED = 4, 0.03
"""Forwards that are timed of each kind; and, where no time can be kept, the share of a step that
one more token of a row is taken to cost."""
GRAMS = (5, 4, 3, 2, 1)
"""How many last tokens are looked up, most first."""

Proposals = dict[Draft, list[int]]


@dataclass
class Taken:
    """How many of some proposals were taken; starts with what is believed beforehand."""

    taken: float
    tried: float = 2.0

    @property
    def share(self) -> float:
        """An estimate in (0, 1)."""
        return min(max(self.taken / self.tried, 0.005), 0.995)

    def learn(self, tried: int, taken: int) -> None:
        """Count proposals; earlier ones count less and less."""
        fade = MEMORY**tried
        self.tried, self.taken = self.tried * fade + tried, self.taken * fade + taken

    def expected(self, count: int) -> float:
        """Return how many tokens a forward with `count` proposals gives on average."""
        # 1 + a + a^2 + ... + a^count
        return (1 - self.share ** (count + 1)) / (1 - self.share)


class Source(Protocol):
    """Where proposals come from."""

    def taken(self, draft: Draft) -> Taken:
        """Return how proposals of the kind that it would make now have fared."""

    def cost(self) -> float:
        """Return the seconds of one more proposed token."""

    def propose(self, draft: Draft, count: int) -> list[int]:
        """Return at most `count` tokens that may follow."""


class Lookup:
    """Prompt lookup: what followed where the last tokens stood before, in prompt or answer."""

    def __init__(self) -> None:
        self._texts: WeakKeyDictionary[Draft, _Text] = WeakKeyDictionary()

    def cost(self) -> float:
        """Return nothing."""
        return 0.0

    def taken(self, draft: Draft) -> Taken:
        """Return how proposals behind so long a match have fared."""
        text = self._text(draft)
        return text.fared[text.match()[0]]

    def propose(self, draft: Draft, count: int) -> list[int]:
        """Return what followed; a text that repeats itself goes on repeating."""
        text = self._text(draft)
        length, place = text.match()
        if not length:
            return []
        found = text.ids[place : place + count]
        period = len(text.ids) - place
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def _text(self, draft: Draft) -> _Text:
        text = self._texts.get(draft)
        if text is None:
            text = self._texts[draft] = _Text(list(draft.ticket.prompt.branches[0]))
        text.extend(draft.token_ids[len(text.ids) - text.prompt :])
        return text


class _Text:
    """A prompt and its answer so far, indexed by their n-grams."""

    def __init__(self, prompt: list[int]) -> None:
        self.ids: list[int] = []
        self.prompt = len(prompt)
        self.after: dict[tuple[int, ...], int] = {}
        """Where each n-gram was last seen with a token behind it: the place of that token."""
        # Longer matches are believed more from the start; a match of none proposes nothing.
        self.fared = {n: Taken(0.2 + 0.25 * n) for n in GRAMS} | {0: Taken(0.0)}
        self._found: tuple[int, int] | None = None
        self.extend(prompt)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self.ids)
            for n in GRAMS:
                if n <= end:
                    self.after[tuple(self.ids[end - n :])] = end
            self.ids.append(token)
            self._found = None

    def match(self) -> tuple[int, int]:
        """Return the longest n whose last n tokens were seen before, and the place behind them."""
        if self._found is None:
            found = ((n, self.after.get(tuple(self.ids[-n:]))) for n in GRAMS)
            self._found = next(((n, place) for n, place in found if place is not None), (0, 0))
        return self._found


class DraftModel:
    """A smaller model of the same tokenizer, under the same method and with the same draws."""

    def __init__(self, model: LanguageModel, width: int) -> None:
        self.model, self.width = model, width
        self._costs = StepCosts(model)
        self._states: WeakKeyDictionary[Draft, _Ahead] = WeakKeyDictionary()

    def cost(self) -> float:
        """Return the seconds of one forward of the two branches that most methods have."""
        return self._costs(2)[1]

    def taken(self, draft: Draft) -> Taken:
        """Return how its proposals for this completion have fared."""
        state = self._state(draft)
        if len(draft.token_ids) - state.last >= PROBE:
            state.last, state.fared = len(draft.token_ids), Taken(HOPE)
        return state.fared

    def propose(self, draft: Draft, count: int) -> list[int]:
        """Return what it would write itself."""
        state, limit = self._state(draft), self.model.max_positions
        longest = max(map(len, draft.ticket.prompt.branches)) + len(draft.token_ids)
        if limit is not None and longest + count > limit:
            return []
        state.last = len(draft.token_ids)
        return state.propose(draft, count, self.width)

    def _state(self, draft: Draft) -> _Ahead:
        state = self._states.get(draft)
        if state is None:
            state = self._states[draft] = _Ahead(self.model)
        return state


@dataclass
class _Ahead:
    """A draft model's own cache of one completion."""

    model: LanguageModel
    batch: Batch | None = None
    fed: list[int] = field(default_factory=list)
    """Tokens of the completion that the cache holds, proposals among them."""
    fared: Taken = field(default_factory=lambda: Taken(HOPE))
    last: int = 0
    """Tokens there were when it last proposed."""

    def propose(self, draft: Draft, count: int, width: int) -> list[int]:
        prompt = draft.ticket.prompt
        if self.batch is None:
            self.batch = Batch(self.model, prompt.branches, [BASE] * len(prompt.branches))
            self.batch.prefill(None)
        known, own = draft.token_ids, self.fed
        # The last token is fed in any case, for the logits behind it.
        same = min(shared_length(own, known), len(known) - 1)
        self.batch.keep([same] * len(prompt.branches), len(own))
        logits = self._feed(known[same:])
        self.fed = list(known)
        found: list[int] = []
        while True:
            found.append(self._pick(draft, logits[..., :width], found))
            if len(found) == count:
                return found
            logits = self._feed(found[-1:])
            self.fed.append(found[-1])

    def _feed(self, tokens: list[int]) -> Tensor:
        assert self.batch is not None
        return self.batch.forward([tokens] * len(self.batch.lengths))[:, -1]

    def _pick(self, draft: Draft, logits: Tensor, found: list[int]) -> int:
        """Return the token that the method makes of the draft model's branches."""
        prompt, place = draft.ticket.prompt, len(draft.token_ids) + len(found)
        contrasted = len(draft.branches) == len(prompt.branches)
        z = logits if contrasted else logits[draft.branches]
        draws = None if draft.draws is None else draft.draws[place : place + 1]
        seen = [draft.seen | set(found)]
        choice = choose_tokens(
            prompt.method, prompt.sampling, z[None], seen, draws, contrasted=contrasted
        )
        return int(choice.tokens[0])


class Speculation:
    """Decides how many tokens are proposed for each completion under way."""

    def __init__(self, model: LanguageModel, source: Source) -> None:
        self.source = source
        self._costs = StepCosts(model)
        self._open: list[tuple[Draft, int, list[int], Taken]] = []
        """Proposals whose fate is open: for whom, behind how many tokens, and what they were."""

    def propose(self, drafts: Sequence[Draft], rows: int) -> Proposals:
        """Return the proposals that promise most for a forward of so many rows; none if none do."""
        rooms = {d: d.limit - len(d.token_ids) - 1 for d in drafts}
        fared = {draft: self.source.taken(draft) for draft in drafts}
        costs, own = self._costs(rows), self.source.cost() * len(drafts)
        best, most = 0, GAIN * len(drafts) / costs[1]
        for length, seconds in costs.items():
            tokens = sum(fared[d].expected(min(length - 1, room)) for d, room in rooms.items())
            if length > 1 and (rate := tokens / (seconds + (length - 1) * own)) > most:
                best, most = length - 1, rate
        # Where a proposal costs nothing, one that is not checked shows what it would be worth.
        count = best or int(own == 0)
        made = {
            draft: self.source.propose(draft, n) if (n := min(count, room)) > 0 else []
            for draft, room in rooms.items()
        }
        self._open = [(d, len(d.token_ids), made[d], fared[d]) for d in drafts if made[d]]
        return made if best and any(made.values()) else {}

    def learn(self) -> None:
        """See what became of the last proposals."""
        for draft, place, tokens, fared in self._open:
            followed = draft.token_ids[place:]
            taken = shared_length(tokens, followed)
            fared.learn(min(taken + 1, len(tokens), len(followed)), taken)
        self._open = []


def speculation_of(model: LanguageModel) -> Speculation | None:
    """Return how a model is to be decoded ahead; None: not at all."""
    if model.speculate is None:
        return None
    if isinstance(model.speculate, LanguageModel):
        return Speculation(model, DraftModel(model.speculate, model.text_config.vocab_size))
    return Speculation(model, Lookup())


class StepCosts:
    """Seconds of a model's forward by rows and tokens, measured once on a machine."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._known: dict[int, dict[int, float]] = {}

    def __call__(self, rows: int) -> dict[int, float]:
        """Return the seconds of so many rows by the tokens of each; 1 token is always there."""
        rows = nearest(rows)
        if rows not in self._known:
            lengths = [n for n in LENGTHS if n == 1 or n * rows <= MOST]
            case = (str(self.model.model.dtype).removeprefix("torch."), self._name(), rows)
            times = machine().times(case, lambda: self._measure(rows, lengths))
            self._known[rows] = (
                {n: 1 + ASSUMED * rows * (n - 1) for n in lengths}
                if times is None
                else {n: times[str(n)] for n in lengths}
            )
        return self._known[rows]

    def _name(self) -> str:
        """Return what tells this model's cost from another's."""
        lm = self.model
        config, device = lm.text_config, lm.device
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
        shape = " x ".join(str(getattr(config, name, None)) for name in names)
        kind = "fast" if any("forward" in vars(m) for m in lm.model.modules()) else "plain"
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"forward of {config.model_type} {shape}, {kind}, {len(lm.adapters)} on {where}"

    def _measure(self, rows: int, lengths: Sequence[int]) -> Times:
        lm = self.model
        own = lm.device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.thread_time if own else time.perf_counter
        prompt = [lm.pad_token_id] * min(PROMPT, (lm.max_positions or PROMPT) // 2)
        batch = Batch(lm, [prompt] * rows, [lm.adapter] * rows)
        batch.prefill(None)
        best = {str(n): float("inf") for n in lengths}
        for _ in range(ROUNDS):
            for n in lengths:
                start = clock()
                batch.forward([prompt[:1] * n] * rows)[0, 0, 0].item()  # waits for a GPU
                best[str(n)] = min(best[str(n)], clock() - start)
                batch.keep([0] * rows, n)
        return best
