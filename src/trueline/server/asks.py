"""From a body to requests of the engine: names, methods, limits, and who may choose what."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError, DataError, suggestion
from trueline.methods import METHODS, Plain, method_values
from trueline.server.bodies import Body, ChatBody, TextBody, check_texts
from trueline.server.config import ServeConfig, method_of
from trueline.types import Method, Request, SamplingParams

if TYPE_CHECKING:
    from trueline.server.config import Preset

MAX_STOPS = 16


class UnknownModel(ConfigError):
    """A model that the server does not have."""


@dataclass(frozen=True)
class Ask:
    """What a client wants, checked."""

    requests: list[Request]
    model: str
    top: int | None
    traced: bool
    stream: bool
    include_usage: bool


def read_ask(body: ChatBody | TextBody, config: ServeConfig, adapters: Sequence[str] = ()) -> Ask:
    """Return what the body asks for; `adapters` are the names of those that the model has.

    Raises:
        UnknownModel: No such model, preset or adapter.
        ConfigError: A setting is out of range, or not for the client to choose.
        DataError: The prompt cannot be used.
    """
    adapter, preset = find_named(body.model, config, adapters)
    method = method_for(body.fields_of_method, preset, config)
    sampling = sampling_for(body, preset.sampling if preset else {}, config)
    if body.stream_options is not None and not body.stream:
        raise ConfigError("`stream_options` needs `stream` true.")
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"`seed` must be a whole number of 64 bits, got {seed}.")
    if isinstance(body, ChatBody):
        chats: list[Any] = [[m.plain() for m in body.messages]]
    else:
        chats = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
        check_texts(chats)
    if len(chats) * sampling.n > config.max_branches:
        raise ConfigError(
            f"{len(chats)} prompts times `n` {sampling.n} are more completions than the "
            f"{config.max_branches} branches that one request may have."
        )
    return Ask(
        requests=[Request(chat, method, sampling, seed, adapter) for chat in chats],
        model=body.model,
        top=body.top,
        traced=bool(body.trace),
        stream=bool(body.stream),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def find_named(
    name: str, config: ServeConfig, adapters: Sequence[str] = ()
) -> tuple[str | None, Preset | None]:
    """Return the adapter and the preset in a model's name, None each where there is none."""
    base, colon, preset = name.rpartition(":")
    if name in (config.name, *adapters):
        base, colon = name, ""
    known = base in (config.name, *adapters) and (not colon or preset in config.presets)
    if not known:
        names = model_names(config, adapters)
        raise UnknownModel(f'Unknown model "{name}".{suggestion(name, names)}')
    return (base if base != config.name else None, config.presets[preset] if colon else None)


def model_names(config: ServeConfig, adapters: Sequence[str] = ()) -> list[str]:
    """Return what a client may call the model: its name and each adapter's, with each preset."""
    names = [config.name, *adapters]
    return [*names, *(f"{name}:{preset}" for name in names for preset in config.presets)]


def method_for(
    fields: Mapping[str, Any] | None, preset: Preset | None, config: ServeConfig
) -> Method:
    """Return the method of a request, as far as the operator lets clients choose.

    Raises `ConfigError` for fields that the client may not give, or that make no method.
    """
    allowed = config.allowed
    if preset is not None and allowed == "nothing":
        raise ConfigError("The server's method is fixed; its presets are not for clients.")
    own = preset.method if preset is not None else config.method
    if not fields:
        return own or Plain()
    if allowed in ("presets", "nothing"):
        more = " Ask for one of the models in /v1/models." if config.presets else ""
        raise ConfigError(f"The server's method is fixed; `alignment` is not for clients.{more}")
    name = fields.get("method", own.name if own is not None else None)
    if own is None or name != own.name:
        if allowed == "settings" and own is not None:
            raise ConfigError(
                f'The server\'s method is "{own.name}", and clients may change its settings only.'
            )
        if isinstance(name, str) and name not in METHODS:  # no code that a client names is run
            raise ConfigError(f'Unknown method "{name}".{suggestion(name, METHODS)}')
        return method_of(fields)
    given = {k: v for k, v in fields.items() if k != "method"}
    return method_of({"method": type(own), **method_values(own), **given})


def sampling_for(body: Body, held: Mapping[str, Any], config: ServeConfig) -> SamplingParams:
    """Return the sampling settings of a request: the body's, then the preset's, then ours.

    Raises `ConfigError` for a value out of range.
    """
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    limits = [body.max_tokens, getattr(body, "max_completion_tokens", None)]
    if None not in limits and len(set(limits)) > 1:
        raise ConfigError("Give `max_tokens` or `max_completion_tokens`, not both.")
    for name, value in zip(("max_tokens", "max_completion_tokens"), limits, strict=True):
        if value is None:
            continue
        if not 1 <= value <= config.max_tokens:
            raise ConfigError(
                f"`{name}` must be a whole number in [1, {config.max_tokens}], got {value}."
            )
        given["max_new_tokens"] = value
    if body.stop is not None:
        stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
        if len(stops) > MAX_STOPS:
            raise ConfigError(f"`stop` may hold {MAX_STOPS} strings, got {len(stops)}.")
        given["stop"] = stops
    base = {"temperature": config.temperature, "max_new_tokens": config.max_tokens}
    return SamplingParams(**{**base, **held, **given})


def check_size(branches: list[list[list[int]]], samples: int, config: ServeConfig) -> None:
    """Raise for prompts of more tokens, or more branches, than the server takes."""
    rows = sum(map(len, branches)) * samples
    if rows > config.max_branches:
        raise ConfigError(
            f"The request has {rows} branches (prompts of its method times samples), and the "
            f"server takes {config.max_branches}. Ask for fewer samples (`n`)."
        )
    longest = max(len(ids) for prompt in branches for ids in prompt)
    if longest > config.max_prompt_tokens:
        raise DataError(
            f"The prompt has {longest} tokens in its longest branch, and the server takes "
            f"{config.max_prompt_tokens}. Shorten it."
        )
