"""Runs the application: the port is taken first, the model is loaded beside it, and signals end it gently; knows no command."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from hf_pqcache.serve import log, saved
from hf_pqcache.serve.app import make_app
from hf_pqcache.serve.engine import Engine, started
from hf_pqcache.serve.errors import ApiError
from hf_pqcache.serve.manager import EngineSettings
from hf_pqcache.serve.service import Limits, Service

#: Beyond the time that running requests get: answers are written, connections closed.
CLOSING_S = 5


class Server(uvicorn.Server):
    """A server whose first SIGTERM or Ctrl-C lets running requests finish; a second one does not."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.drain()

    def drain(self) -> None:
        """Take no more requests, and end when the running ones have, or after the time they get."""
        self.service.is_draining = self.should_exit = True
        log.tell("draining", running=len(self.service.runs))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        error = ApiError(503, "the server ends, and this request took longer than those are given", code="draining")
        late = asyncio.get_running_loop().call_later(self.service.limits.drain_s, self.service.abort, error)
        await super().shutdown(sockets)
        late.cancel()


class Running:
    """A server with its port taken. `run` is all; `background` is for a program that does something else besides.

    Args:
        load: makes (model, tokenizer); called while the port already answers that it is not ready.
        name: of the model, for clients. port: 0 takes a free one. prefixes: a file that the engine's prefixes are loaded from,
            if it is there, and saved to in the end.

    Raises OSError if the port is taken.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        name: str,
        settings: EngineSettings,
        limits: Limits,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        prefixes: Path | None = None,
        when_ready: Callable[[Service], None] = lambda service: None,
    ) -> None:
        self.prefixes = prefixes
        self.load, self.settings, self.when_ready = load, settings, when_ready
        self.service = Service(name, limits)
        self.socket = bound(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(
            make_app(self.service, api_key),
            log_level="warning",
            access_log=False,
            ws="none",
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(limits.drain_s) + CLOSING_S,
        )
        self.server = Server(config, self.service)
        self.error: BaseException | None = None
        self.is_ready = threading.Event()
        self.is_over = False
        self.lock = threading.Lock()

    def run(self) -> None:
        """Serve until a signal or `stop`. Raises what loading the model raised."""
        loading = threading.Thread(target=self._make_ready, daemon=True)
        loading.start()
        try:
            self.server.run(sockets=[self.socket])
        finally:
            self.is_ready.set()
            with self.lock:
                self.is_over, engine = True, self.service.engine
            if engine is not None:
                self._end(engine)
        if self.error is not None:
            raise self.error

    def _before(self, engine: Engine) -> None:
        if self.prefixes is not None:
            saved.load(engine, self.prefixes)

    def _end(self, engine: Engine) -> None:
        try:
            if self.prefixes is not None and engine.is_alive():
                saved.save(engine, self.prefixes, self.service.limits.prefix_bytes)
        finally:
            engine.stop(timeout=CLOSING_S)

    @contextmanager
    def background(self) -> Iterator[str]:
        """Serve in a thread from when the model is ready -> the address."""
        thread = threading.Thread(target=self._run_quietly, daemon=True)
        thread.start()
        self.is_ready.wait()
        try:
            if self.error is not None:
                raise self.error
            yield self.url
        finally:
            self.server.drain()
            thread.join()

    def _run_quietly(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self.error = error
            self.is_ready.set()

    def _make_ready(self) -> None:
        try:
            model, tokenizer, engine = started(self.load, self.settings, self._lose, self._before)
            with self.lock:
                if not self.is_over:
                    self.service.ready(model, tokenizer, engine)
            if self.is_over:
                engine.stop(timeout=CLOSING_S)  # nobody has waited for the model
            else:
                self.when_ready(self.service)
        except BaseException as error:
            self._lose(error)
        self.is_ready.set()

    def _lose(self, error: BaseException) -> None:
        """End, as nothing can be served any more."""
        self.error = self.error or error
        self.server.should_exit = True
        self.is_ready.set()


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError that names the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"{host}:{port} cannot be listened on: {error.strerror or error}; give another --port") from error
