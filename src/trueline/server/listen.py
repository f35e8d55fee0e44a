"""Listening: uvicorn around the application, until the process is told to end."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from trueline.errors import ConfigError
from trueline.server.config import ServeConfig

try:
    import uvicorn

    from trueline.server.app import build_app
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"Serving needs the package {missing.name}. Install: pip install 'trueline[serve]'"
    ) from missing

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

GRACE = 60
"""Seconds that requests under way may still take when the server is told to end."""


def reserve(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address, before a model is loaded for it.

    Raises `ConfigError` if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # With the protocol named asyncio sends every token at once, without Nagle's wait.
        own = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise ConfigError(f"Cannot listen at {host}: {error.strerror or error}.") from None
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((host, port))
        own.listen(1)  # held against others from here on
    except (OSError, ValueError) as error:  # a name that no host can have is a ValueError
        own.close()
        reason = getattr(error, "strerror", None) or "no host has this name"
        raise ConfigError(f"Cannot listen at {host!r}, port {port}: {reason}.") from None
    return own


def listen(model: LanguageModel, config: ServeConfig, own: socket.socket) -> None:
    """Serve at a socket until SIGINT or SIGTERM; what runs by then is finished."""
    own.listen(2048)  # who comes before the first turn of the loop waits
    host, port = own.getsockname()[:2]
    print(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", flush=True)
    settings = uvicorn.Config(
        build_app(model, config),
        log_level="warning",
        access_log=False,  # no user's text in a log, nor who asked
        timeout_graceful_shutdown=GRACE,
        h11_max_incomplete_event_size=1 << 16,
    )
    uvicorn.Server(settings).run(sockets=[own])
