"""The one place where an engine is made: PyTorch's, or the one that holds a model's weights."""

from __future__ import annotations

from typing import Any

from trueline.engine.protocol import Backend
from trueline.engine.torch_backend import TorchBackend
from trueline.models.language import LanguageModel
from trueline.models.weightless import Weightless


def make_backend(model: LanguageModel, **options: Any) -> Backend:
    """Return the back end for a model; the options are PyTorch's alone, see `Decoder`.

    All who decode on a model of vLLM share one back end, which starts now if it has not.
    """
    if isinstance(model, Weightless):
        from trueline.engine.vllm.backend import VllmBackend

        return VllmBackend.of(model)
    return TorchBackend(model, **options)
