"""Replicas of a server on Ray Serve: who gets a request, and what becomes of those of a replica that dies; knows no model.

A replica is the same application as without Ray, called in its process. The front reads a request, asks the router for the
replica that knows its beginning, and passes on what comes. Ray starts replicas, watches them and starts dead ones anew.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from hf_pqcache.serve import heirs, lines, log
from hf_pqcache.serve.answers import DONE, sse
from hf_pqcache.serve.app import UNBUFFERED, make_app
from hf_pqcache.serve.engine import started
from hf_pqcache.serve.errors import ApiError
from hf_pqcache.serve.group import LostError
from hf_pqcache.serve.manager import EngineSettings
from hf_pqcache.serve.prefix import key_of, ranked, with_label
from hf_pqcache.serve.recent import Text
from hf_pqcache.serve.relay import Start, call
from hf_pqcache.serve.server import bound
from hf_pqcache.serve.service import Limits, Service

#: Of a request whose replica died before anything was sent.
TRIES = 3
#: Of an answer's and a request's headers, those that go through.
PASSED = ("authorization", "content-type", "retry-after", "www-authenticate", *map(str.lower, UNBUFFERED))
SERVED_BY = "x-served-by"
NAME = "pqcache"
HEALTH_S = 5.0
#: That lines name; a client may have put anything into others.
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
#: Of Ray's own processes: no line a request, no prompts.
LOGGING: dict[str, Any] = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True)
class Fleet:
    """How many replicas, and what each has.

    Attributes:
        replicas: at least. most: where Ray adds some under load; None keeps their number.
        gpus, cpus: of a replica, as Ray counts them. is_logged: whether lines for operators are written.
    """

    replicas: int
    most: int | None = None
    gpus: float = 0.0
    cpus: float = 1.0
    is_logged: bool = False


class PrefixRouter(RequestRouter):
    """Equal beginnings to the same replica, as `prefix.ranked` says."""

    def initialize_state(self, places: int | None = None, **more: Any) -> None:
        """Ray calls it; places: requests that a replica runs at a time, if it was told."""
        self.places = places

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank: Ray takes the first that has room."""
        key = pending_request.kwargs.get("key") if pending_request is not None else None
        named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        load = {name: self.replica_queue_len_cache.get(replica.replica_id) or 0 for name, replica in named.items()}
        return [[named[name]] for name in ranked(key, load, self.places)]


class Replica:
    """One process with the model.

    Args:
        load: makes (model, tokenizer). name: of the model, for clients. is_logged: as of `Fleet`.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, Any]],
        name: str,
        settings: EngineSettings,
        limits: Limits,
        api_key: str | None,
        is_logged: bool = False,
    ) -> None:
        self.id = serve.get_replica_context().replica_id.unique_id
        if is_logged:
            lines.send(replica=self.id)
        self.service = Service(name, limits)
        model, tokenizer, engine = started(load, settings, _end)
        self.service.ready(model, tokenizer, engine)
        self.app = make_app(self.service, api_key)
        self.watch: asyncio.Task[None] | None = None

    async def answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes, key: str | None = None
    ) -> AsyncIterator[Any]:
        """`relay.call` of the application; `key` is for the router."""
        if self.watch is None:
            self.watch = asyncio.create_task(self.service.watch())
        async for part in call(self.app, method, path, headers, body):
            yield Start(part.status, {**part.headers, SERVED_BY: self.id}) if isinstance(part, Start) else part

    async def figures(self) -> tuple[str, str]:
        """(replica, its metrics as Prometheus reads them)."""
        return self.id, self.service.metrics.text().decode()

    async def called(self) -> str:
        """The name by which the router knows this replica."""
        return self.id

    async def inherit(self, data: bytes, texts: list[Text], key: str | None = None) -> dict[str, int]:
        """Prefixes of a replica that ends; `key` is for the router. Raises ValueError where they do not fit."""
        assert self.service.engine is not None
        return await heirs.inherit(self.service.engine, data, texts)

    async def __del__(self) -> None:
        """Ray calls it once all requests have been answered, and then ends the process."""
        service = getattr(self, "service", None)
        if service is not None and service.engine is not None:
            own = serve.get_replica_context()
            others = serve.get_deployment_handle(own.deployment, own.app_name)
            await heirs.hand_over(service.engine, self.id, others, service.limits.prefix_bytes)

    def check_health(self) -> None:
        """Ray asks. Raises RuntimeError once the engine is dead: Ray starts another replica."""
        if self.service.engine is None or not self.service.engine.is_alive():
            raise RuntimeError("the engine has died")


def _end(error: LostError) -> None:
    """End this replica before its requests fail: those of which nothing has been sent are asked again elsewhere.

    Ray starts another one, with all processes that share the model.
    """
    log.tell("process_lost", why=str(error))
    time.sleep(2 * lines.TOGETHER_S if log.LOGGER.isEnabledFor(logging.INFO) else 0)
    os._exit(1)


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


def application(
    load: Callable[[], tuple[Any, Any]],
    name: str,
    settings: EngineSettings,
    limits: Limits,
    *,
    fleet: Fleet,
    api_key: str | None = None,
) -> Any:
    """What `ray.serve.run` takes."""
    scaling: dict[str, Any] = {"num_replicas": fleet.replicas}
    if fleet.most is not None and fleet.most > fleet.replicas:
        target = max(1.0, (settings.max_requests or 16) / 2)
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=fleet.replicas, max_replicas=fleet.most, target_ongoing_requests=target
            )
        }
    deployment: Any = serve.deployment  # what it returns has two types
    router: Any = PrefixRouter
    replica = deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=limits.queue,
        ray_actor_options={"num_cpus": fleet.cpus, "num_gpus": fleet.gpus},
        health_check_period_s=HEALTH_S,
        graceful_shutdown_wait_loop_s=heirs.LOOK_S,
        graceful_shutdown_timeout_s=limits.drain_s + heirs.HAND_OVER_S,
        request_router_config=RequestRouterConfig(
            request_router_class=router, request_router_kwargs={"places": settings.max_requests}
        ),
        **scaling,
    )
    front = deployment(Front, name="Front", max_ongoing_requests=1 << 16, ray_actor_options={"num_cpus": 0})
    bound_replica = replica.bind(load, name, settings, limits, api_key, fleet.is_logged)
    return front.bind(bound_replica, limits.body_bytes, fleet.is_logged)


def start(app: Any, host: str, port: int, fleet: Fleet) -> lines.Collected | None:
    """Serve until `stop`, which takes what this returns.

    Joins the cluster that RAY_ADDRESS names; without it, one of this machine's is started.
    """
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        cpus = max(os.cpu_count() or 1, int(fleet.cpus * (fleet.most or fleet.replicas)) + 1)
        ray.init(num_cpus=cpus, include_dashboard=False, **quiet)
    collected = lines.Collected() if fleet.is_logged else None
    serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=LoggingConfig(**LOGGING))
    serve.run(app, name=NAME, route_prefix="/")
    return collected


def run(app: Any, host: str, port: int, fleet: Fleet, when_ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises OSError if the port is taken."""
    with bound(host, port) as taken:  # Ray would not say so
        port = taken.getsockname()[1]
    over, collected = threading.Event(), None
    try:
        collected = start(app, host, port, fleet)
        for number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray sets handlers of its own
            signal.signal(number, lambda *_: over.set())
        when_ready(f"http://{host}:{port}")
        over.wait()
    finally:
        stop(collected)


def stop(collected: lines.Collected | None = None) -> None:
    """End all replicas; running requests get the time that `Limits.drain_s` gives them."""
    serve.shutdown()
    if collected is not None:
        collected.stop()
    ray.shutdown()
