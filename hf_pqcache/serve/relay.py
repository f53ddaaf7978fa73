"""A request to an ASGI application that does not come from a socket: its answer as parts; knows no application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple


class Start(NamedTuple):
    """What comes first of an answer."""

    status: int
    headers: dict[str, str]


async def call(app: Any, method: str, path: str, headers: Mapping[str, str], body: bytes) -> AsyncIterator[Start | bytes]:
    """The answer: its `Start`, then its body in parts as they come. Who stops listening is a client that has gone.

    Raises what the application raises.
    """
    parts: asyncio.Queue[Start | bytes | None] = asyncio.Queue()
    gone, is_read = asyncio.Event(), False

    async def receive() -> dict[str, Any]:
        nonlocal is_read
        if not is_read:
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            told = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
            parts.put_nowait(Start(message["status"], told))
        elif message.get("body"):
            parts.put_nowait(message["body"])

    named = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    path, _, query = path.partition("?")
    scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": query.encode(), "headers": named, "scheme": "http"}

    async def work() -> None:
        try:
            await app(scope, receive, send)
        finally:
            parts.put_nowait(None)

    task = asyncio.create_task(work())
    try:
        while (part := await parts.get()) is not None:
            yield part
        await task
    finally:
        gone.set()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
