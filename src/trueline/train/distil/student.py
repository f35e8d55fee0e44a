"""The student, and the start that it moves away from."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from trueline.errors import ConfigError
from trueline.models.adapter import add_lora
from trueline.models.checkpoint import read_tokenizer
from trueline.models.load import LanguageModel, load_model
from trueline.models.places import find_model

if TYPE_CHECKING:
    from trueline.train.distil.config import InverseQConfig


def student_of(model: Any, tokenizer: Any, peft_config: Any, args: InverseQConfig) -> LanguageModel:
    """Return the model that is trained, with its adapter if one is asked for.

    The adapter's random start is decided by the seed. Raises `ConfigError` where there is an
    adapter already, or nothing to train.
    """
    if isinstance(model, str):
        model = load_model(model, raw=args.raw, packed_weights=False)
    if not isinstance(model, LanguageModel):
        name = getattr(model.config, "_name_or_path", "") or "model"
        found = read_tokenizer(find_model(name)) if tokenizer is None else tokenizer
        model = LanguageModel(model, found, name, args.raw)
    set_seed(args.seed)
    if peft_config is not None:
        if model.has_adapter:
            raise ConfigError("`model` has an adapter already. Leave out `peft_config`.")
        adapted = add_lora(model.model, peft_config)
        model = dataclasses.replace(model, model=adapted, raw=args.raw)
    if not any(p.requires_grad for p in model.model.parameters()):
        raise ConfigError("No weight is trainable. Load the adapter with `is_trainable=True`.")
    checkpointing = getattr(args, "activation_checkpointing", args.gradient_checkpointing)
    if model.has_adapter and checkpointing:
        model.model.enable_input_require_grads()
    if args.disable_dropout:
        for module in model.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return model


def activation_bytes(model: Any) -> int:
    """Return about how many bytes a forward keeps for its backward, a token.

    Of a block: eight of the hidden size (two norms with their results, three of attention, what
    comes out of it) and four of the inner one, in the model's dtype; and the logits, in float32.
    """
    config = model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    widest = max(inner) if isinstance(inner, list) else inner  # some models have one a layer
    block = 8 * config.hidden_size + 4 * widest
    size = next(model.parameters()).element_size()
    return int(config.num_hidden_layers * block * size + 4 * config.vocab_size)


class Reference:
    """The start of a student: its model with the adapter off, or else a frozen copy.

    Args:
        student: Before its first update.
        prepare: Called with the copy, which is put where the student is trained.
    """

    def __init__(self, student: LanguageModel, prepare: Callable[[Any], Any]) -> None:
        self.student = student
        self.copy: LanguageModel | None = None
        if not student.has_adapter:
            model = prepare(copy.deepcopy(student.model).requires_grad_(False))
            self.copy = dataclasses.replace(student, model=model)

    @contextlib.contextmanager
    def opened(self) -> Iterator[LanguageModel]:
        """Yield it, as a model in evaluation."""
        if self.copy is not None:
            yield self.copy
            return
        model: Any = self.student.model
        trained = [(p, p.requires_grad) for p in model.parameters()]
        with evaluating(model):
            try:
                with model.disable_adapter():
                    yield self.student
            finally:
                # PEFT gives a gradient to all of an adapter that it switches on again.
                for p, wanted in trained:
                    p.requires_grad_(wanted)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
