"""How orders reach the engine and news comes back: over a thread, or to another process.

    ThreadLink    the engine in a thread of this process: for a model that is loaded here
    PipeLink      the engine in the process at the other end of a socket, `serve_orders` there:
                  HTTP and the model then share no interpreter, and each has a core

Both are opened and closed in the event loop of the requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import queue
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from trueline.server.engine_loop import EngineLoop, News, Order, Stop, new_backend

if TYPE_CHECKING:
    from trueline.engine.torch_backend import TorchBackend
    from trueline.models.load import LanguageModel
    from trueline.server.config import ServeConfig

HEAD = struct.Struct("!I")
"""Length of the pickled message that follows."""
READ = 1 << 20


class Link(Protocol):
    """A way to an engine."""

    async def open(self, take: Callable[[News], None]) -> Callable[[Order], None]:
        """Begin; `take` is called in the event loop. Returns what gives an order."""

    async def close(self) -> None:
        """End the engine after the step under way, and wait for its last news."""


class ThreadLink:
    """The engine in a thread of its own."""

    def __init__(self, model: LanguageModel, config: ServeConfig) -> None:
        self.backend = new_backend(model, config)
        self._orders = queue.SimpleQueue[Order]()

    async def open(self, take: Callable[[News], None]) -> Callable[[Order], None]:
        """Start the thread."""
        loop = asyncio.get_running_loop()

        def tell(news: News) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(take, news)

        engine = EngineLoop(self.backend, self._waiting, tell)
        self._thread = threading.Thread(target=engine.run, name="trueline-engine", daemon=True)
        self._thread.start()
        return self._orders.put

    async def close(self) -> None:
        """Stop the thread."""
        self._orders.put(Stop())
        await asyncio.to_thread(self._thread.join)

    def _waiting(self, block: bool) -> list[Order]:
        orders = [self._orders.get()] if block else []
        with contextlib.suppress(queue.Empty):
            while True:
                orders.append(self._orders.get_nowait())
        return orders


class Messages:
    """Bytes, as they come, to the messages in them."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield the messages that are whole with this data."""
        held = self._bytes
        held += data
        while len(held) >= HEAD.size:
            end = HEAD.size + HEAD.unpack_from(held)[0]
            if len(held) < end:
                return
            message = pickle.loads(held[HEAD.size : end])
            del held[:end]
            yield message


def can_be_sent(config: ServeConfig) -> bool:
    """Return whether the methods of a server can go to another process."""
    methods = [config.method, *(preset.method for preset in config.presets.values())]
    try:
        pickle.loads(pickle.dumps(methods))
    except (pickle.PickleError, AttributeError, TypeError):  # of a class that has no place
        return False
    return True


def packed(message: object) -> bytes:
    """Return a message with its length in front."""
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEAD.pack(len(content)) + content


class PipeLink(asyncio.Protocol):
    """The engine in another process, at the other end of a connected socket.

    `lost` is called when that process has gone without a word.
    """

    def __init__(self, own: socket.socket, lost: Callable[[], None]) -> None:
        self._socket, self._lost = own, lost
        self._messages = Messages()
        self._closed = asyncio.Event()
        self._ended = False

    async def open(self, take: Callable[[News], None]) -> Callable[[Order], None]:
        """Listen to the socket."""
        self._take = take
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_connection(lambda: self, sock=self._socket)
        return lambda order: self._transport.write(packed(order))

    def data_received(self, data: bytes) -> None:
        """Take news."""
        for news in self._messages.feed(data):
            self._ended |= news.ended is not None
            self._take(news)

    def connection_lost(self, exc: Exception | None) -> None:
        """See that nobody is at the other end."""
        self._closed.set()
        if not self._ended:
            self._lost()

    async def close(self) -> None:
        """Ask the engine to stop, and wait until its end is closed."""
        if not self._transport.is_closing():
            self._transport.write(packed(Stop()))
            await self._closed.wait()


def serve_orders(backend: TorchBackend, own: socket.socket) -> None:
    """Run the engine for whoever is at the other end of a socket, until told to stop."""
    messages = Messages()

    def orders(block: bool) -> list[Order]:
        found: list[Order] = []
        while True:
            try:
                data = own.recv(READ, 0 if block and not found else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return found
            except OSError:
                data = b""
            if not data:
                raise EOFError
            found += messages.feed(data)

    def tell(news: News) -> None:
        try:
            own.sendall(packed(news))
        except OSError:
            raise EOFError from None

    EngineLoop(backend, orders, tell).run()
