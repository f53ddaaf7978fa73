"""A server whose model two processes share answers as one process does, and never waits for one of them that is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from served import GREEDY, PROMPTS, eventually, served, tiny
from serving_processes import figure, shared

from hf_pqcache.serve import group as groups
from hf_pqcache.serve.group import Group, LostError

pytestmark = pytest.mark.usefixtures("one_thread")
#: Each way in which a choice may depend on what is kept in this process: draws, histories, a prompt in chunks.
ASKED: tuple[dict[str, Any], ...] = (
    {"prompt": list(PROMPTS), **GREEDY},
    {"prompt": PROMPTS[1], "max_tokens": 40, "seed": 5, "n": 3},
    {"prompt": PROMPTS[0], "max_tokens": 40, "seed": 6, "repetition_penalty": 1.3, "presence_penalty": 0.5, "n": 2},
)


def untied(folder: Path) -> str:
    """The embedded model with an output layer of its own, which processes share, too."""
    model, tokenizer = tiny()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder / "untied")
    tokenizer.save_pretrained(folder / "untied")
    return str(folder / "untied")


def texts(client: Any) -> list[list[str]]:
    answers = [client.post("/v1/completions", json=body) for body in ASKED]
    return [[choice["text"] for choice in answer.json()["choices"]] for answer in answers]


@pytest.mark.slow
def test_two_processes_answer_as_one_and_end_with_it(tmp_path: Path) -> None:
    with served(cache_tokens=4096) as alone:
        expected = texts(alone.client)
    with shared(tmp_path, model=untied(tmp_path)) as (client, server, said):
        assert texts(client) == expected
        body = {"prompt": PROMPTS[0], "max_tokens": 3000, "ignore_eos": True, "stream": True, "repetition_penalty": 1.1}
        for _ in range(3):
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        assert eventually(lambda: figure(client, "pqcache_requests_running") + figure(client, "pqcache_request_bytes") == 0)
        assert texts(client) == expected  # after cancelled ones, with their places
        (follower,) = psutil.Process(server.pid).children()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0, said.read_text()
        assert not follower.is_running()


@pytest.mark.slow
@pytest.mark.parametrize("who", ["follower", "leader"])
def test_nobody_waits_for_a_process_that_was_killed(who: str, tmp_path: Path) -> None:
    with shared(tmp_path) as (client, server, said):
        (follower,) = psutil.Process(server.pid).children()
        body = {"prompt": PROMPTS[0], "max_tokens": 3000, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            began = time.monotonic()
            if who == "leader":
                server.kill()
                assert eventually(lambda: not follower.is_running() or follower.status() == "zombie")
                return
            follower.kill()
            rest = [line for line in lines if line]
        told = json.loads(rest[-2].removeprefix("data: "))["error"]["message"]
        assert (rest[-1], "process 1 of the 2" in told, "SIGKILL" in told) == ("data: [DONE]", True, True)
        assert server.wait(10) == 1
        assert time.monotonic() - began < 10
    assert said.read_text().splitlines()[-1] == "Error: process 1 of the 2 that share the model was ended by SIGKILL"


@pytest.mark.slow
def test_a_replica_of_two_processes_is_replaced_as_a_whole(tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="pip install 'hf-pqcache[ray]'")
    with shared(tmp_path, "--replicas", "1") as (client, server, _), ThreadPoolExecutor() as pool:
        body = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 300, "ignore_eos": True}
        expected = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        answer = pool.submit(client.post, "/v1/completions", json=body)
        assert eventually(lambda: figure(client, "pqcache_requests_running") == 1)
        (follower,) = [one for one in psutil.Process(server.pid).children(recursive=True) if groups.FOLLOWER in one.cmdline()]
        follower.kill()
        assert answer.result().json()["choices"][0]["text"] == expected, "nothing had been sent, so it was asked again"


@pytest.mark.slow
def test_replicas_that_cannot_be_made_say_why() -> None:
    pytest.importorskip("ray.serve", reason="pip install 'hf-pqcache[ray]'")
    command = [sys.executable, "-m", "hf_pqcache", "serve", "tiny", "--replicas", "1", "--tp", "3", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    told = "Error: no replica could be started: ValueError: 2 KV heads cannot be divided among 3 processes"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, told)


@pytest.fixture
def follower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that followers of this test run: it says what it was told, and ends when told so, or with its leader."""
    program = "import pickle, sys\nhow = pickle.load(sys.stdin.buffer)\nprint(how, flush=True)\n"
    program += "sys.exit(how) if isinstance(how, int) else sys.stdin.read()\n"
    (tmp_path / "a_follower.py").write_text(program)
    monkeypatch.setattr(groups, "FOLLOWER", "a_follower")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def test_a_follower_that_ends_is_told_of_once_with_its_last_words(follower: Path) -> None:
    lost: list[LostError] = []
    group = Group(3, 7, lost.append)
    assert group.lost.wait(30)
    group.end()
    assert [str(error)[9:] for error in lost] == [" of the 3 that share the model ended with code 7: 7"] or "7: 7" in str(
        lost[0]
    )
    assert len(lost) == 1
    assert not any(name in os.environ for name in groups.WORLD)


def test_followers_end_with_their_group_and_nobody_is_lost(follower: Path) -> None:
    lost = threading.Event()
    group = Group(2, "wait", lambda error: lost.set())
    assert os.environ["RANK"] == "0"
    group.end()
    assert [process.poll() for process in group.processes] == [0]
    assert not lost.is_set()
