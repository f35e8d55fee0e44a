"""A decoding method as a model provider of Inspect.

    inspect eval task.py --model trueline/tiny -M principle="Talk like a pirate." -M ratio=2

Found by Inspect through the package's entry point. Samples that wait while a batch decodes form the
next batch, so the more connections (`--max-connections`, 32 by default) the larger the batches.
Tools, images and penalties have no counterpart and are refused.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import anyio

from trueline.engine.decoding import Decoder
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
        self.decoder = Decoder(load_model(model_name, **load))
        self.jobs: list[SimpleNamespace] = []
        self.lock = anyio.Lock()

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
        self.jobs.append(job := SimpleNamespace(prompt=self.decoder.encode(request), answers=None))
        try:
            async with self.lock:
                if job.answers is None:
                    batch = [job, *(other for other in self.jobs if other is not job)][:ROWS]
                    await anyio.to_thread.run_sync(self._decode, batch)
        finally:
            self.jobs = [j for j in self.jobs if j is not job and j.answers is None]
        return _output(self.model_name, job.answers)

    def _decode(self, jobs: list[SimpleNamespace]) -> None:
        answers = iter(self.decoder.collect([job.prompt for job in jobs]))
        for job in jobs:
            job.answers = [next(answers) for _ in range(job.prompt.sampling.n)]


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
