"""The back end on PyTorch: K branches of many requests as rows of one batch, one forward a step.

    Request -> method.prompts -> encode -> prefill -> logits (row, vocab)
    every step: / temperature -> method.combine -> sample -> one token to all branches of a request

Branches are rows, never a second model call. All rows share one cache; they are padded on the
left and carry explicit positions. A request that has finished leaves the batch, and so does a
branch that its method no longer needs; one that joins is prefilled apart and gets the tokens that
it would get alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from trueline.engine.batch import Batch
from trueline.engine.cache import PrefixKey, PrefixStore
from trueline.engine.drafts import Rows, begin, choose, groups_of
from trueline.engine.encoding import Encoder
from trueline.engine.protocol import Continuation, Prompt, Step, Ticket
from trueline.engine.scheduler import Admission, Scheduler
from trueline.engine.scoring import score
from trueline.engine.speculation import Proposals, speculation_of
from trueline.models.load import LanguageModel
from trueline.models.prompts import check_length, system_prefix
from trueline.types import Message

if TYPE_CHECKING:
    from torch import Tensor

MIN_PREFIX = 4
"""Shorter shared prefixes are not worth keeping."""
FEWEST = 4
"""A prefix that fewer requests of a batch share is not computed apart, but where all share it."""


class TorchBackend(Encoder):
    """Decodes on a model of transformers; see `trueline.engine.decoding.Decoder` for the options.

    After an error in a step nothing is under way any more: a half-done step leaves no batch.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch_size: int = 32,
        admission: Admission = "when_empty",
        share_prefixes: bool = True,
        keep_turns: bool = False,
    ) -> None:
        self.model = model
        self.scheduler = Scheduler(batch_size, admission)
        self.share_prefixes, self.keep_turns = share_prefixes, keep_turns
        self.store = PrefixStore()
        self.speculation = speculation_of(model)
        self.batch: Batch | None = None
        self.rows: Rows = []
        self._prefix_of = lru_cache(maxsize=256)(self._find_prefix)

    def add(self, prompt: Prompt, *, record: int = 0, text: bool = True) -> Ticket:
        """Take an encoded request in."""
        check_length(self.model, prompt.branches)
        if self.keep_turns:
            # A turn holds all earlier ones: no more than two rounds of branches are worth keeping.
            self.store.size = 2 * len(prompt.branches)
        return self.scheduler.add(prompt, record, text)

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request; its rows leave before the next forward."""
        self.scheduler.end(ticket)
        for draft, _ in self.rows:
            if draft.ticket is ticket:
                draft.branches = []

    @torch.inference_mode()
    def step(self) -> list[Step]:
        """Feed the last tokens, let requests join, and draw the next token of every completion."""
        try:
            return self._step()
        except BaseException:
            self.batch, self.rows = None, []
            self.scheduler.running.clear()
            raise

    def score(self, items: Sequence[Continuation], *, rows: int = 16) -> Iterator[Tensor]:
        """Yield the logits (time, branch, vocab) of each; see `trueline.engine.scoring`."""
        return score(self.model, items, rows=rows)

    def _step(self) -> list[Step]:
        begun = self.scheduler.admit()
        proposals, logits = self._forward(joined=bool(begun))
        if begun:
            logits = self._admit(begun, logits)
        if logits is None:
            return []
        steps = self._choose(logits, proposals)
        if self.keep_turns:
            self._store_turns()
        under_way = {draft.ticket for draft, branch in self.rows if draft.runs(branch)}
        for ticket in self.scheduler.running - under_way:
            self.scheduler.end(ticket)
        return steps

    def _choose(self, logits: Tensor, proposals: Proposals) -> list[Step]:
        """Choose the tokens behind each row's last one, and behind proposals while they hold."""
        assert self.batch is not None
        going = {draft: len(draft.token_ids) for draft, branch in self.rows if draft.runs(branch)}
        before, steps = dict(going), list[Step]()
        for time in range(logits.shape[1]):
            for group in groups_of(self.rows, going):
                whole = group.rows == list(range(len(self.rows)))
                z = logits[:, time] if whole else logits[group.rows, time]
                steps += choose(self.model, group.drafts, z)
            for draft in list(going):
                ahead = proposals.get(draft, ())[time : time + 1]
                if draft.finish_reason is not None or ahead != draft.token_ids[-1:]:
                    del going[draft]
        if self.speculation is not None:
            self.speculation.learn()
        if logits.shape[1] > 1:
            counts = [len(draft.token_ids) - before[draft] for draft, _ in self.rows]
            self.batch.keep(counts, logits.shape[1])
        return steps

    def _forward(self, *, joined: bool) -> tuple[Proposals, Tensor | None]:
        """Feed every completion's last token, and proposals behind it if no others join.

        Rows that are free stay only if they fill soon.
        """
        kept = [i for i, (draft, branch) in enumerate(self.rows) if draft.runs(branch)]
        if not kept or self.batch is None:
            self.batch, self.rows = None, []
            return {}, None
        idle: list[int] = []
        if len(kept) < len(self.rows):
            if (joined or self.scheduler.refills) and 4 * len(kept) >= 3 * len(self.rows):
                idle = sorted(set(range(len(self.rows))) - set(kept))
            else:
                self.batch.select(kept)
                self.rows = [self.rows[i] for i in kept]
        proposals: Proposals = {}
        if self.speculation is not None and not joined and not idle:
            proposals = self.speculation.propose(list({d: 0 for d, _ in self.rows}), len(self.rows))
        fed = [[draft.token_ids[-1], *proposals.get(draft, ())] for draft, _ in self.rows]
        most = max(map(len, fed))
        fed = [own + [self.model.pad_token_id] * (most - len(own)) for own in fed]
        return proposals, self.batch.forward(fed, idle)

    def _admit(self, begun: Sequence[Ticket], logits: Tensor | None) -> Tensor:
        """Prefill requests, join them to what is under way, and return the logits of all rows."""
        batch, rows, new = self._prefill(begun)
        if logits is None or self.batch is None:
            self.batch, self.rows = batch, rows
            return new[:, None]
        free = [i for i, (draft, branch) in enumerate(self.rows) if not draft.runs(branch)]
        places = self.batch.join(batch, free)
        more = len(self.batch.lengths) - len(self.rows)
        logits = torch.cat([logits, new[:more, None]])
        logits[places] = new[:, None]
        self.rows = self.rows + rows[:more]
        for place, row in zip(places, rows, strict=True):
            self.rows[place] = row
        return logits

    def _prefill(self, begun: Sequence[Ticket]) -> tuple[Batch, Rows, Tensor]:
        """Run prompts once, then repeat rows for requests that want several completions."""
        prompts = [ticket.prompt for ticket in begun]
        among = self._store_prefixes(prompts)
        ids = [branch for p in prompts for branch in p.branches]
        adapters = [self.adapter_of(p, k) for p in prompts for k in range(len(p.branches))]
        batch = Batch(self.model, ids, adapters)
        logits = batch.prefill(self.store, None if self.keep_turns else among)
        rows: Rows = []
        select: list[int] = []
        first_row = 0
        for ticket, p in zip(begun, prompts, strict=True):
            for draft in begin(ticket, self.model):
                rows += [(draft, branch) for branch in draft.branches]
                select += range(first_row, first_row + len(p.branches))
            first_row += len(p.branches)
        if len(select) > len(ids):
            batch.select(select)
            logits = logits[torch.tensor(select, device=logits.device)]
        return batch, rows, logits

    def prefix(self, chat: list[Message]) -> tuple[int, ...]:
        """Return the leading ids that every chat with the same system message shares."""
        if not self.share_prefixes or self.model.raw or chat[0]["role"] != "system":
            return ()
        return self._prefix_of(chat[0]["content"])

    def _find_prefix(self, system: str) -> tuple[int, ...]:
        return tuple(system_prefix(self.model, [{"role": "system", "content": system}]))

    def _store_prefixes(self, prompts: Sequence[Prompt]) -> list[PrefixKey]:
        """Compute what enough of these requests begin with, and return the keys of it.

        What is shared depends on these requests alone, and what is kept of it on its ids: the
        same batch gives the same bits whatever came before it.
        """
        counts: Counter[PrefixKey] = Counter()
        for p in prompts:
            counts.update({(self.adapter_of(p, k), f): 1 for k, f in enumerate(p.prefixes)})
        least = min(FEWEST, len(prompts))
        shared = [key for key, n in counts.items() if n >= least and len(key[1]) >= MIN_PREFIX]
        for adapter, prefix in shared:
            known = self.store.knows((adapter, prefix))
            if self.keep_turns:
                # A turn that begins with it is as good.
                known = self.store.longest(adapter, prefix)[1] == len(prefix)
            if not known:
                batch = Batch(self.model, [list(prefix)], [adapter])
                batch.prefill(None)
                self.store.put(adapter, prefix, batch.cache, 0)
        return shared

    def _store_turns(self) -> None:
        assert self.batch is not None
        for row, (draft, branch) in enumerate(self.rows):
            if draft.finish_reason is not None:
                prompt = draft.ticket.prompt
                ids = [*prompt.branches[branch], *draft.token_ids[:-1]]
                self.store.drop_shorter(self.adapter_of(prompt, branch), ids)
                self.store.put(self.adapter_of(prompt, branch), ids, self.batch.cache, row)
