"""Two replicas of the tiny model on Ray Serve: equal beginnings share one, and of a killed one nobody else takes notice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
psutil = pytest.importorskip("psutil")
pytest.importorskip("ray.serve", reason="pip install 'hf-pqcache[ray]'")
pytestmark = pytest.mark.slow
GREEDY = {"temperature": 0, "max_tokens": 12}
LONG = {"temperature": 0, "max_tokens": 700, "ignore_eos": True}
SIZES = ("--dtype", "float32", "--bits", "stock", "--cache-tokens", "8K", "--max-requests", "8", "--max-batch-tokens", "128")


SECRET = "a word that nobody must read"


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server writes."""
    return tmp_path_factory.mktemp("said") / "lines.txt"


@pytest.fixture(scope="module")
def url(said: Path) -> Iterator[str]:
    """`pqcache serve --replicas 2`, from when it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    command = [sys.executable, "-m", "hf_pqcache", "serve", "tiny", "--replicas", "2", "--port", str(port), *SIZES]
    with said.open("w") as file:
        server = subprocess.Popen(
            [*command, "--drain-seconds", "2", "--log"], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        while "2 replicas" not in said.read_text() and server.poll() is None:
            time.sleep(0.2)
        assert server.poll() is None, said.read_text()
        yield f"http://127.0.0.1:{port}"
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, said.read_text()
    finally:
        if server.poll() is None:
            server.kill()


def events(said: Path) -> list[dict[str, Any]]:
    """The lines for operators so far."""
    return [json.loads(line) for line in said.read_text().splitlines() if line.startswith("{")]


def ask(url: str, **body: Any) -> Any:
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def replicas() -> list[Any]:
    """Processes of replicas with the model."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("ServeReplica:pqcache:Replica" in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def prompts_for(url: str, each: int) -> dict[str, list[str]]:
    """Prompts by the replica that answers them."""
    found: dict[str, list[str]] = {}
    for i in range(200):
        prompt = f"Number {i} is"
        found.setdefault(ask(url, prompt=prompt, temperature=0, max_tokens=1).headers["x-served-by"], []).append(prompt)
        if len(found) == 2 and min(map(len, found.values())) >= each:
            return {name: prompts[:each] for name, prompts in found.items()}
    raise AssertionError(f"one replica gets all: {found}")


def test_equal_beginnings_share_a_replica(url: str) -> None:
    beginning = "The owl is a bird of the night. " * 20
    assert len({ask(url, prompt=beginning + str(i), **GREEDY).headers["x-served-by"] for i in range(6)}) == 1
    assert len(prompts_for(url, 2)) == 2


def test_answers_refusals_and_figures(url: str) -> None:
    texts = {ask(url, prompt="The owl is", **GREEDY).json()["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 1
    assert httpx.get(f"{url}/health", timeout=30).json() == {"status": "ok"}
    assert httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"] == "tiny"
    refused = ask(url, prompt=[10**9])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    assert httpx.get(f"{url}/nowhere", timeout=30).status_code == 404
    figures = httpx.get(f"{url}/metrics", timeout=30).text
    assert len({line.split('"')[1] for line in figures.splitlines() if line.startswith("pqcache_requests_running{")}) == 2


def test_lines_of_all_replicas_come_to_one_place(url: str, said: Path) -> None:
    time.sleep(1)  # lines of requests before
    before = len(events(said))
    for number in range(12):
        ask(url, prompt=f"{number} {SECRET}", **GREEDY)
    ask(url, prompt=SECRET, max_tokens=10**6)
    httpx.post(f"{url}/v1/completions", content=b" " * 33 * 2**20, timeout=60)
    until = time.monotonic() + 20
    while len([event for event in events(said)[before:] if event["event"] == "http"]) < 14 and time.monotonic() < until:
        time.sleep(0.1)
    assert SECRET not in said.read_text()
    told = events(said)
    assert len({event["replica"] for event in told if event["event"] == "ready"}) == 2
    requests = [event for event in told[before:] if event["event"] == "request"]
    assert [event["tokens"] for event in requests] == [12] * 12
    assert len({event["replica"] for event in requests}) == 2
    assert sorted(event["status"] for event in told[before:] if event["event"] == "http") == [200] * 12 + [400, 413]


def running(url: str) -> float:
    """Requests that all replicas work on."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("pqcache_requests_running{"))


def test_a_client_that_goes_is_forgotten(url: str) -> None:
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={"prompt": "The owl", "stream": True, **LONG}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        assert running(url) == 1
    until = time.monotonic() + 20
    while running(url):
        assert time.monotonic() < until
        time.sleep(0.2)


async def stream(client: Any, url: str, prompt: str, has_begun: asyncio.Event) -> tuple[str, str | None]:
    """(text, code of the error in it)."""
    text, code = "", None
    async with client.stream("POST", f"{url}/v1/completions", json={"prompt": prompt, "stream": True, **LONG}) as answer:
        assert answer.status_code == 200
        lines = [""]
        async for line in answer.aiter_lines():
            lines.append(line)
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                code = event["error"]["code"] if "error" in event else code
                text += "" if "error" in event else event["choices"][0]["text"]
                has_begun.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    return text, code


async def killed_while_streaming(url: str, prompts: list[str]) -> tuple[list[tuple[str, str | None]], list[Any]]:
    async with httpx.AsyncClient(timeout=180) as client:
        begun = [asyncio.Event() for _ in prompts]
        streams = [asyncio.create_task(stream(client, url, *pair)) for pair in zip(prompts, begun, strict=True)]
        await asyncio.gather(*(event.wait() for event in begun))
        whole = [asyncio.create_task(client.post(f"{url}/v1/completions", json={"prompt": p, **LONG})) for p in prompts]
        await asyncio.sleep(0.3)
        os.kill(replicas()[0].pid, signal.SIGKILL)
        return await asyncio.gather(*streams), await asyncio.gather(*whole)


def test_a_replica_that_is_killed(url: str, said: Path) -> None:
    chosen = prompts_for(url, 2)
    prompts = [prompt for each in chosen.values() for prompt in each]
    right = {prompt: ask(url, prompt=prompt, **LONG).json()["choices"][0]["text"] for prompt in prompts}
    streams, whole = asyncio.run(killed_while_streaming(url, prompts))
    broken = [prompt for prompt, (_, code) in zip(prompts, streams, strict=True) if code == "replica_died"]
    assert broken in list(chosen.values())  # all of one replica, none of the other
    for prompt, (text, code) in zip(prompts, streams, strict=True):
        assert right[prompt].startswith(text)
        assert (text == right[prompt]) == (code is None)
    for prompt, answer in zip(prompts, whole, strict=True):  # nothing had been sent: asked again
        assert answer.json()["choices"][0]["text"] == right[prompt]
    until = time.monotonic() + 120
    while len(served := {ask(url, prompt=f"{i} is", **GREEDY).headers["x-served-by"] for i in range(16)}) < 2:
        assert time.monotonic() < until, f"no replica came in place of the killed one: {replicas()}"
        time.sleep(1)
    assert len(served & chosen.keys()) == 1
    assert {"replica_died", "stream_broken"} <= {event["event"] for event in events(said)}
