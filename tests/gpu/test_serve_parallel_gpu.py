"""A server on two GPUs that share a model: graphs that hold collectives, and nobody waits in one for a process that is gone."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from serving_processes import figure, shared

from hf_pqcache.backends import jit
from hf_pqcache.batching import support
from hf_pqcache.serve.group import FOLLOWER

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.device_count() < 2 or jit.why_unavailable() is not None,
        reason="needs two GPUs and CuPy",
    ),
]
if why := support.why_unsupported():
    pytest.skip(why, allow_module_level=True)
SIZES = (
    "--dtype",
    "float16",
    "--cache-tokens",
    "16K",
    "--page-size",
    "64",
    "--max-requests",
    "16",
    "--max-batch-tokens",
    "512",
)
LONG = {"prompt": "The owl is a bird of the night. " * 40, "max_tokens": 3000, "ignore_eos": True, "stream": True}


def test_answers_repeat_and_the_server_ends_when_told(tmp_path: Path) -> None:
    with shared(tmp_path, sizes=SIZES) as (client, server, said):
        body = {"prompt": [LONG["prompt"], "In 1920"], "max_tokens": 40, "temperature": 0}
        first, second = (client.post("/v1/completions", json=body).json()["choices"] for _ in range(2))
        assert [choice["text"] for choice in first] == [choice["text"] for choice in second]
        drawn = {**body, "temperature": 1.0, "seed": 5, "repetition_penalty": 1.2}
        assert all(choice["text"] for choice in client.post("/v1/completions", json=drawn).json()["choices"])
        for _ in range(3):  # clients that go, with their places
            with client.stream("POST", "/v1/completions", json={**LONG, "presence_penalty": 0.5}) as answer:
                next(answer.iter_lines())
        until = time.monotonic() + 20
        while figure(client, "pqcache_requests_running"):
            assert time.monotonic() < until
            time.sleep(0.1)
        assert client.post("/v1/completions", json=body).json()["choices"][1]["text"] == first[1]["text"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, said.read_text()


def test_a_process_that_is_killed_ends_the_server(tmp_path: Path) -> None:
    with shared(tmp_path, sizes=SIZES) as (client, server, said):
        (follower,) = [one for one in psutil.Process(server.pid).children(recursive=True) if FOLLOWER in one.cmdline()]
        with client.stream("POST", "/v1/completions", json=LONG) as answer:
            lines = answer.iter_lines()
            next(lines)
            begun = time.monotonic()
            follower.kill()
            rest = [line for line in lines if line]
        assert "SIGKILL" in json.loads(rest[-2].removeprefix("data: "))["error"]["message"]
        assert server.wait(30) == 1, said.read_text()
        assert time.monotonic() - begun < 30
