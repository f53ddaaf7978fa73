"""A tiny model behind HTTP, in this process, and what it should answer; knows how our server is started."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pqcache import demo
from hf_pqcache.serve.engine import EngineSettings
from hf_pqcache.serve.server import Running
from hf_pqcache.serve.service import Limits, Service

SETTINGS = {"cache_tokens": 4096, "page_size": 16, "max_requests": 16, "max_batch_tokens": 128}


@dataclass
class Served:
    """A server that runs.

    Attributes:
        url: its address. model: what it serves; do not run it beside the server. drain: as SIGTERM does.
    """

    url: str
    model: Any
    tokenizer: Any
    service: Service
    drain: Callable[[], None]

    @cached_property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def completions(self, **body: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json=body)

    def texts(self, **body: Any) -> list[str]:
        answer = self.completions(**body)
        assert answer.status_code == 200, answer.text
        return [choice["text"] for choice in answer.json()["choices"]]

    def events(self, path: str = "/v1/completions", **body: Any) -> list[Any]:
        """What a stream sends, its last line left out."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    def metric(self, name: str) -> float:
        found = [line.rpartition(" ")[2] for line in self.client.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(map(float, found))

    def decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def tiny() -> tuple[Any, Any]:
    """The embedded model in float32, whose rows do not depend on their company, and its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    return model.eval(), tokenizer


@contextmanager
def served(limits: Limits | None = None, api_key: str | None = None, **sizes: Any) -> Iterator[Served]:
    """The embedded model from when it is ready."""
    model, tokenizer = tiny()
    settings = EngineSettings(**{**SETTINGS, **sizes})
    running = Running(lambda: (model, tokenizer), "tiny", settings, limits or Limits(), api_key=api_key)
    with running.background() as url:
        found = Served(url, model, tokenizer, running.service, running.server.drain)
        try:
            yield found
        finally:
            found.client.close()
