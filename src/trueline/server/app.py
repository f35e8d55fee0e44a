"""The routes: OpenAI's chat and text completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from trueline import __version__
from trueline.engine.torch_backend import TorchBackend
from trueline.errors import ConfigError, ModelError, TruelineError
from trueline.methods import Plain
from trueline.server.answers import Answer, to_json
from trueline.server.asks import Ask, UnknownModel, check_size, model_names, read_ask
from trueline.server.bodies import ChatBody, TextBody, first_error
from trueline.server.config import ServeConfig
from trueline.server.engine_jobs import Busy, EngineJobs
from trueline.server.gauges import Gauges
from trueline.server.guards import Guards, error_object
from trueline.server.links import Link, ThreadLink
from trueline.server.pages import router
from trueline.server.streams import EventStream, Gone, Inbox, tell_when_gone

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

STATUS: list[tuple[type[Exception], int, str]] = [
    (UnknownModel, 404, "not_found_error"),
    (Busy, 429, "rate_limit_error"),
    (TimeoutError, 504, "timeout_error"),
    (ModelError, 503, "server_error"),
    (TruelineError, 400, "invalid_request_error"),
]
"""What each error is to a client; the first that fits."""
RETRY_AFTER = 1
"""Seconds after which a client that was told to wait may come again."""
AT_ONCE = 1 << 14
"""Bytes of a body that is encoded in the event loop: sooner done than handed to a thread."""


class Server:
    """One model behind HTTP: who was let in is encoded, decoded together, and told of each token.

    Of the model the tokenizer and the settings are used here; the weights are the engine's.
    """

    def __init__(self, model: LanguageModel, config: ServeConfig, link: Link) -> None:
        if config.name in model.adapters:
            raise ConfigError(f'An adapter and the model are both called "{config.name}".')
        self.model, self.config, self.gauges = model, config, Gauges(config.name)
        self.chat = TorchBackend(model)  # both encode alone
        self.text = TorchBackend(replace(model, raw=True))
        self.link = link
        self.engine = EngineJobs(self.gauges, config.max_running, config.max_waiting)
        self.started = int(time.time())
        self._encoding = threading.Lock()  # a tokenizer is not for two threads at once

    def prepare(self, body: ChatBody | TextBody) -> tuple[Ask, Answer]:
        """Check what is asked, encode it, and return it with its answer to be."""
        ask = read_ask(body, self.config, self.model.adapters)
        chat = isinstance(body, ChatBody)
        backend = self.chat if chat else self.text
        with self._encoding:
            prompts = [backend.encode(request) for request in ask.requests]

        def count() -> int:
            plain = [replace(request, method=None) for request in ask.requests]
            if all(isinstance(p.method, Plain) for p in prompts):
                return sum(len(p.branches[0]) for p in prompts)
            with self._encoding:
                return sum(len(backend.encode(request).branches[0]) for request in plain)

        check_size([p.branches for p in prompts], prompts[0].sampling.n, self.config)
        return ask, Answer(
            model=ask.model,
            chat=chat,
            logprobs=ask.top is not None,
            traced=ask.traced,
            tokenizer=self.model.tokenizer,
            prompts=prompts,
            prompt_tokens=count,
            end=',"usage":null' if ask.include_usage else "",
        )

    async def chunks(self, ask: Ask, answer: Answer, request: Request) -> AsyncGenerator[list[str]]:
        """Yield the chunks of an answer, those that are there together; who stops frees its rows.

        Without a stream they come when a completion has ended. Raises `TimeoutError` after
        `config.timeout` seconds, `Gone` when the client goes, and what the engine says.
        """
        inbox = Inbox(at_once=ask.stream)
        hears = [partial(inbox.put, place) for place in range(len(answer.prompts))]
        jobs = self.engine.submit(answer.prompts, hears, ask.top, ask.traced)
        late = TimeoutError(f"The request took more than {self.config.timeout:g} s.")
        timer = asyncio.get_running_loop().call_later(self.config.timeout, inbox.put, 0, late)
        watch = asyncio.ensure_future(tell_when_gone(request, inbox))
        try:
            while not answer.done:
                chunks = []
                for place, told in await inbox.take():
                    if isinstance(told, Exception):
                        raise told
                    chunks.append(answer.add(place, told))
                if any(chunks):
                    yield [chunk for chunk in chunks if chunk]
        finally:
            timer.cancel()
            watch.cancel()
            if not answer.done:
                self.engine.cancel(jobs)

    async def complete(self, body: ChatBody | TextBody, request: Request) -> Response:
        """Answer a request, as a stream or in one piece."""
        if int(request.headers.get("content-length", AT_ONCE)) < AT_ONCE:
            ask, answer = self.prepare(body)
        else:
            ask, answer = await run_in_threadpool(self.prepare, body)
        chunks = self.chunks(ask, answer, request)
        try:
            if ask.stream:
                first = await anext(chunks)  # what is wrong by now is an error with a status
                return EventStream(self._events(ask, answer, first, chunks))
            async for _ in chunks:
                pass
        except Gone:
            return Response(status_code=499)  # nobody is there to read it
        return JSONResponse(answer.whole())

    async def _events(
        self, ask: Ask, answer: Answer, first: list[str], chunks: AsyncGenerator[list[str]]
    ) -> AsyncGenerator[str]:
        """Yield server-sent events; an error in the middle of a stream is its last event."""
        try:
            yield _events_of(first)
            async for some in chunks:
                yield _events_of(some)
            if ask.include_usage:
                yield _events_of([answer.usage_chunk()])
        except (TruelineError, TimeoutError) as error:
            _, content = describe(error)
            yield _events_of([to_json(content)])
        finally:
            await chunks.aclose()
        yield _events_of(["[DONE]"])


def build_app(model: LanguageModel, config: ServeConfig, link: Link | None = None) -> FastAPI:
    """Return the application of a model; its engine works while the application does.

    `link` is the way to the engine: by default a thread of this process.
    """
    server = Server(model, config, link or ThreadLink(model, config))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.engine.order = await server.link.open(server.engine.take)
        yield
        await server.link.close()

    app = FastAPI(title="Trueline", version=__version__, lifespan=lifespan)
    app.state.server = server
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    app.add_middleware(Guards, config=config)
    _add_errors(app)
    _add_routes(app, server)
    app.include_router(router(config))
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    wrong: dict[int | str, dict[str, Any]] = {
        code: {"description": text}
        for code, text in {
            400: "Something in the body is wrong.",
            401: "No valid API key.",
            404: "No such model.",
            413: "The body is too large.",
            429: "Too many requests wait.",
            503: "The engine has ended.",
            504: "The request took too long.",
        }.items()
    }

    @app.post("/v1/chat/completions", responses=wrong)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a chat."""
        return await server.complete(body, request)

    @app.post("/v1/completions", responses=wrong)
    async def completions(body: TextBody, request: Request) -> Response:
        """Continue a text."""
        return await server.complete(body, request)

    @app.get("/v1/models", responses={401: wrong[401]})
    async def models() -> dict[str, Any]:
        """List the model, and its adapters and presets as models of their own."""
        own = [
            {"id": name, "object": "model", "created": server.started, "owned_by": "trueline"}
            | ({"parent": server.config.name} if name != server.config.name else {})
            for name in model_names(server.config, server.model.adapters)
        ]
        return {"object": "list", "data": own}

    @app.get("/health", responses={503: wrong[503]})
    async def health() -> Response:
        """Say whether the engine runs."""
        alive = server.engine.alive
        return JSONResponse({"status": "ok" if alive else "ended"}, 200 if alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return the numbers that Prometheus reads."""
        return Response(server.gauges.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Return the version of Trueline."""
        return {"version": __version__}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status and OpenAI's error object for an error raised on purpose."""
    status, kind = next((s, k) for cls, s, k in STATUS if isinstance(error, cls))
    code = "model_not_found" if status == 404 else None
    return status, error_object(str(error), kind, code)


def _add_errors(app: FastAPI) -> None:
    async def on_purpose(request: Request, error: Exception) -> Response:
        status, content = describe(error)
        headers = {"Retry-After": str(RETRY_AFTER)} if status == 429 else None
        return JSONResponse(content, status, headers=headers)

    async def not_a_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, name = first_error(error.errors())
        content = error_object(message, "invalid_request_error", param=name)
        return JSONResponse(content, 400)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = f"{request.method} {request.url.path}: {error.detail}."
        content = error_object(text, "invalid_request_error")
        return JSONResponse(content, error.status_code, headers=error.headers)

    for cls in (TruelineError, TimeoutError):
        app.add_exception_handler(cls, on_purpose)
    app.add_exception_handler(RequestValidationError, not_a_body)
    app.add_exception_handler(HTTPException, no_route)


def _events_of(contents: list[str]) -> str:
    return "".join(f"data: {content}\n\n" for content in contents)
