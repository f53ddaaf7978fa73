"""Times `generate` on models with random weights in the shape of known ones, under our cache and the fp16 ones.

Contexts are written into the caches as random keys and values instead of being prefilled: a decode step's time does
not depend on what they are. One run measures the copy bandwidth first and derives the floor of a step (weights and
cache over bandwidth), checks our logits against plain torch, then times every cache.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_pqcache.cache.base import PagedCache
from hf_pqcache.cache.caches import PagedPQCache
from hf_pqcache.eval.measure.speed import deferred_stop_check, timed_generate
from hf_pqcache.eval.session.caches import CacheSpec
from hf_pqcache.models.names import cache_kwargs

SPARE_TOKENS = 256  # room for what a benchmark generates


@dataclass(frozen=True)
class Shape:
    """A model to imitate; hidden size 4096, 32 layers, 32 query heads, head_dim 128."""

    kv_heads: int
    intermediate_size: int
    vocab_size: int
    layers: int = 32

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=4096,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=32,
            num_key_value_heads=self.kv_heads,
            head_dim=128,
            vocab_size=self.vocab_size,
            max_position_embeddings=262144,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            dtype=torch.float16,
        )


SHAPES = {"llama-3.1-8b": Shape(8, 14336, 128256), "llama-2-7b": Shape(32, 11008, 32000)}
#: (shape, tokens) that a full run times.
CASES = (("llama-3.1-8b", 32768), ("llama-3.1-8b", 131072), ("llama-2-7b", 32768))
#: Ours, the fp16 ones, and transformers' quantized ones where their libraries are installed.
CACHES = ("pq", "pq-3bit", "pq-2bit", "pq-eager", "pq-offload", "paged-kv", "static", "dynamic", "quanto", "hqq", "fp8")
#: Operating points of ours; 4 where this does not say.
BITS = {"pq-3bit": 3, "pq-2bit": 2}


def build_model(shape: Shape, device: str = "cuda") -> Any:
    """A causal LM of that shape with random float16 weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(shape.config())
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def make_cache(name: str, config: Any, tokens: int) -> Any:
    """A cache for `tokens` tokens of one sequence and what a benchmark generates on top."""
    total = tokens + SPARE_TOKENS
    if not name.startswith("pq"):
        return CacheSpec.parse(name, config.head_dim).make(SimpleNamespace(config=config), total)
    compile = False if name == "pq-eager" else None
    bits, is_offloaded = BITS.get(name, 4), name == "pq-offload"
    return PagedPQCache(config, bits=bits, expected_tokens=total, compile=compile, offload=is_offloaded)


def number_bytes(name: str, config: Any) -> float:
    """Bytes that a step reads for each key or value number of a cache."""
    spec = CacheSpec.parse(f"pq:{BITS.get(name, 4)}" if name.startswith("pq") else name, config.head_dim)
    return (spec.true_bits(config) or 16.0) / 8


def weights_read(model: Any) -> int:
    """Bytes of weights that a step reads; of the embeddings it is a row, unless they are the head, too."""
    embeddings = model.get_input_embeddings().weight
    is_head = model.get_output_embeddings().weight is embeddings
    return sum(p.numel() * p.element_size() for p in model.parameters()) - (0 if is_head else embeddings.nbytes)


def fill(cache: Any, config: Any, tokens: int, device: str = "cuda", seed: int = 0) -> None:
    """Give every layer `tokens` random keys and values."""
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    generator = torch.Generator(device).manual_seed(seed)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, generator=generator, device=device, dtype=torch.float16) for _ in range(2))
        cache.update(keys, values, layer)
        if isinstance(cache, PagedCache):
            cache.layers[layer].commit()  # as attention does when it has seen them
        del keys, values  # before the next layer's are made


def generate_times(model: Any, cache: Any, tokens: int, new_tokens: int) -> tuple[float, list[float]]:
    """(seconds to the first new token, milliseconds of each later one) of a call of generate on a filled cache."""
    ids = torch.randint(10, model.config.vocab_size, (1, tokens + 1), device=model.device)
    times = timed_generate(model, ids, cache, new_tokens, eos_token_id=None)
    return times[0], [(b - a) * 1e3 for a, b in pairwise(times)]


def gpu_busy_ms(model: Any, cache: Any, few: int = 8, many: int = 24) -> float:
    """Milliseconds a token during which the GPU does anything; the rest of a step is generate's own work on the host.

    Two profiled calls that differ in their number of tokens only: their common first step cancels.
    """

    def busy(new_tokens: int) -> float:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            generate_times(model, cache, int(cache.get_seq_length()), new_tokens)
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        total = until = 0.0
        for start, end in spans:
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total / 1e3

    return (busy(many) - busy(few)) / (many - few)


@torch.inference_mode()
def check_logits(model: Any, tokens: int = 2000, steps: int = 3) -> float:
    """Largest relative L2 distance of decode logits, kernels against plain torch over the same codes.

    Raises RuntimeError above 2 %: each of 32 layers rounds to float16 differently.
    """
    config = model.config
    cache = make_cache("pq-eager", config, tokens)
    fill(cache, config, tokens)
    worst = 0.0
    for step in range(steps):
        ids = torch.full((1, 1), 100 + step, device=model.device)
        twin = _with_torch_attention(model, cache, ids)
        logits = model(ids, **cache_kwargs(cache)).logits.float()
        worst = max(worst, float((logits - twin).norm() / twin.norm()))
    if not worst < 0.02:
        raise RuntimeError(f"decode through the kernels differs from plain torch by {worst:.2%} (2 % expected at most)")
    return worst


def _with_torch_attention(model: Any, cache: PagedPQCache, ids: Tensor) -> Tensor:
    """Logits of one step with the plain-torch attention over the same storage; the cache is left as it was."""
    states = list(cache.storage.layers.states.values())
    chosen = [state.choices for state in states]
    try:
        for state in states:
            state.choices = {}  # to be chosen again
        with mock.patch.dict(os.environ, HF_PQCACHE_KERNEL="torch"):
            logits: Tensor = model(ids, **cache_kwargs(cache)).logits.float()
    finally:
        for state, choices in zip(states, chosen, strict=True):
            state.choices = choices
    cache.crop(-1)
    return logits


def time_prefill(model: Any, lengths: Sequence[int], repeats: int = 7) -> list[dict[str, Any]]:
    """Seconds of a prefill with DynamicCache and with ours (codes written as it goes), and the difference's share.

    Each prefill is that of a new cache.
    """
    results = []
    for tokens in lengths:
        ids = torch.randint(10, model.config.vocab_size, (1, tokens), device=model.device)
        seconds: dict[str, list[float]] = {"dynamic": [], "pq": []}
        cache: Any = None
        for _ in range(repeats + 1):  # the first of each warms up
            for name, taken in seconds.items():
                cache = None
                cache = make_cache(name, model.config, tokens)
                torch.cuda.synchronize()
                begin = time.perf_counter()
                with torch.inference_mode():
                    model(ids, **cache_kwargs(cache), logits_to_keep=1)
                torch.cuda.synchronize()
                taken.append(time.perf_counter() - begin)
        plain, ours = (median(taken[1:]) for taken in seconds.values())
        results.append({"tokens": tokens, "dynamic_s": plain, "pq_s": ours, "overhead": ours / plain - 1})
    return results


def measure_memory(config: Any, tokens: int) -> dict[str, dict[str, Any]]:
    """Bytes by the allocator for each cache that holds `tokens`: kept afterwards, and at the peak while it was filled.

    The peak leaves out one layer's keys and values as the model hands them over, which every cache needs alike.
    """
    results: dict[str, dict[str, Any]] = {}
    handed_over = 2 * 2 * tokens * config.num_key_value_heads * config.head_dim
    for name in ("dynamic", "pq", "pq-3bit", "pq-2bit"):
        _free()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        cache: Any = DynamicCache(config=config)
        if name != "dynamic":
            cache = PagedPQCache(config, bits=BITS.get(name, 4))
        fill(cache, config, tokens)
        torch.cuda.synchronize()
        results[name] = {
            "kept_bytes": torch.cuda.memory_allocated() - before,
            "peak_bytes": torch.cuda.max_memory_allocated() - before - handed_over,
        }
        if name != "dynamic":
            results[name]["stats_bytes"] = cache.stats()["bytes_total"]
        del cache
    for row in results.values():
        row["ratio"] = row["kept_bytes"] / results["dynamic"]["kept_bytes"]
        row["peak_ratio"] = row["peak_bytes"] / results["dynamic"]["peak_bytes"]
    return results


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def time_cache(model: Any, name: str, tokens: int, new_tokens: int) -> dict[str, Any]:
    """Milliseconds per token, and what the first calls cost, of one cache at one length."""
    config = model.config
    cache = make_cache(name, config, tokens)
    fill(cache, config, tokens)
    ttft, first_steps = generate_times(model, cache, tokens, 8)
    first_call_s = ttft + sum(first_steps) / 1e3
    held = int(cache.get_seq_length())
    _, steps = generate_times(model, cache, held, new_tokens)
    return {
        "cache": name,
        "ms_per_token": median(steps),
        "gpu_busy_ms": gpu_busy_ms(model, cache),
        "worst_ms": max(steps[len(steps) // 4 :]),
        "first_call_s": first_call_s,
        "calls": cache.stats()["calls"] if isinstance(cache, PagedCache) else {},
    }


def bench_generate(
    cases: Sequence[tuple[str, int]] = CASES,
    caches: Sequence[str] = CACHES,
    new_tokens: int = 96,
    prefill: Sequence[int] = (8192, 32768),
    bandwidth: float | None = None,
    note: Callable[[str], None] = print,
    is_stop_deferred: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield one row for each (case, cache), then rows of prefill and memory. Needs a GPU.

    is_stop_deferred: time decode steps under `deferred_stop_check`.

    Raises RuntimeError if there is none, or if our logits are wrong.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("the generate benchmark needs a GPU; torch sees no CUDA device")
    from hf_pqcache.eval.bench.kernel import copy_bandwidth

    bandwidth = bandwidth or copy_bandwidth()
    conditions = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_tb_per_s": bandwidth / 1e12,
        "dtype": "float16",
        "batch": 1,
        "is_stop_deferred": is_stop_deferred,
    }
    note(f"{conditions['gpu']}: copy {bandwidth / 1e12:.2f} TB/s (read + written) is the ceiling")
    for shape_name in dict.fromkeys(shape for shape, _ in cases):
        _free()
        model = build_model(SHAPES[shape_name])
        config = model.config
        weights = weights_read(model)
        note(f"{shape_name}: logits differ from plain torch by {check_logits(model):.1e}")
        for tokens in [n for shape, n in cases if shape == shape_name]:
            per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
            for name in caches:
                _free()
                bytes_moved = weights + tokens * per_token * number_bytes(name, config)
                row: dict[str, Any] = {"kind": "decode", "shape": shape_name, "tokens": tokens, "cache": name}
                row |= {"floor_ms": bytes_moved / bandwidth * 1e3} | conditions
                try:
                    with deferred_stop_check() if is_stop_deferred else nullcontext():
                        row |= time_cache(model, name, tokens, new_tokens)
                except torch.OutOfMemoryError:
                    row["error"] = "out of memory"
                except ImportError as error:
                    row["error"] = str(error)
                yield row
        if prefill and shape_name == next(iter(SHAPES)):
            _free()
            for row in time_prefill(model, prefill):
                yield {"kind": "prefill", "shape": shape_name} | row | conditions
        del model
        if shape_name == next(iter(SHAPES)):
            for name, row in measure_memory(config, 32768).items():
                yield {"kind": "memory", "shape": shape_name, "tokens": 32768, "cache": name} | row | conditions
