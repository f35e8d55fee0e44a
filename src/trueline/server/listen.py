"""Listening: uvicorn around the application, until the process is told to end."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, NoReturn

import torch

from trueline.errors import ConfigError, ModelError
from trueline.server.config import ServeConfig

try:
    import uvicorn

    from trueline.server.app import build_app
    from trueline.server.engine_loop import new_backend
    from trueline.server.links import PipeLink, can_be_sent, serve_orders
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"Serving needs the package {missing.name}. Install: pip install 'trueline[serve]'"
    ) from missing

if TYPE_CHECKING:
    from fastapi import FastAPI

    from trueline.models.load import LanguageModel

GRACE = 60
"""Seconds that requests under way may still take when the server is told to end."""
ENDING = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
"""Exit code of the process that answers HTTP where it was interrupted."""
GONE = 70
"""Exit code of the process that answers HTTP where the engine's has gone without a word."""


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
    """Serve at a socket until SIGINT or SIGTERM; what runs by then is finished.

    Where the system can fork a process that is safe to use, HTTP gets one of its own, and this one
    runs the model: they share no interpreter, and end together.
    """
    own.listen(2048)  # who comes before the first turn of the loop waits
    host, port = own.getsockname()[:2]
    print(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", flush=True)
    if sys.platform == "linux" and can_be_sent(config):
        _in_two(model, config, own)
    else:
        _answer(build_app(model, config), own)


def _answer(app: FastAPI, own: socket.socket) -> None:
    """Answer HTTP at a socket."""
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # no user's text in a log, nor who asked
        timeout_graceful_shutdown=GRACE,
        h11_max_incomplete_event_size=1 << 16,
    )
    uvicorn.Server(settings).run(sockets=[own])


def _in_two(model: LanguageModel, config: ServeConfig, own: socket.socket) -> None:
    """Answer HTTP in a fork, run the engine here, and end with it as it ends."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads are not in a fork
    mine, its = socket.socketpair()
    backend = new_backend(model, config)
    gc.collect()
    gc.freeze()  # what is there now stays: neither process looks through it again
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # idle threads of torch hold no lock
        child = os.fork()
    if not child:
        mine.close()
        _front(model, config, own, its)
    for each in (own, its):
        each.close()
    for number in ENDING:
        signal.signal(number, lambda got, frame: _pass_on(child, got))
    with mine:
        serve_orders(backend, mine)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == -signal.SIGTERM:  # told to end, and ended
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    if code:
        raise ModelError(f"The process that answers HTTP has ended (exit code {code}).")


def _front(
    model: LanguageModel, config: ServeConfig, own: socket.socket, engine: socket.socket
) -> NoReturn:
    """Answer HTTP in this process, for an engine in the one that it comes from."""
    code = GONE
    try:
        os.setpgid(0, 0)  # of a terminal's signals the engine's process is told, and passes them on
        torch.set_num_threads(1)  # a fork has none of torch's threads
        link = PipeLink(engine, lost=lambda: os._exit(GONE))
        _answer(build_app(model, config, link), own)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _pass_on(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
