"""An application that is called in its own process answers as over a socket, and hears of clients that go."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("starlette")
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from hf_pqcache.serve.relay import Start, call

GONE: list[str] = []


async def echo(request: Request) -> JSONResponse:
    body = (await request.body()).decode()
    return JSONResponse(
        [request.method, request.url.path, request.query_params.get("q"), request.headers.get("x-a"), body], 201
    )


async def stream(request: Request) -> StreamingResponse:
    async def parts() -> Any:
        try:
            for i in range(1000):
                yield f"{i} "
                await asyncio.sleep(0.001)
        finally:
            GONE.append("parts")

    return StreamingResponse(parts(), media_type="text/event-stream")


async def fails(request: Request) -> JSONResponse:
    raise ZeroDivisionError("in the application")


APP = Starlette(routes=[Route("/echo", echo, methods=["POST"]), Route("/stream", stream), Route("/fails", fails)])


def parts_of(*request: Any, most: int = 10**6) -> list[Any]:
    async def listen() -> list[Any]:
        found: list[Any] = []
        answer = call(APP, *request)
        async for part in answer:
            found.append(part)
            if len(found) == most:
                break
        await answer.aclose()  # type: ignore[attr-defined]
        return found

    return asyncio.run(asyncio.wait_for(listen(), 20))


def test_a_whole_answer() -> None:
    start, *body = parts_of("POST", "/echo?q=%C3%A4", {"X-A": "b"}, b"hello")
    assert start == Start(201, {"content-length": start.headers["content-length"], "content-type": "application/json"})
    assert b"".join(body).decode() == '["POST","/echo","ä","b","hello"]'
    assert parts_of("GET", "/nowhere", {}, b"")[0].status == 404


def test_a_stream_and_a_client_that_goes() -> None:
    GONE.clear()
    found = parts_of("GET", "/stream", {}, b"", most=4)
    assert found[1:] == [b"0 ", b"1 ", b"2 "]
    assert GONE == ["parts"]


def test_an_error_of_the_application() -> None:
    with pytest.raises(ZeroDivisionError, match="in the application"):
        parts_of("GET", "/fails", {}, b"")
