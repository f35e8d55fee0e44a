"""The weights of a stream: how a stage's model is made, kept and made again from its files.

stack    a fresh LoRA on the untouched model with all earlier ones merged in
one      one LoRA, going on from the stage before
all      all weights, going on from the stage before
apart    a fresh LoRA on the untouched model
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import set_seed

from trueline.continual.config import StreamConfig
from trueline.continual.stages import Strategy
from trueline.continual.tasks import Task, union_of_labels
from trueline.errors import ConfigError, ModelError
from trueline.models.adapter import WEIGHTS
from trueline.models.checkpoint import HEADS, load_as_saved, read_config
from trueline.models.load import load_model
from trueline.models.places import find_model
from trueline.train.adapters.stack import AdapterStack, save_adapter

Factory = Callable[[], tuple[Any, Any]]
"""Returns a fresh model and its tokenizer, the same at every call."""
SMALL = 1 << 30
"""Bytes of a model that is kept in memory untouched instead of being made anew for each stage."""


def model_factory(name: str, tasks: Sequence[Task]) -> Factory:
    """Return a function that loads a model of whichever kind, with its tokenizer.

    A classifier gets an output for each label of all tasks; where its own head has another number
    of them the new one is random, by a fixed seed, and goes into the adapters' files.
    """
    place = find_model(name)
    own = read_config(place)
    classifies = any(a.endswith("ForSequenceClassification") for a in own.architectures or ())
    if not own.is_encoder_decoder and not classifies:

        def causal() -> tuple[Any, Any]:
            loaded = load_model(name, dtype="float32", packed_weights=False)
            return loaded.model, loaded.tokenizer

        return causal

    def other() -> tuple[Any, Any]:
        set_seed(0)
        labels = union_of_labels(tasks)
        head = {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: k for k, label in enumerate(labels)},
        }
        loaded = load_as_saved(place, dtype=torch.float32, head=head if classifies else None)
        loaded.model.head_is_new = loaded.head_is_new
        return loaded.model, loaded.tokenizer

    return other


class Fresh:
    """Makes the untouched model: from memory where it is small, by the factory where it is not."""

    def __init__(self, factory: Factory) -> None:
        self.factory = factory
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, self.tokenizer = factory()
        size = sum(p.nbytes for p in model.parameters())
        self.hash = _weights_hash(model) if size <= 4 * SMALL else str(model.config._name_or_path)
        self.first: Any = model
        self.kept = model if size <= SMALL else None

    def __call__(self) -> Any:
        """Return it anew, on the device."""
        if self.kept is not None:
            model = copy.deepcopy(self.kept)
        else:
            model = self.factory()[0] if self.first is None else self.first
            self.first = None
        return model.to(self.device)


class StageWeights:
    """Makes, saves and makes again the model of each stage.

    Args:
        fresh: The untouched model.
        strategy: Says how weights go on.
        config: Of the LoRA.
        saved: Where each stage's weights lie: an adapter's folder, or a file of all weights.
        ranks: The rank of each stage's LoRA.
        seeds: The seed of each stage.
    """

    def __init__(
        self,
        fresh: Fresh,
        strategy: Strategy,
        config: StreamConfig,
        saved: Sequence[Path],
        ranks: Sequence[int],
        seeds: Sequence[int],
    ) -> None:
        self.fresh, self.strategy, self.config = fresh, strategy, config
        self.saved, self.ranks, self.seeds = saved, ranks, seeds

    def start(self, index: int) -> tuple[Any, AdapterStack]:
        """Return the model as stage `index` starts from it, and the adapters merged into it."""
        weights, model = self.strategy.weights, self.fresh()
        if weights == "all":
            if index:
                model.load_state_dict(torch.load(self.saved[index - 1], weights_only=True))
            return model, AdapterStack()
        model, stack = self._with_adapter(index, model)
        if weights == "one" and index:
            _load_adapter(model, self.saved[index - 1])
        return model, stack

    def again(self, index: int) -> Any:
        """Return the model as it was at the end of a stage, from its files."""
        model = self.fresh()
        if self.strategy.weights == "all":
            model.load_state_dict(torch.load(self.saved[index], weights_only=True))
            return model
        model, _ = self._with_adapter(index, model)
        _load_adapter(model, self.saved[index])
        return model

    def save(self, model: Any, index: int) -> None:
        """Write the trained weights so that a kill leaves them whole or not at all."""
        target = self.saved[index]
        part = target.with_name(f"{target.name}.part")
        if self.strategy.weights == "all":
            torch.save(model.state_dict(), part)
        else:
            shutil.rmtree(part, ignore_errors=True)
            save_adapter(model, part)
        os.replace(part, target)

    def drop(self, index: int) -> None:
        """Remove all weights of an earlier stage, which nothing needs any more."""
        if self.strategy.weights == "all" and index >= 0:
            self.saved[index].unlink(missing_ok=True)

    def _with_adapter(self, index: int, model: Any) -> tuple[Any, AdapterStack]:
        set_seed(self.seeds[index])
        stack = AdapterStack()
        if self.strategy.weights == "stack":
            stack = AdapterStack.load(self.saved[:index])
        model = stack.attach(model, self._lora(index, model))
        if not self.config.train_head:
            for name, p in model.named_parameters():
                if ".modules_to_save." in name:
                    p.requires_grad_(False)
        return model, stack

    def _lora(self, index: int, model: Any) -> LoraConfig:
        config, rank, targets = self.config, self.ranks[index], self.config.target_modules
        head = None
        # A head that is in no file of the model must be in the adapter's.
        if config.train_head or getattr(model, "head_is_new", False):
            names = [name for name in HEADS if hasattr(model, name)]
            if not names or not type(model).__name__.endswith("ForSequenceClassification"):
                raise ConfigError("`train_head` is for models that classify by a head.")
            head = names[:1]
        return LoraConfig(
            r=rank,
            # Another rank has the same scale.
            lora_alpha=config.alpha * rank / config.rank,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=list(targets) if isinstance(targets, tuple) else targets,
            modules_to_save=head,
        )


def _load_adapter(model: Any, folder: Path) -> None:
    found: Any = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    if found.unexpected_keys:
        raise ModelError(f'Adapter "{folder}" does not fit the model: {found.unexpected_keys[0]}.')


def _weights_hash(model: Any) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]
