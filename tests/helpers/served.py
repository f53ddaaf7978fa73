"""A tiny model behind HTTP, in this process, and what it should answer; knows how our server is started."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_pqcache import PagedPQCache, demo, pressed
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.serve.manager import EngineSettings
from hf_pqcache.serve.server import Running
from hf_pqcache.serve.service import Limits, Service

#: Longer than the exact window, two of them: their beginnings become codes.
PROMPTS = ("The owl is", "In 1920", *(demo.TEXT.read_text(encoding="utf-8")[at : at + 900] for at in (5000, 20000)))
GREEDY = {"temperature": 0, "max_tokens": 24}
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
def served(
    limits: Limits | None = None,
    api_key: str | None = None,
    prefixes: Path | None = None,
    load: Callable[[], tuple[Any, Any]] = tiny,
    **sizes: Any,
) -> Iterator[Served]:
    """The embedded model, or another one, from when it is ready."""
    model, tokenizer = load()
    settings = EngineSettings(**{**SETTINGS, **sizes})
    running = Running(lambda: (model, tokenizer), "tiny", settings, limits or Limits(), api_key=api_key, prefixes=prefixes)
    with running.background() as url:
        found = Served(url, model, tokenizer, running.service, running.server.drain)
        try:
            yield found
        finally:
            found.client.close()


def answers_of_generate(variant: str, press: str | None = None) -> dict[str, list[int]]:
    """What `generate` goes on with after each of PROMPTS, greedily, over the cache of the same kind (variant 4 or stock)."""
    model, tokenizer = tiny()
    with nullcontext() if press is None else pressed(model, press):
        return _answers(model, tokenizer, variant)


def _answers(model: Any, tokenizer: Any, variant: str) -> dict[str, list[int]]:
    found = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        cache: Any = PagedPQCache(model.config, bits=4, page_size=16) if variant == "4" else DynamicCache(config=model.config)
        answer = model.generate(ids, **cache_kwargs(cache), max_new_tokens=24, do_sample=False)
        found[prompt] = answer[0, ids.shape[1] :].tolist()
    return found


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if holds():
            return True
        time.sleep(0.05)
    return False


def is_idle(server: Served) -> bool:
    engine = server.service.engine
    assert engine is not None
    state = engine.state()
    return (state["waiting"], state["running"], len(engine.sampler.free), server.service.runs) == (0, 0, engine.slots, set())


async def crowd(server: Served, expected: dict[str, list[int]], clients: int, seconds: float) -> None:
    """Clients that ask, go away in the middle, or send nonsense, each over and over. Every text is checked."""
    until = time.monotonic() + seconds
    texts = {prompt: server.decoded(ids) for prompt, ids in expected.items()}
    done = {"right": 0, "gone": 0, "refused": 0}

    async def one(number: int) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, verify=False) as client:
            while time.monotonic() < until:
                prompt = rng.choice(PROMPTS)
                body = {"prompt": prompt, "stream": True, **GREEDY}
                kind = rng.choice(["right", "right", "gone", "refused", "sampled"])
                if kind == "refused":
                    content = rng.choice([b"{", b"[]", b'{"prompt": [99999]}', b'{"prompt": "a", "top_p": 7}'])
                    answer = await client.post("/v1/completions", content=content)
                    assert answer.status_code == 400
                    done[kind] += 1
                    continue
                if kind == "sampled":
                    body |= {"temperature": 1, "top_k": 5, "repetition_penalty": 1.2}
                text, seen = "", 0
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    assert answer.status_code == 200
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            text += json.loads(line[6:])["choices"][0]["text"]
                            seen += 1
                        if kind == "gone" and seen == 5:
                            break
                if kind == "right":
                    assert text == texts[prompt]
                elif kind == "gone":
                    assert texts[prompt].startswith(text)
                done[kind if kind in done else "right"] += 1

    await asyncio.gather(*(one(number) for number in range(clients)))
    assert min(done.values()) > 0
    assert await asyncio.to_thread(eventually, lambda: is_idle(server))
    engine = server.service.engine
    assert engine is not None
    assert engine.samplings == {}
    assert engine.manager.output_router.result_handlers == {}
    assert eventually(engine.manager.output_router.output_queue.empty)
