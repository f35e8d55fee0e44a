"""Clients that cost little beside a server on the same machine: raw sockets, read as they come.

What came is only stamped and kept while the clock runs; it is parsed when the run is over.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

END = b"0\r\n\r\n"
"""The last chunk of a body that is sent in chunks."""

Body = Callable[[int], dict[str, Any]]
"""The body of the request of that number."""


@dataclass
class Reply:
    """What came for one request."""

    began: float
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    """When bytes came, in seconds, and the bytes."""

    def read(self) -> dict[str, Any]:
        """Return its text and times, or an error."""
        raw = b"".join(data for _, data in self.pieces)
        if not raw.startswith(b"HTTP/1.1 200") or not raw.endswith(END):
            return {"error": raw[:60].decode(errors="replace")}
        text, times, begun = "", [], False
        for when, data in self.pieces:
            count = data.count(b"data: {")
            times += [when] * count
        for line in raw.split(b"\n"):
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text += choice["delta"]["content"]
                begun = True
        if not begun:
            return {"error": "no token"}
        return {
            "text": text,
            "first": times[0] - self.began,
            "steps": [b - a for a, b in itertools.pairwise(times)],
        }


class Client(asyncio.Protocol):
    """One connection: a request, its reply, the next."""

    def __init__(self) -> None:
        self._reply: Reply | None = None
        self._done: asyncio.Future[Reply] | None = None

    @classmethod
    async def connect(cls, address: str) -> Client:
        """Open a connection to `http://host:port`."""
        host, _, port = address.removeprefix("http://").rpartition(":")
        _, client = await asyncio.get_running_loop().create_connection(cls, host, int(port))
        return client

    def connection_made(self, transport: Any) -> None:
        """Keep the way out."""
        self._transport = transport

    async def ask(self, body: dict[str, Any]) -> Reply:
        """Send a request and wait until its reply is whole, or the connection gone."""
        content = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: benchmark\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self._done = asyncio.get_running_loop().create_future()
        self._reply = Reply(time.perf_counter())
        self._transport.write(head.encode() + content)
        return await self._done

    def data_received(self, data: bytes) -> None:
        """Stamp what came."""
        assert self._reply is not None
        self._reply.pieces.append((time.perf_counter(), data))
        if data.endswith(END) or not self._reply.pieces[0][1].startswith(b"HTTP/1.1 200"):
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back what there is."""
        self._finish()

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done() and self._reply is not None:
            self._done.set_result(self._reply)


async def closed(
    address: str, body: Body, clients: int, seconds: float
) -> tuple[dict[int, Reply], float]:
    """Let `clients` ask one after the other until the time is up; return replies and seconds."""
    replies: dict[int, Reply] = {}
    numbers = itertools.count()
    open_ones = [await Client.connect(address) for _ in range(clients)]
    began = time.perf_counter()

    async def one(client: Client) -> None:
        while time.perf_counter() - began < seconds:
            number = next(numbers)
            replies[number] = await client.ask(body(number))

    await asyncio.gather(*map(one, open_ones))
    took = time.perf_counter() - began
    for client in open_ones:
        client.close()
    return replies, took


async def poisson(
    address: str, body: Body, rate: float, seconds: float
) -> tuple[dict[int, Reply], float]:
    """Let requests arrive at random, `rate` a second; return replies and seconds."""
    replies: dict[int, Reply] = {}
    waits, tasks, free = random.Random(0), [], list[Client]()
    numbers = itertools.count()
    began = time.perf_counter()

    async def one(number: int) -> None:
        client = free.pop() if free else await Client.connect(address)
        replies[number] = await client.ask(body(number))
        free.append(client)

    while time.perf_counter() - began < seconds:
        tasks.append(asyncio.create_task(one(next(numbers))))
        await asyncio.sleep(waits.expovariate(rate))
    await asyncio.gather(*tasks)
    took = time.perf_counter() - began
    for client in free:
        client.close()
    return replies, took


def summary(label: str, replies: dict[int, Reply], took: float) -> dict[str, Any]:
    """Return the numbers of a run."""
    answers = {number: reply.read() for number, reply in replies.items()}
    fine = {n: a for n, a in answers.items() if "error" not in a}
    firsts = [a["first"] for a in fine.values()]
    steps = [s for a in fine.values() for s in a["steps"]]
    return {
        "label": label,
        "requests": len(answers),
        "lost": len(answers) - len(fine),
        "requests_per_second": len(fine) / took,
        "first_ms": [1000 * quantile(firsts, q) for q in (0.5, 0.99)],
        "step_ms": [1000 * quantile(steps, q) for q in (0.5, 0.99)],
        "texts": {n: a["text"] for n, a in fine.items()},
    }


def quantile(values: list[float], q: float) -> float:
    """Return a quantile of measured values."""
    return statistics.quantiles(values, n=100)[round(100 * q) - 1] if len(values) > 1 else values[0]
