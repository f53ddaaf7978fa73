"""A replica that Ray takes away hands what it has stored to the one that gets its requests."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("ray.serve", reason="pip install 'hf-pqcache[ray]'")
import httpx
from ray.serve.config import AutoscalingConfig

from hf_pqcache import demo
from hf_pqcache.eval.session.models import load_model
from hf_pqcache.serve import replicas
from hf_pqcache.serve.manager import EngineSettings
from hf_pqcache.serve.service import Limits

pytestmark = pytest.mark.slow
SETTINGS = EngineSettings("4", cache_tokens=8192, page_size=16, max_requests=8, max_batch_tokens=128)
#: Seconds without requests after which Ray takes one of two away.
IDLE_S = 8
GREEDY = {"temperature": 0, "max_tokens": 12}


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two replicas, one of which Ray takes away soon."""
    quick = {"initial_replicas": 2, "downscale_delay_s": IDLE_S, "look_back_period_s": 2}
    monkeypatch.setattr(replicas, "AutoscalingConfig", partial(AutoscalingConfig, **quick))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fleet = replicas.Fleet(1, 2)
    app = replicas.application(
        partial(load_model, str(demo.MODEL), dtype="float32", device="cpu"), "tiny", SETTINGS, Limits(drain_s=5), fleet=fleet
    )
    replicas.start(app, "127.0.0.1", port, fleet)
    yield f"http://127.0.0.1:{port}"
    begun = time.monotonic()
    replicas.stop()
    assert time.monotonic() - begun < 15  # nobody waits for heirs where all end


def figures(url: str, name: str) -> dict[str, float]:
    """By replica."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return {line.split('"')[1]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")}


def ask(url: str, prompt: str) -> tuple[str, str]:
    """(who answered, what)."""
    answer: Any = httpx.post(f"{url}/v1/completions", json={"prompt": prompt, **GREEDY}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-served-by"], answer.json()["choices"][0]["text"]


def test_a_replica_that_is_taken_away(url: str) -> None:
    text = demo.TEXT.read_text(encoding="utf-8")
    prompts = [text[at : at + 1200] for at in range(4000, 40000, 3000)]
    asked = {prompt: ask(url, prompt) for prompt in prompts}
    assert len({who for who, _ in asked.values()}) == 2
    right = {prompt: ask(url, prompt)[1] for prompt in prompts}  # from codes
    hits = "pqcache_prefix_hit_tokens_total"
    until = time.monotonic() + 90
    while len(left := figures(url, hits)) == 2:
        assert time.monotonic() < until
        time.sleep(0.5)
    (heir,) = left
    while figures(url, "pqcache_prefix_imported_tokens_total")[heir] < 100:
        assert time.monotonic() < until
        time.sleep(0.5)
    orphans = [prompt for prompt, (who, _) in asked.items() if who != heir]
    for prompt in orphans:
        before = figures(url, hits)[heir]
        assert ask(url, prompt) == (heir, right[prompt])
        assert figures(url, hits)[heir] - before > 100
