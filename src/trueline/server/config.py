"""What an operator decides: who may ask, how much, under which method."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from trueline.errors import ConfigError, DataError, check_number, suggestion
from trueline.methods import make_method
from trueline.records.lines import BOM, read_input
from trueline.types import Method, SamplingParams

Overrides = Literal["anything", "settings", "presets", "nothing"]
KEYS_VARIABLE = "TRUELINE_API_KEYS"
"""Environment variable with API keys, separated by commas or line breaks."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What a preset may be called: it becomes part of a model's name."""


@dataclass(frozen=True)
class Preset:
    """A method and sampling settings under a name of their own."""

    method: Method
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ServeConfig:
    """Limits and defaults of a server. Sizes are of one request unless they say otherwise."""

    name: str = "tiny"
    """What the model is called in `/v1/models`."""
    method: Method | None = None
    """For requests that name none; plain decoding by default."""
    presets: Mapping[str, Preset] = field(default_factory=dict)
    """Offered as models `NAME:PRESET`, for clients that cannot send further fields."""
    overrides: Overrides | None = None
    """What a client may choose: any method; the settings of the server's own method; a preset; or
    nothing. By default anything where the server has no method of its own, else a preset."""
    temperature: float = 1.0
    """For requests that give none, as in OpenAI's interface; 0 is greedy."""
    max_tokens: int = 1024
    """New tokens at most; also what a request gets that names no number."""
    max_prompt_tokens: int = 16_384
    """Tokens of the longest branch's prompt at most."""
    max_branches: int = 8
    """Prompt branches times samples (`n`) at most."""
    max_body: int = 1 << 20
    """Bytes of a body at most."""
    max_running: int = 32
    """Requests decoded together at most."""
    max_waiting: int = 256
    """Requests that wait at most; past it a client gets 429 and Retry-After."""
    timeout: float = 600.0
    """Seconds that a request may take, waiting included."""
    keys: tuple[str, ...] = ()
    """API keys; none lets everybody in."""
    cors_origins: tuple[str, ...] = ()
    """Web origins that may call the server from a browser; none by default."""

    runs: str | Path | None = None
    """Folder of runs that the page draws."""

    def __post_init__(self) -> None:
        if self.runs is not None and not Path(self.runs).expanduser().is_dir():
            raise ConfigError(f'`runs` must be a folder, got "{self.runs}".')
        if self.overrides not in (None, *get_args(Overrides)):
            known = get_args(Overrides)
            hint = suggestion(str(self.overrides), known)
            raise ConfigError(f'Unknown `overrides` "{self.overrides}".{hint}')
        check_number("temperature", self.temperature, low=0)
        for name in ("max_tokens", "max_prompt_tokens", "max_branches", "max_body", "max_running"):
            check_number(name, getattr(self, name), low=1, whole=True)
        check_number("max_waiting", self.max_waiting, low=0, whole=True)
        check_number("timeout", self.timeout, low=0, low_open=True)

    @property
    def allowed(self) -> Overrides:
        """What a client may choose."""
        return self.overrides or ("anything" if self.method is None else "presets")

    def admits(self, key: str | None) -> bool:
        """Return whether `key` is one of the server's; takes as long for every key."""
        if not self.keys:
            return True
        asked = hashlib.sha256((key or "").encode()).digest()
        known = [hashlib.sha256(own.encode()).digest() for own in self.keys]
        return sum(hmac.compare_digest(asked, own) for own in known) > 0  # all are compared


def read_keys(path: str | Path | None) -> tuple[str, ...]:
    """Return the API keys of a file, one a line, and of the environment (`TRUELINE_API_KEYS`).

    Raises `DataError` for a file that cannot be read, `ConfigError` for one that holds none and for
    a key with blanks.
    """
    found = re.split(r"[,\r\n]+", os.environ.get(KEYS_VARIABLE, ""))
    if path is not None:
        lines = _text(path).splitlines()
        lines = [line for line in lines if line.strip() and not line.startswith("#")]
        if not lines:
            raise ConfigError(f'"{path}" holds no API key. Write one a line.')
        found += lines
    keys = tuple(dict.fromkeys(key.strip() for key in found if key.strip()))
    if any(re.search(r"\s", key) or not key.isascii() for key in keys):
        raise ConfigError("An API key holds blanks or characters that are not ASCII.")
    return keys


def read_presets(path: str | Path) -> dict[str, Preset]:
    """Return the presets of a TOML file, a table each.

        [pirate]
        method = "linear-alignment"
        principle = "Talk like a pirate."
        ratio = 2
        sampling = { temperature = 0.7 }

    Raises `DataError` for what is no preset, naming the file and the table.
    """
    try:
        tables = tomllib.loads(_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from None
    if not tables:
        raise DataError(f"{path}: holds no preset. Write a table each, such as [pirate].")
    presets = {}
    for name, table in tables.items():
        if not isinstance(table, dict) or not NAME.fullmatch(name):
            raise DataError(
                f"{path}: [{name}] is no preset: a table whose name holds letters, digits, dots, "
                "dashes and underscores."
            )
        sampling = table.pop("sampling", {})
        try:
            known = SamplingParams.__dataclass_fields__
            if not isinstance(sampling, dict) or (odd := sampling.keys() - known):
                odd = odd if isinstance(sampling, dict) else {str(sampling)}
                raise ConfigError(f"Unknown in `sampling`: {', '.join(sorted(odd))}.")
            SamplingParams(**sampling)
            presets[name] = Preset(method_of(table), sampling)
        except (ConfigError, TypeError) as error:
            raise DataError(f"{path}: [{name}]: {error}") from None
    return presets


def _text(path: str | Path) -> str:
    """Return what a file holds; `DataError` where it is missing, a device, or not UTF-8."""
    try:
        return read_input(Path(path).expanduser()).removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8. Save it as UTF-8.") from None


def method_of(fields: Mapping[str, Any]) -> Method:
    """Return the method that a table names: `method` (or its class) and its fields, a principle
    alone means Linear Alignment.

    Raises `ConfigError` for an unknown name or field, or a value out of range.
    """
    fields = dict(fields)
    name = fields.pop("method", "linear-alignment" if "principle" in fields else "plain")
    if not isinstance(name, (str, type)):
        raise ConfigError(f"`method` must be a name, got {name!r}.")
    if isinstance(pairs := fields.get("principles"), list):
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise ConfigError("`principles` must be a list of [text, weight].")
        fields["principles"] = tuple((text, weight) for text, weight in pairs)
    return make_method(name, fields)
