"""Models to time: random ones of real sizes, made in seconds, and copies that share their weights.

Speed does not depend on what the weights say, with one exception: a random model's next-token
distribution is flat over the whole vocabulary, which no trained model's is, and a top-p set of
flat logits holds most of the vocabulary. The final norm is therefore scaled so that the logits
are about as peaked as those of a trained model; flat logits are timed apart, as the worst case.
"""

from __future__ import annotations

import copy
import datetime
import os
import platform
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import transformers

from trueline import LanguageModel, TruelineError, load_model
from trueline.models.device import processor
from trueline.models.packed import pack_weights

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "nano": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
"""135M is SmolLM's shape, 0.5B is Qwen2.5's; nano is for the tests."""
LOGIT_SCALE = 4.5
"""Standard deviation of the random models' logits: a top-p 0.8 set of some tens of tokens."""

FIRST_SCALE = 20.0
"""Factor on the output of the first MLP, so that a state depends on its own token above all. Random
layers average the context, and the model would repeat one token for ever: equality of such runs
proves nothing."""


@dataclass
class Rivals:
    """One set of weights as three models: for transformers, and for us without and with packing."""

    rival: Any
    """Untouched: packed weights replace the forward of modules, and must not speed this one up."""
    torch: LanguageModel
    packed: LanguageModel
    packed_modules: int


def rivals(name: str, dtype: torch.dtype) -> Rivals:
    """Return the model `name` (a shape, or "tiny") in `dtype` with its copies.

    Raises `TruelineError` if the bundled model is not there.
    """
    if name in SHAPES:
        model = random_model(name, dtype)
    else:
        kind = str(dtype).removeprefix("torch.")
        model = load_model(name, dtype=kind, device="cpu", packed_weights=False).model
        model.generation_config.eos_token_id = None
        model.generation_config.bos_token_id = None
    ours, packed = shared_copy(model), shared_copy(model)
    return Rivals(model, _wrap(ours, name), _wrap(packed, name), pack_weights(packed))


def random_model(name: str, dtype: torch.dtype) -> Any:
    """Return a random Llama of the shape `name`, drawn in `dtype`, with no end-of-text token."""
    config = transformers.LlamaConfig(
        **SHAPES[name],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    config.dtype = dtype
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    # After the final norm a state has size sqrt(hidden); logits then have std 0.02 sqrt(hidden).
    scale = LOGIT_SCALE / (config.initializer_range * config.hidden_size**0.5)
    with torch.no_grad():
        model.model.norm.weight.fill_(scale)
        model.model.layers[0].mlp.down_proj.weight.mul_(FIRST_SCALE)
    return model


def shared_copy(model: Any) -> Any:
    """Return a copy with its own modules and the same parameters: no second set of weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _wrap(model: Any, name: str) -> LanguageModel:
    # Prompts are given as ids, so all that is asked of a tokenizer is which ids are special.
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=None, chat_template=None)
    return LanguageModel(model, cast(Any, tokenizer), name, raw=True)


def bundled_missing() -> str | None:
    """Return why the bundled model cannot be loaded, or None."""
    try:
        load_model("tiny", packed_weights=False)
    except TruelineError as error:
        return str(error)
    return None


def machine(threads: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
