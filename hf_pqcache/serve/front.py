"""What clients of several replicas talk to: passes requests on, and says so where a replica dies; knows no model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from hf_pqcache.serve import lines, log
from hf_pqcache.serve.answers import DONE, sse
from hf_pqcache.serve.app import UNBUFFERED
from hf_pqcache.serve.errors import ApiError
from hf_pqcache.serve.prefix import key_of, with_label

#: Of a request whose replica died before anything was sent.
TRIES = 3
#: Of an answer's and a request's headers, those that go through.
PASSED = ("authorization", "content-type", "retry-after", "www-authenticate", *map(str.lower, UNBUFFERED))
SERVED_BY = "x-served-by"
#: That lines name; a client may have put anything into others.
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")


class Front:
    """What clients talk to.

    Args:
        replicas: a handle. body_bytes: most of a request. is_logged: as of `Fleet`.
    """

    def __init__(self, replicas: Any, body_bytes: int, is_logged: bool = False) -> None:
        if is_logged:
            lines.send()
        self.replicas, self.body_bytes = replicas, body_bytes
        self.streaming = replicas.options(stream=True)

    async def __call__(self, request: Request) -> Response:
        try:
            if request.url.path == "/metrics":
                return await self._metrics()
            return await self._passed_on(request, await self._body(request))
        except ApiError as error:
            log.tell("http", path=request.url.path if request.url.path in PATHS else "other", status=error.status)
            return _error(error)

    async def _metrics(self) -> Response:
        found = await self.replicas.broadcast("figures").results_async(timeout_s=10)
        return Response(with_label(dict(found)), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _body(self, request: Request) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.body_bytes:
                raise ApiError(413, f"the body is larger than the {self.body_bytes} bytes that this server takes")
            parts.append(part)
        return b"".join(parts)

    async def _passed_on(self, request: Request, body: bytes) -> Response:
        """The answer of a replica; of another one if it dies while nothing has been sent. Raises ApiError."""
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = {name: value for name, value in request.headers.items() if name in PASSED}
        for _ in range(TRIES):
            parts = self.streaming.answer.remote(request.method, path, headers, body, key=key_of(body))
            try:
                start, first = await anext(parts), await anext(parts, b"")
                told = {name: value for name, value in start.headers.items() if name in (*PASSED, SERVED_BY)}
                if not told.get("content-type", "").startswith("text/event-stream"):
                    whole = first + b"".join([part async for part in parts])
                    return Response(whole, start.status, told)
                return StreamingResponse(_stream(parts, first), start.status, told)
            except (RayActorError, RayTaskError) as error:
                _cancel(parts)
                log.tell("replica_died" if _has_died(error) else "replica_failed", kind=type(error).__name__)
                if not _has_died(error):
                    raise ApiError(
                        500, f"a replica failed: {' '.join(str(getattr(error, 'cause', error)).split())[:300]}"
                    ) from error
            except BaseException:
                _cancel(parts)
                raise
        raise ApiError(503, f"{TRIES} replicas died while they answered this request; ask again", code="replica_died")


async def _stream(parts: Any, first: bytes) -> AsyncIterator[bytes]:
    """What comes; where it breaks off, an error that says so and the end of the stream."""
    is_over = False
    try:
        yield first
        async for part in parts:
            yield part
        is_over = True
    except (RayActorError, RayTaskError, TaskCancelledError):
        is_over = True
        log.tell("stream_broken")
        told = "the replica that made this answer has died; what came so far is right, ask again for the rest"
        yield sse(ApiError(500, told, code="replica_died").body())
        yield DONE
    finally:
        if not is_over:
            _cancel(parts)  # the client has gone


def _cancel(parts: Any) -> None:
    with suppress(Exception):
        parts.cancel()


def _has_died(error: BaseException) -> bool:
    """Whether it says that a replica's process is gone, or going."""
    return isinstance(error, RayActorError) or isinstance(getattr(error, "cause", None), RayActorError)


def _error(error: ApiError) -> Response:
    return Response(json.dumps(error.body()), error.status, error.headers, "application/json")
