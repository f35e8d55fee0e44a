"""A decoding method as a model provider of Inspect.

    inspect eval task.py --model trueline/tiny -M principle="Talk like a pirate." -M ratio=2

Found by Inspect through the package's entry point. A sample joins those under way at the next step,
so the more connections (`--max-connections`, 32 by default) the larger the batches.
Tools, images and penalties have no counterpart and are refused.
"""

from __future__ import annotations

from typing import Any

import anyio

from trueline.engine.decoding import Decoder, Gathering
from trueline.engine.protocol import Prompt, Ticket
from trueline.errors import ConfigError, DataError, ModelError
from trueline.integrations import split_options
from trueline.models.load import load_model
from trueline.types import Completion, Request, SamplingParams

try:
    import inspect_ai.model as api
except ModuleNotFoundError as error:
    raise ModelError("This needs Inspect. Install it: pip install 'trueline[inspect]'") from error

REFUSED = ("frequency_penalty", "presence_penalty", "logit_bias", "best_of", "logprobs")
SETTINGS = {"max_new_tokens": "max_tokens", "stop": "stop_seqs", "n": "num_choices"}
"""Our names of Inspect's settings; the others are called the same."""
ROWS = 32
"""Prompts decoded together at most, and connections by default."""


@api.modelapi(name="trueline")
class TruelineAPI(api.ModelAPI):
    """A model under a decoding method; `model_args` are the method's fields and `load_model`'s."""

    def __init__(
        self, model_name: str, base_url: Any = None, api_key: Any = None,
        config: api.GenerateConfig = api.GenerateConfig(), **model_args: Any,  # noqa: B008
    ) -> None:  # fmt: skip
        super().__init__(model_name, base_url, api_key, [], config)
        self.method, load = split_options(model_args)
        self.decoder = Decoder(
            load_model(model_name, **load), batch_size=ROWS, admission="each_step"
        )
        self.gathering = Gathering(self.decoder.model)
        self.answers: dict[Ticket, list[Completion]] = {}
        self.lock = anyio.Lock()
        """The engine is one thread's at a time."""

    def max_connections(self) -> int:
        """Return how many samples Inspect sends at a time by default."""
        return ROWS

    async def generate(
        self, input: list[Any], tools: list[Any], tool_choice: Any, config: api.GenerateConfig
    ) -> api.ModelOutput:
        """Decode one chat, together with those that wait."""
        if tools:
            raise ConfigError("Trueline calls no tools. Leave `tools` out.")
        if any(m.role == "tool" or not isinstance(m.content, str) for m in input):
            raise DataError("Messages must be text from system, user or assistant.")
        chat: Any = [{"role": m.role, "content": m.content} for m in input]
        request = Request(chat, self.method, sampling_params(config), config.seed or 0)
        return _output(self.model_name, await self._answer(self.decoder.encode(request)))

    async def _answer(self, prompt: Prompt) -> list[Completion]:
        """Decode a prompt, whoever waits taking the next step for all."""
        async with self.lock:
            ticket = self.decoder.add(prompt)
        try:
            while ticket not in self.answers:
                async with self.lock:
                    if ticket not in self.answers:
                        await anyio.to_thread.run_sync(self._step)
            return self.answers.pop(ticket)
        except BaseException:
            self.decoder.cancel(ticket)
            raise

    def _step(self) -> None:
        for step in self.decoder.step():
            if (own := self.gathering.take(step)) is not None:
                self.answers[step.ticket] = own


def sampling_params(config: api.GenerateConfig) -> SamplingParams:
    """Return Inspect's settings as ours: greedy unless a temperature is given.

    Raises `ConfigError` for a setting with no counterpart.
    """
    if refused := next((name for name in REFUSED if getattr(config, name)), None):
        raise ConfigError(f"`{refused}` has no counterpart here. Leave it out.")
    names = (*SETTINGS, "temperature", "top_p", "top_k")
    given = {name: getattr(config, SETTINGS.get(name, name)) for name in names}
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _output(name: str, answers: list[Completion]) -> api.ModelOutput:
    choices = []
    for a in answers:
        message = api.ChatMessageAssistant(content=a.text, source="generate", model=name)
        reason: Any = "stop" if a.finish_reason == "stop" else "max_tokens"
        choices.append(api.ChatCompletionChoice(message=message, stop_reason=reason))
    read, written = sum(answers[0].prompt_tokens), sum(len(a.token_ids) for a in answers)
    usage = api.ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
    return api.ModelOutput(model=name, choices=choices, usage=usage)
