"""The untouched model of a stream: how it is loaded, and made anew for each stage."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from trueline.models.checkpoint import load_as_saved, read_config
from trueline.models.load import load_model
from trueline.models.places import find_model
from trueline.records.hashes import folder_hash
from trueline.train.tasks.task import Task, union_of_labels

Factory = Callable[[], tuple[Any, Any]]
"""Returns a fresh model and its tokenizer, the same at every call."""
SMALL = 1 << 30
"""Bytes of a model that is kept in memory untouched instead of being made anew for each stage."""


def model_factory(name: str, tasks: Sequence[Task], *, trust_remote_code: bool = False) -> Factory:
    """Return a function that loads a model of whichever family, with its tokenizer.

    A classifier gets an output for each label of all tasks; where its own head has another number
    of them the new one is random, by a fixed seed, and goes into the adapters' files.
    """
    place = find_model(name, trust_remote_code=trust_remote_code)
    own = read_config(place)
    classifies = any(a.endswith("ForSequenceClassification") for a in own.architectures or ())
    if not own.is_encoder_decoder and not classifies:

        def causal() -> tuple[Any, Any]:
            loaded = load_model(
                name, dtype="float32", packed_weights=False, trust_remote_code=trust_remote_code
            )
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
        self.hash = base_hash(model)
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


def base_hash(model: Any) -> str:
    """Return what tells a base from others, whatever dtype it was loaded in.

    A hash of its files, the hub's commit, or for a model made in memory a hash of its weights.
    """
    folder = Path(getattr(model.config, "_name_or_path", "") or "?")
    if (folder / "config.json").is_file():
        return folder_hash(folder)
    if commit := getattr(model.config, "_commit_hash", None):
        return f"commit {commit}"
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]
