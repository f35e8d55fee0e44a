"""A stack of adapters: one LoRA a task, earlier ones merged into the model in memory, one trained.

    stack = AdapterStack.load(["run/task1", "run/task2"])     folders that PEFT wrote
    model = stack.attach(base, LoraConfig(r=8, ...))          + one fresh adapter named "default"
    ... train with any trainer (`trueline.train.keep.trainer` adds the penalty) ...
    save_adapter(model, "run/task3")

Files stay as they are: each task starts from the untouched base and merges the earlier adapters
again, so that nothing adds up. `model.disable_adapter()` is then the model after the task before.
Modules that an adapter saves whole (a classifier's head) are not low rank and cannot be added: the
last adapter that saves one decides, and the next task's copy starts from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel

from trueline.errors import ConfigError, ModelError
from trueline.methods.inf_lora import outside
from trueline.methods.o_lora import row_basis
from trueline.models.adapter import PREFIX, add_lora, is_conv1d, steady_config
from trueline.train.adapters.saved import LowRank, SavedLora, read_lora

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class AdapterStack:
    """Adapters of tasks in the order in which they were learned; may be empty."""

    adapters: tuple[SavedLora, ...] = ()

    @classmethod
    def load(cls, folders: Sequence[str | Path]) -> AdapterStack:
        """Read the folders; raises `ModelError` where modules of the same name differ in size."""
        adapters = tuple(read_lora(folder) for folder in folders)
        sizes: dict[str, tuple[int, int]] = {}
        for adapter in adapters:
            for name, module in adapter.modules.items():
                size = (module.b.shape[0], module.a.shape[1])
                if sizes.setdefault(name, size) != size:
                    raise ModelError(
                        f'Adapter "{adapter.folder}": module "{name}" is {size[0]} x {size[1]}, '
                        f"that of an earlier adapter {sizes[name][0]} x {sizes[name][1]}. "
                        "Stack adapters of one base model."
                    )
        return cls(adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    def of(self, module: str) -> list[LowRank]:
        """Return the parts of every adapter that has the module, oldest first."""
        return [a.modules[module] for a in self.adapters if module in a.modules]

    @cached_property
    def modules(self) -> list[str]:
        """Modules that any adapter has, in the order of the oldest."""
        return list(dict.fromkeys(name for a in self.adapters for name in a.modules))

    @property
    def saved(self) -> dict[str, Tensor]:
        """Parameters saved whole; of several the last adapter's."""
        return {name: tensor for a in self.adapters for name, tensor in a.saved.items()}

    def past_rows(self, module: str) -> Tensor | None:
        """Return a of all adapters as one matrix, float32; None where no adapter has the module."""
        parts = self.of(module)
        return torch.cat([p.a.float() for p in parts]) if parts else None

    def past_rank(self, module: str) -> int:
        """Return the sum of ranks that the configurations give the module."""
        return sum(a.rank_of(module) for a in self.adapters if module in a.modules)

    def file_hashes(self) -> list[dict[str, str]]:
        """Return the hashes of each adapter's files, to be compared after training."""
        return [a.file_hashes() for a in self.adapters]

    def merge(self, model: nn.Module) -> nn.Module:
        """Add all adapters to the weights of `model`, in place, and return it.

        The changes are summed in float32 and rounded once to the model's dtype. Saved modules are
        copied. Raises `ModelError` if the model is quantised, ties a weight, lacks a module, or
        has had a stack merged into it before.
        """
        if getattr(model, "_merged_stack", None):
            raise ModelError(
                "A stack is already merged into this model. Load the base from its files again."
            )
        parts = self.fitting(model, merging=True)
        with torch.no_grad():
            for name, module in parts:
                weight = module.weight
                delta = sum(p.delta().to(weight.device) for p in self.of(name))
                if is_conv1d(module):
                    delta = delta.T  # type: ignore[union-attr]
                weight.copy_((weight.float() + delta).to(weight.dtype))
            self._copy_saved(model)
        if self.adapters:
            model._merged_stack = self.file_hashes()  # type: ignore[assignment]
        return model

    def fitting(self, model: nn.Module, *, merging: bool = False) -> list[tuple[str, Any]]:
        """Return the adapters' modules in `model`; raises `ModelError` where one does not fit.

        Those that are to be merged must share no weight and not be quantised.
        """
        parts = [(name, _linear(model, name, self._owner(name))) for name in self.modules]
        uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
        for name, module in parts:
            _check_size(name, module, self._owner(name), model)
            if merging:
                _check_mergeable(name, module, uses[id(module.weight)])
        return parts

    def _owner(self, module: str) -> SavedLora:
        """Return the oldest adapter that has the module."""
        return next(a for a in self.adapters if module in a.modules)

    def _copy_saved(self, model: nn.Module) -> None:
        """Copy the parameters that adapters saved whole into the model."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers())
        for name, tensor in self.saved.items():
            target = parameters.get(name, buffers.get(name))
            if target is None or target.shape != tensor.shape:
                found = "has none" if target is None else f"has {tuple(target.shape)}"
                raise ModelError(
                    f'The adapters saved "{name}" of {tuple(tensor.shape)}, the model {found}. '
                    "Load the base with the same head."
                )
            target.copy_(tensor)

    def attach(
        self, model: Any, config: LoraConfig, *, orthogonal_start: bool = False
    ) -> PeftModel:
        """Merge the stack into `model` and put one fresh adapter, named "default", on it.

        Args:
            model: The untouched base, changed in place.
            config: Of the new adapter; its rank, alpha and targets may differ from earlier ones.
            orthogonal_start: Take out of the fresh a what lies in the span of earlier rows, as far
                as the width leaves room, and restore its rows' lengths. b is 0 either way.
        """
        if isinstance(model, PeftModel):
            raise ConfigError("`model` has an adapter already. Give the untouched base model.")
        self.merge(model)
        peft: PeftModel = add_lora(model, config)
        if orthogonal_start:
            for name, layer in adapter_layers(peft).items():
                _leave_span(layer.lora_A["default"].weight, self.past_rows(name))
        return peft


def _check_size(name: str, module: nn.Module, adapter: SavedLora, model: Any) -> None:
    """Raise `ModelError` unless the adapter's part has the size of the module's weight."""
    part = adapter.modules[name]
    base = getattr(model.config, "_name_or_path", "") or type(model).__name__
    size, own = tuple(linear_weight(module).shape), (part.b.shape[0], part.a.shape[1])
    if size != own:
        raise ModelError(
            f'Adapter "{adapter.folder}": module "{name}" is {own[0]} x {own[1]}, that of "{base}" '
            f"{size[0]} x {size[1]}. Give the adapter's own base model."
        )


def _check_mergeable(name: str, module: nn.Module, uses: int) -> None:
    """Raise `ModelError` unless something can be added to the module's weight alone, exactly."""
    weight: Any = module.weight
    if not weight.is_floating_point() or type(weight).__name__ == "Params4bit":
        raise ModelError(
            f'Module "{name}" is quantised, and adapters cannot be merged into it exactly. '
            "Load the base without quantisation."
        )
    if uses > 1:
        raise ModelError(
            f'Module "{name}" shares its weight with another, which merging would change too. '
            "Leave it out of `target_modules`."
        )


def _leave_span(a: Tensor, past: Tensor | None) -> None:
    if past is None:
        return
    basis = row_basis(past)
    if basis.shape[1] - len(basis) < len(a):
        return
    with torch.no_grad():
        rows = outside(a.float(), basis.to(a.device))
        lengths = a.float().norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)
        a.copy_(rows * lengths)


def adapter_layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """Return the layers that have the adapter, by their names in the base model."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if adapter in getattr(module, "lora_A", {})
    }


def save_adapter(model: PeftModel, folder: str | Path) -> Path:
    """Write the trained adapter in PEFT's own format, with no card, and return its folder."""
    folder = Path(folder)
    # Embeddings are never trained here; "auto" would ask the hub whether they were.
    model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's, which says nothing
    steady_config(folder)
    return folder


def _linear(model: nn.Module, name: str, adapter: SavedLora) -> Any:
    """Return the linear module of this name, which an adapter changes."""
    try:
        module: Any = model.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f'Adapter "{adapter.folder}" changes "{name}", which the model does not have. Give the '
            "adapter's own base model."
        ) from None
    if not isinstance(module, torch.nn.Linear) and not is_conv1d(module):
        raise ModelError(
            f'Adapter "{adapter.folder}" changes "{name}", a {type(module).__name__}; adapters can '
            "be merged into linear modules only."
        )
    return module


def linear_weight(module: nn.Module) -> Tensor:
    """Return a linear module's weight as d_out x d_in, also of a Conv1D and under an adapter."""
    inner: Any = getattr(module, "base_layer", module)
    weight: Tensor = inner.weight
    return weight.T if is_conv1d(inner) else weight
