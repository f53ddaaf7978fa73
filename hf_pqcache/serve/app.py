"""The HTTP side: routes, bodies, keys and streams; knows nothing of models."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from hf_pqcache.serve import log
from hf_pqcache.serve.answers import DONE, Answers, sse
from hf_pqcache.serve.errors import ApiError
from hf_pqcache.serve.prefix import key_of_request
from hf_pqcache.serve.protocol import job_of, parse
from hf_pqcache.serve.run import Event, Run
from hf_pqcache.serve.service import Service

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]
#: Nobody reads this answer: its client has gone (as nginx counts it).
GONE = 499
#: Asked every few seconds by those who watch.
UNLOGGED = ("/health", "/metrics")
#: Of a stream: nothing on its way may hold it back.
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def make_app(service: Service, api_key: str | None = None) -> Starlette:
    """The application.

    Args:
        service: may become ready later.
        api_key: what `/v1/...` asks for as a bearer token; None lets everybody in.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        watch = asyncio.create_task(service.watch())
        yield
        watch.cancel()

    handlers = Handlers(service, api_key)
    routes = [
        Route("/health", handlers.guarded(handlers.health, is_open=True)),
        Route("/metrics", handlers.guarded(handlers.metrics, is_open=True)),
        Route("/v1/models", handlers.guarded(handlers.models)),
        Route("/v1/models/{name:path}", handlers.guarded(handlers.model)),
        Route("/v1/completions", handlers.guarded(handlers.completions), methods=["POST"]),
        Route("/v1/chat/completions", handlers.guarded(handlers.chat), methods=["POST"]),
    ]

    async def http_error(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        told = {404: "there is no such path", 405: f"the method {request.method} is not for this path"}
        return handlers.answer(request, ApiError(status, f"{request.url.path}: {told.get(status, 'it cannot be served')}"))

    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: http_error})


class Handlers:
    """One method a path."""

    def __init__(self, service: Service, api_key: str | None) -> None:
        self.service, self.api_key = service, api_key

    def guarded(self, handler: Handler, is_open: bool = False) -> Handler:
        """A handler that asks for the key and turns errors into answers."""

        async def guarded(request: Request) -> Response:
            try:
                if not is_open:
                    self._check_key(request)
                response = await handler(request)
            except ApiError as error:
                return self.answer(request, error)
            except ClientDisconnect:
                return self._count(request, Response(status_code=GONE))
            except Exception as error:
                told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (a fault of the server)"
                return self.answer(request, ApiError(500, told))
            return self._count(request, response)

        return guarded

    def answer(self, request: Request, error: ApiError) -> Response:
        return self._count(request, _json(error.body(), error.status, error.headers))

    async def health(self, request: Request) -> Response:
        self.service.check_ready()
        return _json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self.service.check_model(request.path_params["name"])
        return _json(self._model())

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, is_chat=False)

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, is_chat=True)

    def _model(self) -> dict[str, Any]:
        service = self.service
        found: dict[str, Any] = {"id": service.name, "object": "model", "created": service.created, "owned_by": "hf-pqcache"}
        return found | ({} if service.engine is None else {"max_model_len": service.context})

    async def _complete(self, request: Request, is_chat: bool) -> Response:
        arrival = time.perf_counter()
        self.service.check_ready()
        document = parse(await self._body(request))
        run = await self.service.run(job := job_of(document, is_chat), arrival, key_of_request(document))
        answers = Answers(job, self.service.name, run)
        try:
            events = run.events()
            if not job.is_streaming:
                return _json(await _unless_gone(request, _whole(answers, events)))
            first = await _unless_gone(request, _first(events))  # an error before it still has a status of its own
            return EventStream(_stream(answers, first, events), run, self.service)
        except BaseException:
            self.service.end(run)
            raise
        finally:
            if not job.is_streaming:
                self.service.end(run)

    async def _body(self, request: Request) -> bytes:
        """Raises ApiError 413 as soon as it is known to be too large; the rest is not read."""
        limit = self.service.limits.body_bytes
        error = ApiError(413, f"the body is larger than the {limit} bytes that this server takes", code="body_too_large")
        error.headers["Connection"] = "close"
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            raise error
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise error
            parts.append(part)
        return b"".join(parts)

    def _check_key(self, request: Request) -> None:
        if self.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(key.strip().encode(), self.api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise ApiError(401, "this server asks for its key: Authorization: Bearer KEY", code="invalid_api_key")

    def _count(self, request: Request, response: Response) -> Response:
        route = request.scope.get("route")
        path = getattr(route, "path", "other")
        self.service.metrics.responses.labels(path, str(response.status_code)).inc()
        if path not in UNLOGGED:
            log.tell("http", path=path, status=response.status_code)
        return response


class EventStream(StreamingResponse):
    """Server-sent events of a run, which ends with the connection."""

    def __init__(self, parts: AsyncIterator[bytes], run: Run, service: Service) -> None:
        super().__init__(
            parts, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        self.run, self.service = run, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.end(self.run)


async def _first(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


async def _stream(answers: Answers, first: Event, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    try:
        yield answers.chunks(first)
        async for event in events:
            yield answers.chunks(event)
        if answers.job.includes_usage:
            yield answers.usage_chunk()
    except ApiError as error:
        yield sse(error.body())
    yield DONE


async def _whole(answers: Answers, events: AsyncIterator[Event]) -> dict[str, Any]:
    texts: dict[int, str] = {}
    finishes: dict[int, str | None] = {}
    async for event in events:
        texts[event.choice] = texts.get(event.choice, "") + event.text
        finishes[event.choice] = event.finish
    return answers.whole(texts, finishes)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result. Raises ClientDisconnect as soon as nobody waits for it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = (asyncio.create_task(work), asyncio.create_task(gone()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def _json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(document), status, headers, "application/json")
