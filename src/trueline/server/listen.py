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


def listen(model: LanguageModel, config: ServeConfig, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; what runs by then is finished.

    Raises `ConfigError` if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    own = socket.socket(family, socket.SOCK_STREAM)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((host, port))
        own.listen(2048)  # who comes before the first turn of the loop waits
    except OSError as error:
        raise ConfigError(f"Cannot listen at {host}:{port}: {error.strerror or error}.") from None
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{own.getsockname()[1]}", flush=True)
    settings = uvicorn.Config(
        build_app(model, config),
        log_level="warning",
        access_log=False,  # no user's text in a log, nor who asked
        timeout_graceful_shutdown=GRACE,
        h11_max_incomplete_event_size=1 << 16,
    )
    uvicorn.Server(settings).run(sockets=[own])
