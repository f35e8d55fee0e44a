"""Endpoint: a client of any OpenAI-compatible server, for judges.

Answers are cached on disk, one JSON line each, keyed by a hash of the model, the options and the
messages (so of rubric and text): a run that was killed asks only for what is missing. Requests run
in threads; 429, 5xx, timeouts and broken connections are tried again with exponential backoff. No
redirect is followed, since the key would go with it, and no key that the address or the environment
holds is written down, not even where a server repeats it.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueline.errors import ConfigError, DataError, ModelError, check_number
from trueline.records.disk import make_folder
from trueline.records.lines import LineFile, append_row
from trueline.types import Message

LONGEST_WAIT = 60.0
"""Seconds between two tries at most, whatever the server asks for."""
HIDDEN = "***"
SHORTEST_SECRET = 4
"""Shorter values of an address are not looked for in answers: they would be words of the text."""


@dataclass
class Usage:
    """What was asked and what it cost."""

    calls: int = 0
    """Requests that were answered by the server."""
    cached: int = 0
    """Requests that were answered from the cache."""
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    """Answers that came without token counts: the cost leaves them out."""
    cost: float | None = None
    """In the unit of the prices; None without prices."""


class _TryAgainError(Exception):
    """A failure that may pass; `wait` is what the server asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """Follow none: a redirect is then an HTTPError."""


@dataclass
class Endpoint:
    """POST {base_url}/chat/completions, cached, retried, concurrent, counted.

    >>> endpoint = Endpoint("https://api.openai.com/v1", "gpt-4o-mini", cache="judge.jsonl")
    >>> endpoint.ask([[{"role": "user", "content": "Hello!"}]])
    """

    base_url: str
    """Up to and with /v1."""
    model: str
    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; unset sends none, as local servers want it."""
    cache: str | Path | None = None
    """JSONL file of answers; read at the start, appended to."""
    concurrency: int = 8
    """Requests under way at once."""
    retries: int = 5
    """How often one request is tried again."""
    backoff: float = 1.0
    """Seconds before the first retry; doubled each time, up to a minute."""
    timeout: float = 60.0
    """Seconds for one try."""
    options: Mapping[str, Any] = field(
        default_factory=lambda: {"temperature": 0, "max_tokens": 128}
    )
    """Further fields of the request body, e.g. `max_completion_tokens` for reasoning models."""
    prompt_price: float | None = None
    """Price of a million prompt tokens."""
    completion_price: float | None = None
    """Price of a million completion tokens."""
    usage: Usage = field(default_factory=Usage, init=False)

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"`base_url` must start with http:// or https://, got {redacted(self.base_url)!r}."
            )
        try:
            parts = urllib.parse.urlsplit(self.base_url)
            usable = bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable or not self.base_url.isprintable() or " " in self.base_url:
            raise ConfigError(f"`base_url` is no address: {redacted(self.base_url)!r}.")
        if "@" in parts.netloc:
            raise ConfigError(
                f"`base_url` holds a user or a password: {redacted(self.base_url)!r}. Give the key "
                f"in the environment variable {self.key_variable}."
            )
        check_number("concurrency", self.concurrency, low=1, whole=True)
        check_number("retries", self.retries, low=0, whole=True)
        check_number("backoff", self.backoff, low=0)
        check_number("timeout", self.timeout, low=0, low_open=True)
        for name in ("prompt_price", "completion_price"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0)
        self.shown = redacted(self.base_url)
        """The address without its secrets, for messages and files."""
        self._secrets = secrets_of(self.base_url, os.environ.get(self.key_variable))
        self._opener = urllib.request.build_opener(_NoRedirect())
        self._lock = threading.Lock()
        self._rows = read_cache(Path(self.cache)) if self.cache is not None else {}

    def ask(self, chats: Sequence[Sequence[Message]]) -> list[str]:
        """Return the answer to each chat, in order; equal chats are asked once.

        Raises:
            ModelError: The server refuses a request, or fails more often than `retries`. Answers
                that came before are in the cache.
        """
        keys = [self._key(chat) for chat in chats]
        missing = {k: c for k, c in zip(keys, chats, strict=True) if k not in self._rows}
        self.usage.cached += sum(key not in missing for key in keys)
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._answer, key, chat) for key, chat in missing.items()]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [self._rows[key]["answer"] for key in keys]

    def spent(self) -> dict[str, Any]:
        """Return what all answers at hand cost, those of runs that were killed with them.

        `requests`, `prompt_tokens`, `completion_tokens`, `uncounted` (answers without counts of
        tokens) and `cost` in the unit of the prices, None without prices.
        """
        names = ("prompt_tokens", "completion_tokens")
        rows = list(self._rows.values())
        total = {name: sum(row.get(name, 0) for row in rows) for name in names}
        return {
            "requests": len(rows),
            **total,
            "uncounted": sum(not any(row.get(name) for name in names) for row in rows),
            "cost": self._cost(*total.values()),
        }

    def _cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        if self.prompt_price is None and self.completion_price is None:
            return None
        prices = (self.prompt_price or 0.0, self.completion_price or 0.0)
        return (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6

    def _key(self, chat: Sequence[Message]) -> str:
        content = [self.model, dict(self.options), [dict(m) for m in chat]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _answer(self, key: str, chat: Sequence[Message]) -> None:
        body = {"model": self.model, "messages": list(chat), **self.options}
        for attempt in range(self.retries + 1):
            try:
                reply = self._post(body)
                text = hide(_content(reply), self._secrets)
                break
            except _TryAgainError as error:
                if attempt == self.retries:
                    raise ModelError(
                        f"The judge at {self.shown} failed {attempt + 1} times: {error}. "
                        "Run again later; with a cache only what is missing is asked."
                    ) from None
                with self._lock:
                    self.usage.retries += 1
                time.sleep(min(max(self.backoff * 2**attempt, error.wait), LONGEST_WAIT))
        self._keep(key, text, reply.get("usage"))

    def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "User-Agent": "trueline"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        parts = urllib.parse.urlsplit(self.base_url)
        url = parts._replace(path=parts.path.rstrip("/") + "/chat/completions").geturl()
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
            with self._opener.open(request, timeout=self.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = hide(f"{type(error).__name__}: {error}", self._secrets)
            raise _TryAgainError(reason) from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """Return what a status other than 200 means: to be tried again, or not."""
        detail = " ".join(error.read().decode("utf-8", "replace").split())[:300]
        reason = hide(f"{error.code} {error.reason}: {detail}", self._secrets)
        if error.code in (408, 409, 429) or error.code >= 500:
            return _TryAgainError(reason, _seconds(error.headers.get("Retry-After")))
        hint = f" Set {self.key_variable}." if error.code in (401, 403) else ""
        if error.code in (301, 302, 303, 307, 308):
            place = redacted(str(error.headers.get("Location") or "nowhere"))
            hint = f" It points to {place}; no redirect is followed. Give the address itself."
        return ModelError(f"The judge at {self.shown} answered {reason}.{hint}")

    def _keep(self, key: str, text: str, usage: Any) -> None:
        counts = usage if isinstance(usage, Mapping) else {}
        tokens = [int(counts.get(k) or 0) for k in ("prompt_tokens", "completion_tokens")]
        row: dict[str, Any] = {"key": key, "model": self.model, "answer": text}
        row |= {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
        with self._lock:
            self._rows[key] = row
            used = self.usage
            used.calls += 1
            used.uncounted += not counts
            used.prompt_tokens += tokens[0]
            used.completion_tokens += tokens[1]
            used.cost = self._cost(used.prompt_tokens, used.completion_tokens)
            if self.cache is not None:
                append_row(Path(self.cache), row)


def redacted(url: str) -> str:
    """Return an address without the secrets in it: user, password, and values of its query."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return HIDDEN
    host = parts.netloc.rpartition("@")
    names = [pair.partition("=") for pair in parts.query.split("&") if pair]
    query = "&".join(f"{name}={HIDDEN}" if sign else HIDDEN for name, sign, _ in names)
    netloc = f"{HIDDEN}@{host[2]}" if host[1] else parts.netloc
    return parts._replace(netloc=netloc, query=query, fragment="").geturl()


def secrets_of(url: str, key: str | None = None) -> tuple[str, ...]:
    """Return what must not be written down: the key, and what `redacted` hides; longest first."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return ()
    user = parts.netloc.rpartition("@")[0]
    values = [pair.rpartition("=")[2] for pair in parts.query.split("&")]
    found = {key or "", user, user.partition(":")[2], *values}
    found |= {urllib.parse.unquote_plus(value) for value in found}
    return tuple(sorted((v for v in found if len(v) >= SHORTEST_SECRET), key=len, reverse=True))


def hide(text: str, secrets: Sequence[str]) -> str:
    """Return the text with every secret in it hidden."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def read_cache(path: Path) -> dict[str, dict[str, Any]]:
    """Return key -> row with the `answer`.

    A last line that a killed run left unfinished is cut off the file.
    """
    if not path.exists():
        make_folder(path.parent)
        return {}
    rows: dict[str, dict[str, Any]] = {}
    end = 0
    with contextlib.closing(LineFile(path)) as file:
        for line, place, row in file.rows():
            if not isinstance(row.get("key"), str) or not isinstance(row.get("answer"), str):
                raise DataError(f"{path}:{line}: not a line of a judge's cache. Delete it.")
            rows[row["key"]], end = row, place
        file.cut(end)
    return rows


def _content(reply: Any) -> str:
    """Return the text of a reply; an empty one where the server filtered it."""
    try:
        return str(reply["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError):
        raise _TryAgainError(f"not a chat completion: {json.dumps(reply)[:200]}") from None


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0
