"""Second moments of what modules read, and of what the loss feels of what they write.

    moments = collect_moments(model, batches, modules)          one pass at the end of a task
    save_moments(moments, "run/task1")                          beside the adapter's own files
    load_moments(["run/task1", "run/task2"])                    a list for each module

Statistics of a task's data, from which `trueline.methods.drift` tells what a later adapter would
change. No data are kept; k x d_in numbers a module are. Padding does not count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trueline.errors import ConfigError, DataError, ModelError
from trueline.methods.drift import factor_of
from trueline.models.adapter import PREFIX

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "moments.safetensors"


@dataclass(frozen=True)
class Moments:
    """Of one module and one task."""

    factor: Tensor
    """F, k x d_in: F^T F is the mean of x x^T over tokens."""
    out: Tensor | None = None
    """H, m x d_out: H^T H is the mean over rows (or predicted tokens) of sum_s g_s g_s^T, with g_s
    the gradient of one's loss in the module's output at place s; None if not collected."""


def collect_moments(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    modules: Sequence[str],
    *,
    rank: int | None = None,
    keep: float = 1.0,
    gradients: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, Moments]:
    """Return the second moments of the modules over the batches.

    Args:
        model: With or without an adapter; its mode and its gradients are as before afterwards.
        batches: What its forward takes, on any device; `labels` are needed for `gradients`. A
            classifier's may have `offered`, a mask of the outputs among which labels are drawn.
        modules: Names in the base model, as an `AdapterStack` or `adapter_layers` gives them.
        rank: The most rows of a factor; None for all.
        keep: Share of the energy that a factor holds, in (0, 1].
        gradients: Also the outputs' side: labels are drawn from the model's own predictions at the
            places that have one (the Fisher information, not the gradient of the data).
        generator: For those draws, on the model's device.

    Raises:
        ConfigError: No batches.
        ModelError: A module that the model lacks or did not run.
    """
    found = {name: _module(model, name) for name in modules}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    tokens, rows = dict.fromkeys(modules, 0), 0
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for batch in batches:
            batch = {k: v.to(device) for k, v in batch.items()}
            offered = batch.pop("offered", None)
            batch = _unambiguous(model, batch)
            watch = _watch(found, _masks(model, batch), gradients)
            with watch as seen, torch.set_grad_enabled(gradients):
                logits, labels = _predict(model, batch, offered)
                for name, part in seen.items():
                    for x in part.inputs:
                        _add(inputs, name, x.T @ x)
                        tokens[name] += len(x)
                if gradients:
                    rows += _output_moments(seen, logits, labels, outputs, generator)
    finally:
        model.train(was_training)
    if not any(tokens.values()):
        raise ConfigError("There are no batches to collect moments from. Give some.")
    if silent := [name for name in modules if not tokens[name]]:
        raise ModelError(f'Module "{silent[0]}" did not run on any batch.')
    return {
        name: Moments(
            factor_of(inputs[name] / tokens[name], rank, keep),
            factor_of(outputs[name] / rows, rank, keep) if name in outputs else None,
        )
        for name in modules
    }


def input_moments(
    model: Any, batches: Iterable[Mapping[str, Tensor]], modules: Sequence[str], **options: Any
) -> dict[str, Tensor]:
    """Return F of each module's inputs alone: `collect_moments` without gradients."""
    found = collect_moments(model, batches, modules, **options)
    return {name: moments.factor for name, moments in found.items()}


def save_moments(moments: Mapping[str, Moments], folder: str | Path) -> Path:
    """Write the moments into an adapter's folder and return the file."""
    state = {f"{name}.factor": m.factor for name, m in moments.items()}
    state |= {f"{name}.out": m.out for name, m in moments.items() if m.out is not None}
    path = Path(folder) / FILE
    save_file({key: value.cpu().contiguous() for key, value in state.items()}, path)
    return path


def load_moments(folders: Sequence[str | Path]) -> dict[str, list[Moments]]:
    """Return the moments of tasks by module, oldest first; `DataError` if a file is missing."""
    found: dict[str, list[Moments]] = {}
    for folder in folders:
        path = Path(folder) / FILE
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: cannot be read: {error} Collect the moments first.") from None
        for key in state:
            if key.endswith(".factor"):
                name = key.removesuffix(".factor")
                moments = Moments(state[key], state.get(f"{name}.out"))
                found.setdefault(name, []).append(moments)
    return found


@dataclass
class _Seen:
    """What one module read and wrote in one forward pass."""

    inputs: list[Tensor]
    """Places that count, as rows."""
    outputs: list[Tensor]


def _add(sums: dict[str, Tensor], name: str, moment: Tensor) -> None:
    sums[name] = sums[name] + moment if name in sums else moment


def _module(model: Any, name: str) -> nn.Module:
    for full in (name, PREFIX + name):
        with contextlib.suppress(AttributeError):
            module: nn.Module = model.get_submodule(full)
            return module
    raise ModelError(f'The model has no module "{name}".')


@contextlib.contextmanager
def _watch(
    modules: Mapping[str, nn.Module], masks: Sequence[Tensor], gradients: bool
) -> Iterator[dict[str, _Seen]]:
    """Record what the modules read and, with gradients, write while the body runs."""
    seen: dict[str, _Seen] = {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            rows, kept = x.reshape(-1, x.shape[-1]).float(), _kept(x, masks)
            rows = rows if kept is None else rows[kept]
            seen.setdefault(name, _Seen([], [])).inputs.append(rows)

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.requires_grad_()
            seen[name].outputs.append(output)
            return output

        return hook

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(before(name)))
            if gradients:
                handles.append(module.register_forward_hook(after(name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _kept(x: Tensor, masks: Sequence[Tensor]) -> Tensor | None:
    """Return which of the flattened places count, by the mask of this shape; None for all."""
    places = x.shape[:-1]
    for mask in masks:
        if places in (mask.shape, (mask.numel(),)):
            return mask.reshape(-1)
    return None


def _masks(model: Any, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the masks of places that count: the encoder's or only one, and the decoder's."""
    masks = []
    if (mask := batch.get("attention_mask")) is not None:
        masks.append(mask.bool())
    if model.config.is_encoder_decoder and (labels := batch.get("labels")) is not None:
        masks.append(labels != -100)
    return masks


def _unambiguous(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a padded place to the encoder's side where both sides have the same length."""
    if not model.config.is_encoder_decoder or "labels" not in batch:
        return batch
    ids = batch["input_ids"]
    if ids.shape != batch["labels"].shape:
        return batch
    mask, pad = batch.get("attention_mask", torch.ones_like(ids)), torch.nn.functional.pad
    return batch | {
        "input_ids": pad(ids, (0, 1), value=model.config.pad_token_id or 0),
        "attention_mask": pad(mask, (0, 1), value=0),
    }


def _predict(
    model: Any, batch: Mapping[str, Tensor], offered: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return logits, of the offered outputs alone, and the labels that belong to them."""
    labels = batch.get("labels")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if model.config.is_encoder_decoder:
        if labels is None:
            raise ConfigError("An encoder-decoder needs `labels` in its batches.")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if "decoder_input_ids" not in inputs:
            make = base.prepare_decoder_input_ids_from_labels
            inputs["decoder_input_ids"] = make(labels=labels)
    logits = model(**inputs).logits
    if offered is not None:
        logits = logits.masked_fill(~offered, -torch.inf)
    if labels is not None and logits.dim() == 3 and not model.config.is_encoder_decoder:
        return logits[:, :-1], labels[:, 1:]
    return logits, labels


def _output_moments(
    seen: Mapping[str, _Seen],
    logits: Tensor,
    labels: Tensor | None,
    sums: dict[str, Tensor],
    generator: torch.Generator | None,
) -> int:
    """Add sum_s g_s g_s^T of a batch, for labels drawn from the logits; return how many rows."""
    if labels is None:
        raise ConfigError("`gradients` needs `labels` in the batches.")
    logits = logits[labels != -100].float()
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
    places = [(name, output) for name, part in seen.items() for output in part.outputs]
    gradients = torch.autograd.grad(loss, [output for _, output in places], allow_unused=True)
    for (name, _), gradient in zip(places, gradients, strict=True):
        if gradient is None:
            continue
        # Nothing flows back to padded places: nobody attends to them.
        g = gradient.reshape(-1, gradient.shape[-1]).float()
        _add(sums, name, g.T @ g)
    return len(drawn)
