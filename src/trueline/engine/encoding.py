"""Encoding: requests to the token ids of their branches; what every back end shares."""

from __future__ import annotations

from dataclasses import replace

from trueline.engine.protocol import Prompt
from trueline.errors import ConfigError, ModelError, suggestion
from trueline.methods import Plain
from trueline.models.adapter import BASE
from trueline.models.load import LanguageModel
from trueline.models.prompts import chat_of, check_length, encode
from trueline.types import Message, Method, Request, SamplingParams, base_branches


class Encoder:
    """Encodes requests for a model, and knows which adapter each branch runs with."""

    model: LanguageModel

    def supports(self, method: Method) -> bool:
        """Return whether the model has the adapter that a branch of the method switches off."""
        return self.model.has_adapter or not base_branches(method)

    def encode(self, request: Request) -> Prompt:
        """Return the request as token ids of its branches."""
        method, sampling = request.method or Plain(), request.sampling or SamplingParams()
        adapter = self._adapter(request, method)
        chats = method.prompts(chat_of(self.model, request.messages))
        branches = [encode(self.model, chat) for chat in chats]
        check_length(self.model, branches)
        prompt = Prompt(branches, method, sampling, request.seed, adapter=adapter)
        return replace(prompt, prefixes=tuple(map(self.prefix, chats)))

    def prefix(self, chat: list[Message]) -> tuple[int, ...]:
        """Return the leading ids of a chat that a back end is to compute once; none by default."""
        return ()

    def adapter_of(self, prompt: Prompt, branch: int) -> str:
        """Return the adapter of one branch's rows."""
        off = branch in base_branches(prompt.method)
        return BASE if off else prompt.adapter or self.model.adapter

    def _adapter(self, request: Request, method: Method) -> str:
        """Return the name of a request's adapter; raises for one that the model lacks."""
        name = self.model.adapter if request.adapter is None else request.adapter
        if request.adapter is not None and name not in self.model.adapters:
            hint = suggestion(name, self.model.adapters)
            raise ConfigError(f'Model "{self.model.name}" has no adapter "{name}".{hint}')
        if name == BASE and base_branches(method):
            raise ModelError(
                f'Method "{method.name}" switches the adapter off in one branch, but model '
                f'"{self.model.name}" has no adapter. Pass --adapter FOLDER (`adapter=`).'
            )
        return name
