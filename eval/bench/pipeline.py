"""What it gains or costs to store prompts beside later steps, on a stream or on a part of the device; knows no HTTP.

Whether blocks hold codes, and whether prompts get there within their step, on a stream or on a green context, are varied
apart. Prompts are random and all different, and what counts as throughput is generated tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_pqcache.batching.streams import Partition
from hf_pqcache.eval.bench.latency import Goal, Served, figures
from hf_pqcache.eval.bench.serve import answers, check_logits, conditions, free, running
from hf_pqcache.eval.measure.speed import random_prompt
from hf_pqcache.serve.manager import EngineSettings

#: Variant -> what blocks hold, and how prompts get there.
VARIANTS = {
    "baseline": ("exact", "inline"),
    "coded": ("4", "inline"),
    "compression-only": ("4", "stream"),
    "greenctx-only": ("exact", "partition"),
    "triad": ("4", "partition"),
}


@dataclass(frozen=True)
class Way:
    """One engine: a variant, and how it divides the device."""

    variant: str
    partition: Partition | None = None


@dataclass(frozen=True)
class Load:
    """What an engine is given: `num_batches` times `batch` requests, `batch` of them at a time."""

    context: int
    output_tokens: int
    batch: int
    num_batches: int


def ways(variants: Sequence[str], partitions: Sequence[Partition]) -> list[Way]:
    """Variants that divide the device come once with each partition."""
    found: list[Way] = []
    for name in variants:
        divides = VARIANTS[name][1] == "partition"
        found += [Way(name, partition) for partition in partitions] if divides else [Way(name)]
    return found


def measure(manager: Any, model: Any, load: Load, seed: int) -> dict[str, Any]:
    """A row of one load, by a manager that has been used before."""
    count = load.batch * load.num_batches
    prompts = random_prompt(model, count, load.context, seed).tolist()
    before = _compression(manager)
    found = answers(manager, prompts, load.output_tokens, load.batch)
    after = _compression(manager)
    served = [Served(len(one.prompt_ids), one.created_time, one.timestamps or [], one.error) for one in found]
    done = {name: after[name] - before.get(name, 0) for name in ("jobs", "beside", "waits", "within", "failed_jobs")}
    told = {name: after[name] for name in ("lane", "greenctx_available", "greenctx_reason", "sm_counts")}
    sent = sum(one.prompt_tokens for one in served)
    return asdict(load) | {"prompt_tokens": sent, "compression": done} | told | figures(served, Goal())


def _compression(manager: Any) -> dict[str, Any]:
    found: dict[str, Any] = manager.stats()["compression"]
    return found


def settings_of(way: Way, loads: Sequence[Load], memory_share: float | None) -> EngineSettings:
    """Of an engine that has room for each of the loads."""
    variant, compress = VARIANTS[way.variant]
    return EngineSettings(
        variant,
        context=max(load.context + load.output_tokens for load in loads),
        longest_prompt=max(load.context for load in loads),
        max_requests=max(load.batch for load in loads),
        shares_prefixes=False,
        compress=compress,
        partition=way.partition,
        memory_share=memory_share,
    )


def bench_pipeline(
    model: Any,
    name: str,
    asked: Sequence[Way],
    loads: Sequence[Load],
    *,
    memory_share: float | None = None,
    seed: int = 0,
    is_checked: bool = True,
    note: Callable[[str], None] = print,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each way and load; one that fails for want of memory has an "error".

    Rows have what `figures` tells, prompt_tokens (as sent, of all requests), greenctx_available, greenctx_reason, sm_counts,
    and in "compression" what became of prompts, see `Compression.stats`. An engine serves all loads of a way in turn.

    Args:
        name: of the model, for rows. memory_share: of EngineSettings. is_checked: whether logits are compared first.

    Raises RuntimeError if logits are wrong.
    """
    told, is_on_gpu = conditions(model, name), model.device.type == "cuda"
    for way in asked:
        variant, compress = VARIANTS[way.variant]
        if is_checked:
            distance = check_logits(model, variant, compress=compress, partition=way.partition)
            note(f"{way.variant}: logits differ from a plain cache's by {distance:.1e}")
        row = {"variant": way.variant, "partition": None if way.partition is None else asdict(way.partition)} | told
        left = list(loads)
        try:
            with running(model, settings_of(way, loads, memory_share)) as manager:
                # What is made when first used is made here, and the first pages are.
                answers(manager, random_prompt(model, 3, max(load.context for load in loads), seed + 1).tolist(), 4, 2)
                while left:
                    if is_on_gpu:
                        torch.cuda.reset_peak_memory_stats(model.device)
                    began = time.perf_counter()
                    measured = measure(manager, model, left[0], seed)
                    if is_on_gpu:
                        measured["peak_bytes"] = torch.cuda.max_memory_allocated(model.device)
                    left.pop(0)
                    yield row | measured | {"took_s": time.perf_counter() - began}
        except (MemoryError, torch.OutOfMemoryError) as error:
            why = f"out of memory: {' '.join(str(error).split())[:200]}"
            yield from (row | asdict(load) | {"error": why} for load in left)
        free()
