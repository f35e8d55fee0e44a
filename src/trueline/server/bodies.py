"""Bodies of requests: OpenAI's fields that have a meaning here, and `alignment`.

A field that is unknown, or known to OpenAI and without a counterpart here, is refused by name; it
is let through where its value asks for nothing (`frequency_penalty` 0, `tools` []).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trueline.errors import ConfigError, DataError

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}
"""Fields without a counterpart here, and the values that ask for nothing."""


CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "What is the moon?"}],
    "max_tokens": 32,
    "alignment": {"method": "linear-alignment", "principle": "Talk like a pirate."},
}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "The moon is", "max_tokens": 8}
"""Examples in /docs."""


class Part(BaseModel):
    """A part of a message: text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn; parts of text are joined."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> Any:
        """Return the message as the engine takes it."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """What a stream ends with."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Body(BaseModel):
    """Fields that both endpoints share."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str = Field(description="A name from /v1/models.")
    max_tokens: int | None = Field(None, description="New tokens at most.")
    temperature: float | None = Field(None, description="0 is greedy.")
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 keeps all tokens (as in vLLM).")
    min_p: float | None = Field(None, description="As in vLLM.")
    repetition_penalty: float | None = Field(None, description="As in vLLM.")
    n: int | None = Field(None, description="Completions; sample j is drawn with seed + j.")
    stop: str | list[str] | None = None
    seed: int | None = Field(None, description="The same seed gives the same text.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Taken and not used.")
    alignment: dict[str, Any] | None = Field(
        None,
        description="A method and its fields, for example "
        '{"method": "linear-alignment", "principle": "Talk like a pirate.", "ratio": 2}.',
    )
    vllm_xargs: dict[str, Any] | None = Field(None, description="The same fields as `alignment`.")
    trace: bool | None = Field(
        None, description="Return what the method changed at each token: KL, flips, alternatives."
    )

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, body: Any) -> Any:
        """Drop fields that ask for nothing; refuse those without a counterpart by name."""
        if not isinstance(body, dict):
            return body
        kept = {}
        for name, value in body.items():
            if name not in NEUTRAL or name in cls.model_fields:
                kept[name] = value
            elif value is not None and value not in NEUTRAL[name]:
                raise ValueError(f"`{name}` has no counterpart here. Leave it out.")
        return kept

    @property
    def fields_of_method(self) -> dict[str, Any] | None:
        """What the client says of the method; None where it says nothing."""
        if self.alignment is not None and self.vllm_xargs is not None:
            raise ConfigError("Give `alignment` or `vllm_xargs`, not both.")
        return self.alignment if self.alignment is not None else self.vllm_xargs


class ChatBody(Body):
    """The body of `/v1/chat/completions`."""

    model_config = ConfigDict(json_schema_extra={"examples": [CHAT]})
    messages: list[ChatMessage]
    max_completion_tokens: int | None = Field(None, description="New tokens at most.")
    logprobs: bool | None = Field(None, description="Of the distribution that was drawn from.")
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def top(self) -> int | None:
        """How many alternatives to return; None for no log-probabilities at all."""
        if self.top_logprobs and not self.logprobs:
            raise ConfigError("`top_logprobs` needs `logprobs` true.")
        return (self.top_logprobs or 0) if self.logprobs else None


class TextBody(Body):
    """The body of `/v1/completions`: text as it is, with no chat template."""

    model_config = ConfigDict(json_schema_extra={"examples": [TEXT]})
    prompt: str | list[str]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def top(self) -> int | None:
        """How many alternatives to return; None for no log-probabilities at all."""
        return self.logprobs


def first_error(errors: Sequence[Any]) -> tuple[str, str]:
    """Return (message, field) of what pydantic found wrong with a body, the first thing."""
    # A message may be text or parts; of parts that are none, say what they are.
    found = next((e for e in errors if e["loc"][-1] == "type"), errors[0])
    marks = ("body", "str", "list[", "Part")  # of a union's members, no field of the body
    place = [str(part) for part in found["loc"] if not str(part).startswith(marks)]
    name = ".".join(place) or "body"
    if found["type"] == "json_invalid":
        return f"The body is no JSON: {found['ctx']['error']}.", "body"
    if name == "body" and isinstance(found["input"], bytes):
        return "The body must be sent as JSON, with `Content-Type: application/json`.", name
    if found["type"] == "extra_forbidden":
        return f"Unknown field `{name}`. Leave it out.", name
    if found["type"] == "missing":
        return f"`{name}` is missing.", name
    if found["type"] == "value_error":
        return str(found["msg"]).removeprefix("Value error, "), name
    if place[-1:] == ["type"] and found["type"] == "literal_error":
        return f"`{name}`: only parts of text are taken, got {shown(found['input'])}.", name
    return f"`{name}`: {_lower(found['msg'])}, got {shown(found['input'])}.", name


def shown(value: Any) -> str:
    """Return a value of a body, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def check_texts(texts: list[str]) -> None:
    """Raise `DataError` for a list of prompts without one, or with one that is empty."""
    if not texts:
        raise DataError("`prompt` is an empty list. Give a text.")
    if any(not text for text in texts):
        raise DataError("`prompt` is empty. Give it some text.")
