"""Sends requests to an OpenAI-compatible server at random moments and notes when tokens come; knows no model of ours.

A process of its own, so that it takes no time from the server it measures: `ask` starts one, which reads what to send as
JSON and answers with what came.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from typing import Any

from hf_pqcache.eval.bench.latency import Served


def ask(url: str, prompts: list[list[int]], new_tokens: int, rate: float, seed: int) -> list[Served]:
    """Send every prompt (token ids) for greedy answers of exactly `new_tokens` tokens, `rate` a second on average (Poisson)."""
    order = json.dumps({"url": url, "prompts": prompts, "new_tokens": new_tokens, "rate": rate, "seed": seed})
    done = subprocess.run([sys.executable, "-m", __name__], input=order, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the client failed: {done.stderr.strip().splitlines()[-1]}")
    return [Served(**one) for one in json.loads(done.stdout)]


def moments(count: int, rate: float, seed: int) -> list[float]:
    """Seconds after the beginning at which requests are sent: gaps are exponential."""
    rng, found = random.Random(seed), [0.0]
    while len(found) < count:
        found.append(found[-1] + rng.expovariate(rate))
    return found


async def send(client: Any, prompt: list[int], new_tokens: int, at: float) -> dict[str, Any]:
    """One request as a stream. A chunk that brings several tokens gives them its moment."""
    await asyncio.sleep(max(0.0, at - time.perf_counter()))
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    begun, tokens = time.perf_counter(), list[float]()
    found: dict[str, Any] = {"prompt_tokens": len(prompt), "begun": begun, "tokens": tokens}
    try:
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True, "stream_options": options}) as answer:
            if answer.status_code != 200:
                return {**found, "error": f"{answer.status_code}: {(await answer.aread()).decode()[:200]}"}
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now, chunk = time.perf_counter(), json.loads(line[6:])
                if "error" in chunk:
                    return {**found, "error": chunk["error"]["message"]}
                tokens += [now] * (chunk["usage"]["completion_tokens"] - len(tokens))
    except OSError as error:
        return {**found, "error": f"{type(error).__name__}: {error}"}
    return found if len(tokens) == new_tokens else {**found, "error": f"{len(tokens)} of {new_tokens} tokens came"}


async def load(url: str, prompts: list[list[int]], new_tokens: int, rate: float, seed: int) -> list[dict[str, Any]]:
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        begin = time.perf_counter() + 0.1
        times = moments(len(prompts), rate, seed)
        return await asyncio.gather(
            *(send(client, prompt, new_tokens, begin + at) for prompt, at in zip(prompts, times, strict=True))
        )


def main() -> None:
    print(json.dumps(asyncio.run(load(**json.load(sys.stdin)))))


if __name__ == "__main__":
    main()
