"""Teacher forcing: logits of given continuations after the prompts of a method's branches.

What judges, harnesses and trainers share. Rows are padded on the left and get explicit positions;
a continuation's last token is only predicted, so it is not fed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trueline.engine.protocol import Continuation
from trueline.models.adapter import BASE
from trueline.models.prompts import pad_left
from trueline.models.weightless import Weightless
from trueline.types import Method, combine_at, first_tokens, rest_branch

if TYPE_CHECKING:
    from torch import Tensor

    from trueline.models.load import LanguageModel

_Row = tuple[bool | None, tuple[int, ...], tuple[int, ...]]
"""What one row of a forward is fed: adapter on, off or as it is; a prompt; tokens but the last."""


def score(
    model: LanguageModel,
    items: Sequence[Continuation],
    *,
    rows: int = 16,
    base: LanguageModel | None = None,
) -> Iterator[Tensor]:
    """Yield the logits that predict each item, (time, branch, vocab) in float32, in order.

    Rows of a forward that are fed the same run once, whichever items they belong to; items of like
    length in a row (`longest_first`) waste least. No gradient; `combined` makes one distribution
    of the branches.

    Args:
        model: From `load_model`.
        items: What to score.
        rows: Rows of one forward at most, but for an item with more branches. The logits do not
            depend on it but for rounding.
        base: The model of branches whose adapter is off, if it is another one.
    """
    if isinstance(model, Weightless):
        from trueline.engine.vllm.backend import VllmBackend

        yield from VllmBackend.of(model).score(items, rows=rows)
        return
    keys = [_rows_of(item) for item in items]
    for part in _parts(keys, rows):
        found = _forward(model, base, part, keys, items)
        for i in part:
            yield _side_by_side([found[key][-len(items[i].tokens) :] for key in keys[i]])
        del found  # before the next forward needs the memory


def _side_by_side(branches: Sequence[Tensor]) -> Tensor:
    """Return logits (time, branch, vocab) in float32 of branches (time, vocab) on any devices."""
    return torch.stack([z.to(branches[0].device, torch.float32) for z in branches], 1)


def longest_first(items: Sequence[Continuation]) -> list[int]:
    """Return the order in which rows of a forward are of like length, the longest first."""
    lengths = [max(map(len, item.branches)) + len(item.tokens) for item in items]
    return sorted(range(len(items)), key=lambda i: -lengths[i])


def combined(method: Method, logits: Tensor, first: int = 0, *, temperature: float = 1.0) -> Tensor:
    """Combine logits (time, branch, vocab) of a continuation, as decoding would.

    After the method's `first_tokens` its rest branch is alone; `first` tokens came before these.
    The logits were divided by `temperature` already.
    """
    count = first_tokens(method)
    if count is None or logits.shape[1] == 1:
        return combine_at(method, logits, temperature)
    n = max(0, count - first)
    alone = logits[n:, rest_branch(method)]
    if n == 0 or not len(logits):
        return alone
    return torch.cat([combine_at(method, logits[:n], temperature), alone])


def forced_logits(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    adapters: Sequence[bool] | None = None,
    forward: Any = None,
) -> list[Tensor]:
    """Return the logits (time, vocab) that predict each continuation, from one forward.

    Args:
        model: From `load_model`.
        prompts: Token ids.
        continuations: Token ids, at least one a row.
        adapters: For each row, whether the model's adapter is on; as it is by default.
        forward: Called in place of the model: the same one, wrapped for several processes.
    """
    fed = [[*p, *c[:-1]] for p, c in zip(prompts, continuations, strict=True)]
    ids, mask = pad_left(fed, model.pad_token_id, model.device)
    options: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if "position_ids" in model.forward_names:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in model.forward_names:
        # By indices: of a slice, which does not lie in one piece, torch makes the product row by
        # row, each with a copy of the head.
        kept = max(map(len, continuations))
        options["logits_to_keep"] = torch.arange(ids.shape[1] - kept, ids.shape[1]).to(ids.device)
    on = [True] * len(fed) if adapters is None else adapters
    options |= model.adapter_options([model.adapter if own else BASE for own in on])
    logits = (forward or model.model)(ids, **options).logits
    # Rows end at the last column, so a continuation of n tokens is predicted by the last n.
    return [z[-len(c) :] for z, c in zip(logits.unbind(0), continuations, strict=True)]


def _rows_of(item: Continuation) -> list[_Row]:
    adapters = item.adapters or (None,) * len(item.branches)
    fed = tuple(item.tokens[:-1])
    return [(on, tuple(ids), fed) for on, ids in zip(adapters, item.branches, strict=True)]


def _parts(keys: Sequence[list[_Row]], rows: int) -> Iterator[list[int]]:
    """Cut the items into parts of at most `rows` different rows, one item at least."""
    part: list[int] = []
    inside: set[_Row] = set()
    for i, own in enumerate(keys):
        if part and len(inside.union(own)) > rows:
            yield part
            part, inside = [], set()
        part.append(i)
        inside.update(own)
    if part:
        yield part


def _forward(
    model: LanguageModel,
    base: LanguageModel | None,
    part: Sequence[int],
    keys: Sequence[list[_Row]],
    items: Sequence[Continuation],
) -> dict[_Row, Tensor]:
    """Return the logits (time, vocab) of every different row of a part; a forward a model."""
    tokens = {key: items[i].tokens for i in part for key in keys[i]}
    found: dict[_Row, Tensor] = {}
    for apart in (False, True):
        rows = [key for key in tokens if (base is not None and key[0] is False) == apart]
        if not rows:
            continue
        chosen = base if apart and base is not None else model
        adapters = None if apart or base is not None else [key[0] is not False for key in rows]
        with torch.no_grad():
            logits = forced_logits(
                chosen, [key[1] for key in rows], [tokens[key] for key in rows], adapters=adapters
            )
        found.update(zip(rows, logits, strict=True))
    return found
