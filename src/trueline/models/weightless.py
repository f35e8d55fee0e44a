"""A model whose weights another engine holds: tokenizer, template, shapes, and nothing to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from trueline.errors import ModelError
from trueline.models.adapter import BASE
from trueline.models.language import LanguageModel


@dataclass
class Weightless(LanguageModel):
    """What jobs know of a model that runs elsewhere; its `model` has shapes, but no weights.

    Made by `load_model(..., engine="vllm")`.
    """

    engine: str = "vllm"
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    """Of the engine itself, by its own names."""
    path: str = ""
    """What the engine loads: a folder, or a name on the hub."""
    running: Any = field(default=None, repr=False)
    """The back end, once it has started; one for all who decode on this model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model.forward = self._refuse

    @property
    def device(self) -> torch.device:
        """Where its logits come: the CPU."""
        return torch.device("cpu")

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter."""
        return bool(self.adapter_folders)

    @property
    def adapter(self) -> str:
        """The adapter of requests that name none; `BASE` is none at all."""
        return "default" if "default" in self.adapter_folders else BASE

    @property
    def max_positions(self) -> int | None:
        """The most tokens a row may have: the model's own, or fewer (`max_model_len`)."""
        own, given = super().max_positions, self.engine_options.get("max_model_len")
        return min((n for n in (own, given) if n is not None), default=None)

    def adapter_options(self, names: Sequence[str]) -> NoReturn:
        """Raise: there is no forward to be told anything."""
        self._refuse()

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ModelError(
            f'Model "{self.name}" runs on {self.engine}, which has no forward to call. What trains '
            "or looks inside the model needs PyTorch: leave out --engine (`engine=`)."
        )
