"""A decoding method as a model provider of Inspect.

    inspect eval task.py --model trueline/tiny -M principle="Talk like a pirate." -M ratio=2

Found by Inspect through the package's entry point. Samples that wait while a batch decodes form the
next batch, so the more connections (`--max-connections`, 32 by default) the larger the batches.
Tools, images and penalties have no counterpart and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import anyio

from trueline.decoding import Decoder, Prompt
from trueline.errors import ConfigError, DataError, ModelError
from trueline.integrations import split_options
from trueline.modeling import load_model
from trueline.types import Completion, Request, SamplingParams

try:
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        modelapi,
    )
except ModuleNotFoundError as error:
    raise ModelError("This needs Inspect. Install it: pip install 'trueline[inspect]'") from error

REFUSED = ("frequency_penalty", "presence_penalty", "logit_bias", "best_of", "logprobs")
ROWS = 32
"""Prompts decoded together at most, and connections by default."""


@dataclass(eq=False)
class _Job:
    prompt: Prompt
    answers: list[Completion] | None = None


@modelapi(name="trueline")
class TruelineAPI(ModelAPI):
    """A model under a decoding method; `model_args` are the method's fields and `load_model`'s."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 Inspect's own signature
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        self.method, load = split_options(model_args)
        self.decoder = Decoder(load_model(model_name, **load))
        self.jobs: list[_Job] = []
        self.lock = anyio.Lock()

    def max_connections(self) -> int:
        """Return how many samples Inspect sends at a time by default."""
        return ROWS

    async def generate(
        self, input: list[ChatMessage], tools: list[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """Decode one chat, together with those that wait."""
        if tools:
            raise ConfigError("Trueline calls no tools. Leave `tools` out.")
        if any(m.role == "tool" or not isinstance(m.content, str) for m in input):
            raise DataError("Messages must be text from system, user or assistant.")
        chat: Any = [{"role": m.role, "content": m.content} for m in input]
        request = Request(chat, self.method, sampling_params(config), config.seed or 0)
        job = _Job(self.decoder.encode(request))
        self.jobs.append(job)
        try:
            async with self.lock:
                if job.answers is None:
                    batch = [job, *(other for other in self.jobs if other is not job)][:ROWS]
                    await anyio.to_thread.run_sync(self._decode, batch)
        finally:
            self.jobs = [j for j in self.jobs if j is not job and j.answers is None]
        assert job.answers is not None
        return _output(self.model_name, job.answers)

    def _decode(self, jobs: list[_Job]) -> None:
        answers = iter(self.decoder.collect([job.prompt for job in jobs]))
        for job in jobs:
            job.answers = [next(answers) for _ in range(job.prompt.sampling.n)]


def sampling_params(config: GenerateConfig) -> SamplingParams:
    """Return Inspect's settings as ours: greedy unless a temperature is given.

    Raises `ConfigError` for a setting with no counterpart.
    """
    for name in REFUSED:
        if getattr(config, name):
            raise ConfigError(f"`{name}` has no counterpart here. Leave it out.")
    given = {
        "max_new_tokens": config.max_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "stop": config.stop_seqs,
        "n": config.num_choices,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _output(model_name: str, answers: list[Completion]) -> ModelOutput:
    choices = [
        ChatCompletionChoice(
            message=ChatMessageAssistant(content=a.text, source="generate", model=model_name),
            stop_reason="stop" if a.finish_reason == "stop" else "max_tokens",
        )
        for a in answers
    ]
    read, written = sum(answers[0].prompt_tokens), sum(len(a.token_ids) for a in answers)
    usage = ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
    return ModelOutput(model=model_name, choices=choices, usage=usage)
