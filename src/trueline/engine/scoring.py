"""Teacher forcing: logits of given continuations after the prompts of a method's branches.

What judges, harnesses and trainers share. Rows are padded on the left and get explicit positions;
a continuation's last token is only predicted, so it is not fed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from trueline.models.prompts import pad_left
from trueline.types import Method

if TYPE_CHECKING:
    from torch import Tensor

    from trueline.models.load import LanguageModel


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
        options["logits_to_keep"] = max(map(len, continuations))
    if adapters is not None and not all(adapters):
        active = model.model.active_adapter
        options["adapter_names"] = [active if on else "__base__" for on in adapters]
    logits = (forward or model.model)(ids, **options).logits
    # Rows end at the last column, so a continuation of n tokens is predicted by the last n.
    return [z[-len(c) :] for z, c in zip(logits.unbind(0), continuations, strict=True)]


def combined(method: Method, logits: Tensor, first: int = 0) -> Tensor:
    """Combine logits (time, branch, vocab) of a continuation, as decoding would.

    After `method.first_tokens` the rest branch is alone; `first` tokens came before these.
    """
    if method.first_tokens is None or logits.shape[1] == 1:
        return method.combine(logits)
    n = max(0, method.first_tokens - first)
    alone = logits[n:, method.rest_branch]
    return torch.cat([method.combine(logits[:n]), alone]) if len(logits[:n]) else alone
