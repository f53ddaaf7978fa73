"""Replicas of a server on Ray Serve: who gets a request, and what becomes of those of a replica that dies; knows no model.

A replica is the same application as without Ray, called in its process. The front (`front.py`) reads a request, asks the router
for the replica that knows its beginning, and passes on what comes. Ray starts replicas, watches them and starts dead ones anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig

from hf_pqcache.serve import heirs, lines, log
from hf_pqcache.serve.app import make_app
from hf_pqcache.serve.engine import started
from hf_pqcache.serve.front import SERVED_BY, Front
from hf_pqcache.serve.group import LostError
from hf_pqcache.serve.manager import EngineSettings
from hf_pqcache.serve.prefix import ranked
from hf_pqcache.serve.recent import Text
from hf_pqcache.serve.relay import Start, call
from hf_pqcache.serve.server import bound
from hf_pqcache.serve.service import Limits, Service

NAME = "pqcache"
HEALTH_S = 5.0
#: What a replica that cannot be made gets to say why.
SAYING_S = 5.0
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


class StartError(RuntimeError):
    """No replica could be made."""


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
        is_made = threading.Event()
        model, tokenizer, engine = started(load, settings, partial(_end, is_made))
        is_made.set()
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


def _end(is_made: threading.Event, error: LostError) -> None:
    """End this replica before its requests fail: those of which nothing has been sent are asked again elsewhere.

    Ray starts another one, with all processes that share the model. One that is being made may say itself why it cannot be.
    """
    log.tell("process_lost", why=str(error))
    if not is_made.is_set():
        time.sleep(SAYING_S)
    time.sleep(2 * lines.TOGETHER_S if log.LOGGER.isEnabledFor(logging.INFO) else 0)
    os._exit(1)


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
    try:
        serve.run(app, name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise StartError(f"no replica could be started: {_why_not() or error}") from error
    return collected


def _why_not() -> str:
    """The last line of what Ray knows of a replica that cannot be made: the error that it raised."""
    found = serve.status().applications.get(NAME)
    told = found.deployments["Replica"].message if found is not None and "Replica" in found.deployments else ""
    return next((line.strip() for line in reversed(told.splitlines()) if line.strip()), "")


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
