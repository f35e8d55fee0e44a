"""The routes: OpenAI's chat and text completions, models, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from trueline import __version__
from trueline.engine.torch_backend import TorchBackend
from trueline.engine.trace import TokenTexts
from trueline.errors import ConfigError, ModelError, TruelineError
from trueline.server.answers import Answer
from trueline.server.asks import Ask, UnknownModel, check_size, model_names, read_ask
from trueline.server.bodies import ChatBody, TextBody, first_error
from trueline.server.config import ServeConfig
from trueline.server.engine_thread import Busy, EngineThread, Job, News, tell_all
from trueline.server.gauges import Gauges
from trueline.server.guards import Guards, error_object
from trueline.server.pages import router

if TYPE_CHECKING:
    from trueline.engine.protocol import Step
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


class Server:
    """One model behind HTTP: who was let in is encoded, decoded together, and told of each step."""

    def __init__(self, model: LanguageModel, config: ServeConfig) -> None:
        if config.name in model.adapters:
            raise ConfigError(f'An adapter and the model are both called "{config.name}".')
        self.model, self.config, self.gauges = model, config, Gauges(config.name)
        self.chat = TorchBackend(model, batch_size=config.max_running, admission="each_step")
        self.text = TorchBackend(replace(model, raw=True))  # encodes alone
        self.engine = EngineThread(self.chat, self.gauges, config.max_waiting)
        self.texts = TokenTexts(model.tokenizer)
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
            with self._encoding:
                return sum(
                    len(backend.encode(replace(request, method=None)).branches[0])
                    for request in ask.requests
                )

        check_size([p.branches for p in prompts], prompts[0].sampling.n, self.config)
        return ask, Answer(
            model=ask.model,
            chat=chat,
            top=ask.top,
            traced=ask.traced,
            texts=self.texts,
            prompts=prompts,
            prompt_tokens=count,
        )

    def begin(self, ask: Ask, answer: Answer) -> tuple[asyncio.Queue[Any], list[Job]]:
        """Hand the prompts to the engine; (prompt, step or error) come through the queue."""
        queue = asyncio.Queue[Any]()

        def teller(place: int) -> Callable[[Step | Exception], None]:
            return lambda news: queue.put_nowait((place, news))

        tells = [teller(i) for i in range(len(answer.prompts))]
        record = ask.traced or ask.top is not None
        return queue, self.engine.submit(list(answer.prompts), tells, record)

    async def chunks(self, ask: Ask, answer: Answer) -> AsyncIterator[list[dict[str, Any]]]:
        """Yield the chunks of an answer, those that are there together; who stops frees its rows.

        Raises `TimeoutError` after `config.timeout` seconds, and what the engine says.
        """
        queue, jobs = self.begin(ask, answer)
        late = TimeoutError(f"The request took more than {self.config.timeout:g} s.")
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self.config.timeout, queue.put_nowait, (0, late))
        try:
            while not answer.done:
                told = [await queue.get()]
                while not queue.empty():
                    told.append(queue.get_nowait())
                chunks: list[dict[str, Any]] = []
                for place, news in told:
                    if isinstance(news, Exception):
                        raise news
                    chunks += filter(None, [answer.add(place, news)])
                if chunks:
                    yield chunks
        finally:
            timer.cancel()
            if not answer.done:
                self.engine.cancel(jobs)

    async def complete(self, body: ChatBody | TextBody, request: Request) -> Response:
        """Answer a request, as a stream or in one piece."""
        ask, answer = await run_in_threadpool(self.prepare, body)
        chunks = self.chunks(ask, answer)
        if ask.stream:
            first = await anext(chunks)  # what is wrong by now is an error with a status
            events = self._events(ask, answer, first, chunks)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        gone = asyncio.ensure_future(_gone(request))
        done = asyncio.ensure_future(_drain(chunks))
        try:
            await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                return Response(status_code=499)  # nobody is there to read it
            await done
            return JSONResponse(answer.whole())
        finally:
            for task in (gone, done):
                task.cancel()
            await asyncio.gather(gone, done, return_exceptions=True)

    async def _events(
        self, ask: Ask, answer: Answer, first: list[dict[str, Any]], chunks: Any
    ) -> AsyncIterator[str]:
        """Yield server-sent events; an error in the middle of a stream is its last event."""
        extra = {"usage": None} if ask.include_usage else {}
        try:
            yield "".join(_event(chunk | extra) for chunk in first)
            async for some in chunks:
                yield "".join(_event(chunk | extra) for chunk in some)
            if ask.include_usage:
                yield _event(answer.usage_chunk())
        except (TruelineError, TimeoutError) as error:
            _, content = describe(error)
            yield _event(content)
        finally:
            await chunks.aclose()
        yield "data: [DONE]\n\n"


def build_app(model: LanguageModel, config: ServeConfig) -> FastAPI:
    """Return the application of a model; its engine runs while the application does."""
    server = Server(model, config)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def deliver(news: list[News]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(tell_all, news)

        server.engine.deliver = deliver
        server.engine.start()
        yield
        await run_in_threadpool(server.engine.stop)

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


async def _drain(chunks: AsyncIterator[Any]) -> None:
    async with contextlib.aclosing(chunks) as open_chunks:  # type: ignore[type-var]
        async for _ in open_chunks:
            pass


async def _gone(request: Request) -> None:
    """Return when the client has gone."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"
