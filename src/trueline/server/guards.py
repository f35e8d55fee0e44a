"""Before a request is read: how large it may be, and whose key it carries."""

from __future__ import annotations

import json
from typing import Any

from trueline.server.config import ServeConfig

GUARDED = "/v1/"
"""Paths that need a key where the server has any."""


class TooLarge(Exception):
    """A body is longer than the server takes."""


def error_object(message: str, kind: str, code: str | None = None, param: str | None = None) -> Any:
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guards:
    """ASGI middleware: 401 without a key, 413 for a body that is too large.

    A body without a length is counted as it comes; what is past the limit is never kept.
    """

    def __init__(self, app: Any, config: ServeConfig) -> None:
        self.app, self.config = app, config

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["path"].startswith(GUARDED) and scope["method"] != "OPTIONS":
            kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            if not self.config.admits(key.strip() if kind.lower() == "bearer" else None):
                message = "No valid API key. Send it as `Authorization: Bearer KEY`."
                await _answer(
                    send, 401, error_object(message, "authentication_error", "invalid_api_key")
                )
                return
        limit, read, started = self.config.max_body, 0, False
        message = f"The body is larger than {limit} bytes. Send less, or raise --max-body."
        too_large = error_object(message, "invalid_request_error", "body_too_large")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            await _answer(send, 413, too_large)
            return

        async def counted() -> Any:
            nonlocal read
            event = await receive()
            read += len(event.get("body", b""))
            if read > limit:
                raise TooLarge
            return event

        async def noted(event: Any) -> None:
            nonlocal started
            started = True
            await send(event)

        try:
            await self.app(scope, counted, noted)
        except TooLarge:
            if not started:
                await _answer(send, 413, too_large)


async def _answer(send: Any, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status in (401, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
