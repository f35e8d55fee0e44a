"""What a strategy keeps of a task at its end: second moments, a diagonal Fisher. Dropout is off.

Labels are drawn from the model itself, among those over which the training loss goes, as the Fisher
information asks for: with the true labels a task learned well would leave nothing behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trueline.continual.answers import by_length
from trueline.continual.families import Kind, Row
from trueline.train.adapters.stack import adapter_layers
from trueline.train.keep.second_moments import Moments, collect_moments

if TYPE_CHECKING:
    from torch import Tensor, nn


def moments_of(
    model: Any,
    kind: Kind,
    rows: Sequence[Row],
    batch_size: int,
    *,
    seed: int,
    gradients: bool = False,
    rank: int | None = None,
) -> dict[str, Moments]:
    """Return the second moments of each module with the new adapter over these rows."""
    lengths = [row["input_ids"] for row in rows]
    batches = [kind.collate([rows[i] for i in part]) for part in by_length(lengths, batch_size)]
    # The rows are of one task: a classifier's labels are drawn among the same places in each.
    offered = batches[0].get("offered")
    with _only(model, None if offered is None else offered[0]):
        return collect_moments(
            model,
            [{k: v for k, v in batch.items() if k != "offered"} for batch in batches],
            list(adapter_layers(model)),
            rank=rank,
            gradients=gradients,
            generator=torch.Generator(model.device).manual_seed(seed),
        )


def fisher(model: Any, kind: Kind, rows: Sequence[Row], seed: int) -> dict[nn.Parameter, Tensor]:
    """Return E (d loss / d theta)^2 over rows for each trained parameter; a backward pass a row."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    total = {p: torch.zeros_like(p, dtype=torch.float32) for p in trained}
    was_training = model.training
    model.eval()
    for row in rows:
        batch = {k: v.to(model.device) for k, v in kind.collate([row]).items()}
        loss = kind.own_loss(_logits(model, batch), batch, generator)
        for p, grad in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True),
                           strict=True):  # fmt: skip
            if grad is not None:
                total[p] += grad.float().square() / len(rows)
    model.train(was_training)
    return total


@contextlib.contextmanager
def _only(model: nn.Module, offered: Tensor | None) -> Iterator[None]:
    """Let the model choose among the offered places alone while the body runs."""
    if offered is None:
        yield
        return

    def mask(module: nn.Module, args: Any, output: Any) -> Any:
        outside = ~offered.to(output.logits.device)
        output.logits = output.logits.masked_fill(outside, -torch.inf)
        return output

    handle = model.register_forward_hook(mask)
    try:
        yield
    finally:
        handle.remove()


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Return logits; labels go in only where a decoder's input is made of them."""
    fed = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    if getattr(model.config, "is_encoder_decoder", False):
        fed["labels"] = batch["labels"]
    logits: Tensor = model(**fed).logits
    return logits
