"""The language model: a model of transformers with its tokenizer, and what jobs ask of them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from trueline.errors import ConfigError, ModelError
from trueline.models.adapter import BASE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOOKUP = "lookup"
"""The way to decode ahead that needs no second model."""


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer: what every other module of Trueline works on.

    Made by `load_model`, or from objects you already have: `LanguageModel(model, tokenizer)`.
    Raises `ModelError` for models that no branched decoding fits (encoder-decoder, recurrent).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "model"
    raw: bool = False
    """Send prompts as they are, with no chat template."""
    default_system: bool = True
    """Keep the system text that the template puts in where a chat has none; off, it is empty."""
    adapters: tuple[str, ...] = ()
    """Names of adapters for requests that ask for them; for others they are off."""
    speculate: LanguageModel | Literal["lookup"] | None = None
    """Decode ahead (`trueline.engine.speculation`): by prompt lookup, or with a draft model. Texts
    stay what they are but for rounding."""
    folder: Path | None = field(default=None, repr=False)
    """Where its files are; None on the hub, or where it was made in memory."""
    adapter_folders: dict[str, Path] = field(default_factory=dict, repr=False)
    """Where the files of its adapters are, in the hub's cache too; "default" is `adapter`'s."""
    _default_system: str | None = field(default=None, repr=False)
    _folds_system: bool | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        config = self.model.config
        kind = getattr(config, "model_type", type(self.model).__name__)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f'Model "{self.name}" ({kind}) is an encoder-decoder. Give a causal language model.'
            )
        if odd := _odd_layers(self.model, self.text_config):
            raise ModelError(
                f'Model "{self.name}" ({kind}) has {odd}, which left padding and branches of '
                "unequal length would corrupt. Give a model with full or sliding-window attention."
            )
        self.model.eval()
        if isinstance(self.speculate, LanguageModel):
            self._check_draft(self.speculate)

    def _check_draft(self, draft: LanguageModel) -> None:
        """Raise `ConfigError` unless both models give every token the same id."""
        if self.tokenizer.get_vocab() != draft.tokenizer.get_vocab():
            raise ConfigError(
                f'Draft model "{draft.name}" has another tokenizer than "{self.name}" '
                f'(`speculate`). Give a smaller model of the same family, or "{LOOKUP}".'
            )

    @property
    def text_config(self) -> Any:
        """The configuration of the language model itself, also inside a multimodal one."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where the input embeddings live."""
        device: torch.device = self.model.get_input_embeddings().weight.device  # type: ignore[assignment]
        return device

    @property
    def max_positions(self) -> int | None:
        """The most tokens a row may have, prompt and completion; None if there is no limit."""
        config = self.text_config
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            if isinstance(limit := getattr(config, name, None), int) and limit > 0:
                return limit
        return None

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text, from the generation config and the tokenizer."""
        found: set[int] = set()
        generation = getattr(self.model, "generation_config", None)
        for source in (getattr(generation, "eos_token_id", None), self.tokenizer.eos_token_id):
            if source is not None:
                found.update(source if isinstance(source, (list, tuple)) else [source])
        return frozenset(found)

    @property
    def pad_token_id(self) -> int:
        """A token for padded places; it is never attended to."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def has_adapter(self) -> bool:
        """Whether a PEFT adapter is active."""
        return hasattr(self.model, "peft_config")

    @property
    def adapter(self) -> str:
        """What PEFT calls the adapter of requests that name none; `BASE` is none at all."""
        return BASE if self._active in self.adapters else self._active

    def adapter_options(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what a forward is to be told so that each row has its adapter on."""
        if set(names) <= {self._active}:
            return {}
        return {"adapter_names": list(names)}

    @property
    def _active(self) -> str:
        """What PEFT calls the adapter that a plain forward runs."""
        if not self.has_adapter:
            return BASE
        active = getattr(self.model, "active_adapter", None)
        return active if isinstance(active, str) else "default"

    @cached_property
    def forward_names(self) -> frozenset[str]:
        """Names of the arguments that the model's forward takes."""
        base: Any = self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]
        return frozenset(inspect.signature(base.forward).parameters)

    @property
    def cache_name(self) -> str:
        """What the model's forward calls its cache."""
        return cache_name(self.forward_names)


def _odd_layers(model: Any, text_config: Any) -> str:
    """Return what kinds of layers a model has besides attention over all or the last tokens."""
    kinds = set(getattr(text_config, "layer_types", None) or ())
    if odd := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"{', '.join(odd)} layers"
    recurrent = getattr(model, "_is_stateful", False) or "mamba" in text_config.model_type
    return "a recurrent state" if recurrent else ""


def cache_name(forward_names: Collection[str]) -> str:
    """Return what a forward with these arguments calls its cache, and so its outputs do."""
    return "cache" if "cache" in forward_names else "past_key_values"
