"""The penalty of a new adapter as a mixin for any trainer of the Trainer family, with its guards.

    trainer = kept(SFTTrainer)(model, stack=stack, terms=[Overlap(0.5)], ...)

Before training it checks that exactly the new adapter is trained and that the terms see the
earlier ones; afterwards that the files of the earlier ones are what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trueline.errors import ModelError
from trueline.train.adapters.stack import AdapterStack, adapter_layers, linear_weight
from trueline.train.keep.second_moments import Moments, load_moments
from trueline.train.keep.terms import Target, Term

if TYPE_CHECKING:
    from torch import Tensor, nn


class PenaltyMixin:
    """Adds terms on the new adapter to the loss of the trainer that follows.

    Args:
        stack: The earlier adapters, as merged into the model; empty for the first task.
        terms: What holds it back; none trains the new adapter freely.
        moments: Of earlier tasks by module, for terms that need them; by default read from the
            adapters' folders.

    The terms are the same for every micro-batch and process, so they are neither multiplied by
    gradient accumulation nor by the number of processes. Evaluation loss is without them. Means of
    the terms, with their strength, are logged as `penalty/<name>`.
    """

    stack: AdapterStack
    terms: list[Term]

    def __init__(
        self,
        *args: Any,
        stack: AdapterStack | None = None,
        terms: Sequence[Term] = (),
        moments: Mapping[str, Sequence[Moments]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.stack = AdapterStack() if stack is None else stack
        self.terms = list(terms)
        self._penalty_moments = moments
        self._penalty_states: States = []
        self._penalty_sums: dict[str, list[Tensor]] = {}

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Check, train, check again."""
        model = _unwrapped(self)
        check_trainable(model)
        check_stack(model, self.stack)
        self._penalty_states = prepare(model, self.stack, self.terms, self._penalty_moments)
        before = self.stack.file_hashes()
        result = super().train(*args, **kwargs)  # type: ignore[misc]
        if self.stack.file_hashes() != before:
            raise ModelError("Files of earlier adapters changed during training. Restore them.")
        return result

    def compute_loss(
        self: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the trainer's own loss plus the terms, while training."""
        result = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not model.training or not self._penalty_states:
            return result
        penalty = self.penalty()
        # Undo what the trainer will not do: it divides a loss by the accumulation steps only if
        # that loss is a mean over the micro-batch.
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # newer than some releases
        if scaled is None:
            scaled = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            )
        if scaled:
            penalty = penalty / self.current_gradient_accumulation_steps
        if return_outputs:
            return result[0] + penalty, result[1]
        return result + penalty

    def penalty(self) -> Tensor:
        """Return the sum of all terms, each with its strength."""
        terms = penalties(self._penalty_states)
        for name, value in terms.items():
            self._penalty_sums.setdefault(name, []).append(value.detach())
        return torch.stack(list(terms.values())).sum()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the terms since the last training log."""
        if "loss" in logs:
            for name, values in self._penalty_sums.items():
                if values:
                    logs[f"penalty/{name}"] = torch.stack(values).mean().item()
            self._penalty_sums.clear()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def kept(trainer: type) -> Any:
    """Return the trainer class with `PenaltyMixin` before it."""
    return type(f"Kept{trainer.__name__}", (PenaltyMixin, trainer), {})


States = list[tuple[Term, list[tuple[Any, Any]]]]
"""For each term the layers that it speaks of, each with what `prepare` made of it."""


def penalties(states: States) -> dict[str, Tensor]:
    """Return each term by its name, over all its modules and times its strength."""
    found: dict[str, Tensor] = {}
    for term, modules in states:
        values = torch.stack([term.value(*_matrices(layer), state) for layer, state in modules])
        value = term.strength * (values.mean() if term.mean else values.sum())
        found[term.name] = found[term.name] + value if term.name in found else value
    return found


def _matrices(layer: Any) -> tuple[Tensor, Tensor]:
    return _whole(layer.lora_A["default"].weight), _whole(layer.lora_B["default"].weight)


def _whole(parameter: Any) -> Tensor:
    """Return a parameter in float32, gathered where FSDP has it in parts."""
    gathered: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return gathered.float()


def _unwrapped(trainer: Any) -> Any:
    return trainer.accelerator.unwrap_model(trainer.model)


def check_trainable(model: nn.Module) -> None:
    """Raise `ModelError` unless exactly the adapter "default" is trained (its a may be frozen)."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {n for n, _ in model.named_parameters() if ".default" in n}
    b, a = ({n for n in own if f".lora_{part}." in n} for part in "BA")
    if strangers := sorted(trained - own):
        raise ModelError(
            f'"{strangers[0]}" would be trained ({len(strangers)} parameters beside the new '
            "adapter's). Give the model that `AdapterStack.attach` returns."
        )
    if not b or not b <= trained:
        raise ModelError(
            "The new adapter would not be trained: it is "
            f"{'frozen' if b else 'missing'}. Give the model that `AdapterStack.attach` returns."
        )
    if a & trained and not a <= trained:
        raise ModelError("Some lora_A of the new adapter are frozen and some are not.")


def check_stack(model: Any, stack: AdapterStack) -> None:
    """Raise `ModelError` unless the stack is the one in the model and its ranks add up."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    merged = getattr(base, "_merged_stack", None) or []
    if merged != stack.file_hashes():
        raise ModelError(
            f"The model has {len(merged)} adapters merged into it, and they are not the "
            f"{len(stack)} of `stack`. Give the model that `stack.attach` returns."
        )
    for name in stack.modules:
        rows = stack.past_rows(name)
        if rows is None or len(rows) != stack.past_rank(name):
            raise ModelError(
                f'Module "{name}" has {0 if rows is None else len(rows)} past rows, the adapters\' '
                f"ranks add up to {stack.past_rank(name)}. Save the adapters again."
            )


def prepare(
    model: nn.Module,
    stack: AdapterStack,
    terms: Sequence[Term],
    moments: Mapping[str, Sequence[Moments]] | None = None,
) -> States:
    """Return for each term the layers it speaks of with its state, on the layers' devices.

    Raises `ModelError` where a term would be 0 whatever the new adapter learns, though there are
    earlier ones: on random matrices it must be above 0.
    """
    if moments is None:
        needed = any(term.needs_moments for term in terms)
        moments = load_moments([a.folder for a in stack.adapters]) if needed else {}
    targets = [
        (
            layer,
            Target(
                name,
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                float(layer.scaling["default"]),
                linear_weight(layer),
                tuple(stack.of(name)),
                stack.past_rows(name),
                tuple(moments.get(name, ())),
            ),
        )
        for name, layer in adapter_layers(model).items()
    ]
    found: States = []
    for term in terms:
        term.check([target for _, target in targets])
        states = []
        for layer, target in targets:
            if (state := term.prepare(target)) is not None:
                states.append((layer, _moved(state, target.a.device)))
        if len(stack) and term.strength > 0 and not _can_speak(term, states):
            raise ModelError(
                f"The {term.name} penalty is 0 whatever the new adapter learns: it has no "
                f"module in common with the {len(stack)} earlier ones, or their weights are 0. "
                "Set its strength to 0 to train without it."
            )
        if states and term.strength > 0:
            found.append((term, states))
    return found


def _can_speak(term: Term, states: Sequence[tuple[Any, Any]]) -> bool:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer, state in states:
            a, b = (
                torch.randn(m.shape, generator=generator).to(m.device) for m in _matrices(layer)
            )
            if term.value(a, b, state) > 0:
                return True
    return False


def _moved(state: Any, device: torch.device) -> Any:
    """Return a state with its tensors on the device."""
    if isinstance(state, torch.Tensor):
        return state.to(device)
    if isinstance(state, (list, tuple)):
        return type(state)(_moved(part, device) for part in state)
    return state
