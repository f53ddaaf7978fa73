"""Many requests at once through transformers' continuous batching, over stock, exact and coded blocks; knows no HTTP.

Prompts are random and all different, so that no block is shared, and what counts as throughput is generated tokens. All
prompts are computed: the blocks hold what the model makes of them. Logits are compared with a plain cache's before anything
is timed.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_pqcache.cache.caches import PagedPQCache
from hf_pqcache.eval.bench.generate import number_bytes, weights_read
from hf_pqcache.eval.bench.kernel import copy_bandwidth
from hf_pqcache.eval.bench.latency import Goal, Served, figures
from hf_pqcache.eval.measure.speed import random_prompt
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.serve.manager import VARIANTS, EngineSettings, make_manager, requests_that_fit

#: Prompt and steps that are compared before; the prompt is longer than the exact window.
CHECK_TOKENS, CHECK_STEPS = 400, 4
#: A running server over a variant -> its address; and what asks it: (address, prompts, new tokens, requests a second, seed).
Start = Callable[[EngineSettings], AbstractContextManager[str]]
Ask = Callable[[str, list[list[int]], int, float, int], list[Served]]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        variant: of VARIANTS. concurrency: requests that are in flight; None is as many as the memory holds.
        requests: of all; None is as many as in flight. rate: requests a second of an open loop over HTTP; None closes the loop.
        compiles: as of EngineSettings.
    """

    variant: str
    prompt_tokens: int
    output_tokens: int
    concurrency: int | None
    requests: int | None = None
    rate: float | None = None
    seed: int = 0
    compiles: bool = False


class LogitsProbe:
    """In place of the engine's logits processors: keeps the scores of each step of the one request that runs.

    Attributes:
        seen: float32 (steps + 1, vocab_size); the last row is for what belongs to no step.
    """

    do_processing = True
    tensors_required = 1

    def __init__(self, steps: int, vocab_size: int, device: torch.device) -> None:
        self.steps = steps
        self.seen = torch.zeros(steps + 1, vocab_size, device=device)

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        pass

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.fill_(self.steps)

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Tensor) -> Tensor:
        arg_storage.fill_(self.steps)
        states = [future.state for future in requests_in_batch if future.has_new_token]
        for column, state in enumerate(states):
            arg_storage[0, column] = min(self.steps, max(0, state.position_offset - len(state.initial_tokens)))
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        self.seen.index_copy_(0, logits_processor_args[0].long(), scores.float())
        return scores


@torch.inference_mode()
def check_logits(model: Any, variant: str, **beside: Any) -> float:
    """Largest relative L2 distance of logits, the engine's against those of a cache that `generate` takes, in plain torch.

    Those of the second request of two alike, as the first one's pages are never stored beside other steps.

    beside: `compress` and `partition` of EngineSettings.

    Raises RuntimeError above 2 %.
    """
    (ids,) = random_prompt(model, 1, CHECK_TOKENS, seed=1)
    sizes = {"cache_tokens": 8 * CHECK_TOKENS, "max_requests": 2, "max_batch_tokens": 512, "shares_prefixes": False}
    settings = EngineSettings(variant, **sizes, **beside)  # type: ignore[arg-type]
    vocab_size = model.get_output_embeddings().weight.shape[0]
    probe = LogitsProbe(CHECK_STEPS, vocab_size, model.device)
    with running(model, replace(settings, context=CHECK_TOKENS + CHECK_STEPS + 1), probe) as manager:
        _, output = answers(manager, [ids.tolist()] * 2, CHECK_STEPS, 1)
    bits = int(variant) if variant.isdigit() else None
    cache: Any = DynamicCache(config=model.config) if bits is None else PagedPQCache(model.config, bits=bits)
    worst, tokens = 0.0, ids
    with mock.patch.dict(os.environ, HF_PQCACHE_KERNEL="torch"):
        for step in range(CHECK_STEPS):
            wanted = model(tokens[None], **cache_kwargs(cache), use_cache=True).logits[0, -1].float()
            worst = max(worst, float((probe.seen[step] - wanted).norm() / wanted.norm()))
            tokens = torch.tensor([output.generated_tokens[step]], device=model.device)
    if not worst < 0.02:
        raise RuntimeError(f"logits over {variant} blocks differ from a plain cache's by {worst:.2%} (2 % expected at most)")
    return worst


@contextmanager
def running(model: Any, settings: EngineSettings, processor: Any = None) -> Iterator[Any]:
    """A started manager that ends, and gives back its memory, with the context. Greedy, and no token ends a request."""
    manager = make_manager(model, settings)
    if processor is not None:
        manager.logit_processor = processor
    try:
        manager.warmup()
        manager.start()
        yield manager
    finally:
        manager.stop(block=True, hard_stop=True)
        manager.destroy()
        del manager
        free()


def answers(manager: Any, prompts: Sequence[list[int]], new_tokens: int, concurrency: int) -> list[Any]:
    """transformers' outputs of all prompts, at most `concurrency` in flight. Raises RuntimeError if the engine ends."""
    waiting, found = list(reversed(prompts)), list[Any]()

    def send() -> None:
        manager.add_request(waiting.pop(), max_new_tokens=new_tokens, record_timestamps=True, eos_token_id=-1)

    for _ in range(min(concurrency, len(waiting))):
        send()
    while len(found) < len(prompts):
        output = manager.get_result(timeout=1)
        if output is None:
            if not manager.is_running():
                raise RuntimeError("the engine has ended before its requests")
            continue
        found.append(output)
        if waiting:
            send()
    return found


def closed_loop(model: Any, case: Case, goal: Goal) -> dict[str, Any]:
    """A row: requests in flight replaced as they end."""
    context = case.prompt_tokens + case.output_tokens
    settings = _settings(case, case.concurrency or 1024)
    began = time.perf_counter()
    with running(model, settings) as manager:
        fit = requests_that_fit(manager, context)
        concurrency = case.concurrency or fit
        count = case.requests or concurrency
        prompts = random_prompt(model, count + 2, case.prompt_tokens, case.seed).tolist()
        # What is made when first used is made here.
        first = min(answers(manager, [prompts.pop(), prompts.pop()], 4, 2), key=lambda one: one.timestamps[0]).timestamps[0]
        found = answers(manager, prompts, case.output_tokens, concurrency)
        blocks = manager.batch_processor.cache.num_blocks
        told = manager.stats() if hasattr(manager, "stats") else {}
    served = [Served(case.prompt_tokens, one.created_time, one.timestamps or [], one.error) for one in found]
    begun_anew = sum(one.error is None and len(one.timestamps or []) < case.output_tokens for one in found)
    row: dict[str, Any] = {"first_token_s": first - began}
    row |= {
        "in_flight": min(concurrency, count),
        "requests_that_fit": fit,
        "blocks": blocks,
        "begun_anew": begun_anew,
        "engine": told,
    }
    return row | figures(served, goal)


def floor_ms(model: Any, case: Case, in_flight: int, bandwidth: float) -> float:
    """Milliseconds of a step of all requests, if it did nothing but read: weights once, and half-grown answers' caches."""
    config, name = model.config.get_text_config(), {"4": "pq", "3": "pq-3bit", "2": "pq-2bit"}.get(case.variant, "dynamic")
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    held = in_flight * (case.prompt_tokens + case.output_tokens / 2)
    return (weights_read(model) + held * numbers * number_bytes(name, config)) / bandwidth * 1e3


def open_loop(model: Any, case: Case, goal: Goal, start: Start, ask: Ask) -> dict[str, Any]:
    """A row: requests come over HTTP when they come, whatever the server does meanwhile."""
    assert case.rate is not None
    count = case.requests or 64
    prompts = random_prompt(model, count + 1, case.prompt_tokens, case.seed).tolist()
    settings = _settings(case, case.concurrency or 256)
    with start(settings) as url:
        ask(url, [prompts.pop()], 4, 1e3, case.seed)
        served = ask(url, prompts, case.output_tokens, case.rate, case.seed)
    free()
    return figures(served, goal)


def _settings(case: Case, most: int) -> EngineSettings:
    context = case.prompt_tokens + case.output_tokens
    sizes = {"context": context, "longest_prompt": case.prompt_tokens, "max_requests": most}
    return EngineSettings(case.variant, **sizes, shares_prefixes=False, compiles=case.compiles)  # type: ignore[arg-type]


def bench_serve(
    model: Any,
    name: str,
    cases: Sequence[Case],
    goal: Goal,
    *,
    start: Start,
    ask: Ask,
    is_checked: bool = True,
    note: Callable[[str], None] = print,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each case; one that runs out of memory has an "error".

    Besides what `figures` tells, rows of a closed loop have first_token_s (from before the engine was made), requests_that_fit,
    begun_anew (thrown out for room), and on a GPU floor_ms, what a step's reading takes at the bandwidth of a copy.

    Args:
        name: of the model, for rows. is_checked: whether logits are compared first.

    Raises RuntimeError if logits are wrong.
    """
    bandwidth = copy_bandwidth() if model.device.type == "cuda" else None
    told = conditions(model, name) | ({} if bandwidth is None else {"copy_tb_per_s": bandwidth / 1e12})
    for variant in dict.fromkeys(case.variant for case in cases):
        if is_checked:
            note(f"{variant}: logits differ from a plain cache's by {check_logits(model, variant):.1e}")
        for case in (case for case in cases if case.variant == variant):
            free()
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            row: dict[str, Any] = {"kind": "closed" if case.rate is None else "open", **asdict(case), "asked": asdict(case)}
            began = time.perf_counter()
            try:
                row |= closed_loop(model, case, goal) if case.rate is None else open_loop(model, case, goal, start, ask)
            except (MemoryError, torch.OutOfMemoryError) as error:
                row["error"] = f"out of memory: {' '.join(str(error).split())[:200]}"
            if bandwidth is not None:
                if "in_flight" in row:
                    row["floor_ms"] = floor_ms(model, case, row["in_flight"], bandwidth)
                row["peak_bytes"] = torch.cuda.max_memory_allocated(model.device)
            yield row | {"took_s": time.perf_counter() - began} | told


def conditions(model: Any, name: str) -> dict[str, Any]:
    """What a row of requests at once was measured with; `name` is the model's."""
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "gpu": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "",
        "versions": {package: version(package) for package in ("hf-pqcache", "torch", "transformers")},
    }


def free() -> None:
    """What nobody holds any more goes back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


__all__ = ["VARIANTS", "Case", "Goal", "Served", "bench_serve"]
