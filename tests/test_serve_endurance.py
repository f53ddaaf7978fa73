"""The server for minutes (SOAK_MINUTES) among 64 clients of all kinds, and what a kill leaves; not in a run of all tests."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from served import GREEDY, PROMPTS, answers_of_generate, crowd, is_idle, served

from hf_pqcache.serve.service import Limits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
#: `.ci/soak` asks for an hour.
MINUTES, CLIENTS, PORT = int(os.environ.get("SOAK_MINUTES", 10)), 64, 18765


def used() -> int:
    """Bytes that the process holds, without what malloc only keeps for later: that grows with each new shape of a step."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


@pytest.mark.parametrize("variant", ["4", "stock"])
def test_minutes_of_a_crowd(variant: str) -> None:
    """No wrong text, no request, slot or block lost, memory flat."""
    expected = answers_of_generate(variant)
    sizes = {"cache_tokens": 8192, "max_requests": CLIENTS, "max_batch_tokens": 512}
    with served(Limits(queue=4096), variant=variant, shares_prefixes=variant == "stock", **sizes) as server:
        memory = []
        for _ in range(MINUTES):
            asyncio.run(crowd(server, expected, clients=CLIENTS, seconds=60))
            assert is_idle(server)
            memory.append(used())
        assert memory[-1] < memory[MINUTES // 2] + 32 * 2**20, [m >> 20 for m in memory]


@contextmanager
def process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    line = [sys.executable, "-m", "hf_pqcache", "serve", "tiny", "--dtype", "float32", "--port", str(PORT), "--quiet"]
    with (tmp_path / "log").open("ab") as log:
        started = subprocess.Popen(line, stdout=log, stderr=log)
    try:
        for _ in range(600):
            with suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{PORT}/health").status_code == 200:
                    break
            time.sleep(0.1)
        yield started
    finally:
        started.kill()
        started.wait()


def test_a_kill_loses_what_was_in_flight_and_nothing_else(tmp_path: Path) -> None:
    url, body = f"http://127.0.0.1:{PORT}/v1/completions", {"prompt": PROMPTS[0], **GREEDY}
    with process(tmp_path) as server:
        before = httpx.post(url, json=body).json()["choices"][0]["text"]
        long = {"prompt": PROMPTS[0], "max_tokens": 8000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url, json=long) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.kill()
            with pytest.raises(httpx.HTTPError):
                list(lines)
    with process(tmp_path) as server:
        assert httpx.post(url, json=body).json()["choices"][0]["text"] == before
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0
    assert b"Traceback" not in (tmp_path / "log").read_bytes()
