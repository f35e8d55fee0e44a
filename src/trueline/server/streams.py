"""Streams of a request: what the engine says of it, and what its client is sent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from fastapi.responses import Response

if TYPE_CHECKING:
    from fastapi import Request

    from trueline.server.engine_loop import Told

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Inbox:
    """What the engine said of a request and nobody has read yet.

    Args:
        at_once: Whether the reader wakes at each token, or when a completion has ended.
    """

    def __init__(self, at_once: bool) -> None:
        self._at_once = at_once
        self._news: list[tuple[int, Told | Exception]] = []
        self._some = asyncio.Event()

    def put(self, place: int, told: Told | Exception) -> None:
        """Add a token of the prompt at that place, or why there are no more."""
        self._news.append((place, told))
        if self._at_once or isinstance(told, Exception) or told.finish_reason is not None:
            self._some.set()

    async def take(self) -> list[tuple[int, Told | Exception]]:
        """Return what is there, at least something."""
        await self._some.wait()
        self._some.clear()
        news, self._news = self._news, []
        return news


class Gone(Exception):
    """The client has gone."""


class EventStream(Response):
    """Server-sent events, one write for what is there together; ends early when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str]) -> None:
        self.status_code, self.background, self._events = 200, None, events
        self.init_headers(HEADERS)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:
            with contextlib.suppress(Gone):
                async for text in events:
                    body = text.encode()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})


async def tell_when_gone(request: Request, inbox: Inbox) -> None:
    """Put `Gone` into the inbox when the client goes away; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    inbox.put(0, Gone())
