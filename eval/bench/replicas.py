"""Throughput of servers with one replica and with several, under the same load; knows HTTP, and no model.

A closed loop: so many clients, each with one request at a time, whole answers, no two prompts alike. What counts is what ends
within a time, after a warm-up and before the clients stop, so that neither the beginning nor the end, at which a replica may
be idle, is a part of it. Beside it stands who had the processors: where replicas do not have their cores for themselves, or
whatever lies between them and clients is what is busy, more replicas cannot help.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import httpx
import psutil

from hf_pqcache.eval.bench.latency import percentile

#: In the command line of a replica's process.
REPLICA = "ServeReplica:pqcache:Replica"
#: Token ids of prompts, which all vocabularies have.
IDS = range(3, 1000)
START_S = 600.0


@dataclass(frozen=True)
class Load:
    """What clients ask.

    Attributes:
        output_tokens: on average, half of it to one and a half, so that requests do not end all at once.
        clients: requests in flight. warm_up_s, seconds: before what counts, and of it.
    """

    prompt_tokens: int
    output_tokens: int
    clients: int
    warm_up_s: float
    seconds: float
    seed: int = 0


def measure(words: Sequence[str], replicas: int, load: Load) -> dict[str, Any]:
    """A row: `pqcache serve` with these words, and so many replicas.

    Raises RuntimeError with what the server said if it does not start, or refuses a request.
    """
    with _server([*words, "--replicas", str(replicas)]) as (url, server):
        return {"replicas": replicas, **asyncio.run(_closed_loop(url, server, load))}


@contextmanager
def _server(words: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """From when it is ready -> (address, process)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_pqcache", "serve", *words, "--port", str(port), "--drain-seconds", "1"]
    with tempfile.TemporaryFile("w+") as said:
        server = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            _wait(f"http://127.0.0.1:{port}", server, said)
            yield f"http://127.0.0.1:{port}", psutil.Process(server.pid)
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait(url: str, server: subprocess.Popen[bytes], said: Any) -> None:
    until = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < until:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    said.seek(0)
    lines = [line.strip() for line in said.read().splitlines() if line.strip()]
    raise RuntimeError(f"the server did not start: {lines[-1] if lines else 'it said nothing'}")


async def _closed_loop(url: str, server: psutil.Process, load: Load) -> dict[str, Any]:
    ended: list[tuple[float, float, int]] = []  # (moment, seconds it took, tokens)
    rng = random.Random(load.seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:

        async def ask() -> None:
            while True:
                ids = rng.choices(IDS, k=load.prompt_tokens)
                tokens = rng.randint(max(1, load.output_tokens // 2), load.output_tokens * 3 // 2)
                body = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
                begun = time.perf_counter()
                answer = await client.post("/v1/completions", json=body)
                if answer.status_code != 200:
                    raise RuntimeError(f"the server answered {answer.status_code}: {answer.text[:200]}")
                ended.append((time.perf_counter(), time.perf_counter() - begun, answer.json()["usage"]["completion_tokens"]))

        clients = [asyncio.create_task(ask()) for _ in range(load.clients)]
        try:
            await _unless_failed(clients, load.warm_up_s)
            begin, before = time.perf_counter(), _busy(server)
            sampler = asyncio.create_task(_running(client))
            await _unless_failed(clients, load.seconds)
            end, after = time.perf_counter(), _busy(server)
            sampler.cancel()
            (running,) = await asyncio.gather(sampler)
        finally:
            for one in clients:
                one.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    return _row([one for one in ended if begin < one[0] <= end], end - begin, before, after) | {"replica_running": running}


async def _running(client: httpx.AsyncClient) -> list[float]:
    """Requests that each replica works on, the mean of moments a second apart, once this is cancelled."""
    seen: dict[str, list[float]] = {}
    try:
        while True:
            await asyncio.sleep(1)
            for line in (await client.get("/metrics")).text.splitlines():
                name, _, value = line.rpartition(" ")
                if name.startswith("pqcache_requests_running"):
                    seen.setdefault(name, []).append(float(value))
    except asyncio.CancelledError:
        return sorted(fmean(values) for values in seen.values())


async def _unless_failed(clients: Sequence[asyncio.Task[None]], seconds: float) -> None:
    done, _ = await asyncio.wait(clients, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for one in done:
        one.result()


def _row(ended: Sequence[tuple[float, float, int]], seconds: float, before: Any, after: Any) -> dict[str, Any]:
    took = [one[1] for one in ended]
    if not took:
        raise RuntimeError(f"no request ended within {seconds:.0f} s: measure longer, or ask for fewer tokens")
    each = [(after[0][pid] - before[0].get(pid, 0.0)) / seconds for pid in after[0]]
    return {
        "requests": len(ended),
        "seconds": seconds,
        "throughput_tok_s": sum(one[2] for one in ended) / seconds,
        "requests_s": len(ended) / seconds,
        **{f"request_p{p}_s": percentile(took, p / 100) for p in (50, 99)},
        "cores": len(os.sched_getaffinity(0)),
        "replica_cores_busy": sorted(each),
        "other_cores_busy": (after[1] - before[1]) / seconds,
    }


def _busy(server: psutil.Process) -> tuple[dict[int, float], float]:
    """Seconds of processors so far: of each replica, and of the server's other processes and the clients together."""
    each, others = dict[int, float](), 0.0
    for process in (psutil.Process(), server, *server.children(recursive=True)):
        try:
            times, words = process.cpu_times(), process.cmdline()
        except psutil.Error:
            continue
        spent = times.user + times.system
        if any(REPLICA in word for word in words):
            each[process.pid] = spent
        else:
            others += spent
    return each, others
