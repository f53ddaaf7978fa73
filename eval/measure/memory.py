"""Memory of a cache after a prompt of given length: the allocator's peak on CUDA, the cache's own bytes anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_pqcache.eval.measure.speed import random_prompt
from hf_pqcache.eval.session.caches import CacheBytes, weigh
from hf_pqcache.models.names import cache_kwargs


@dataclass(frozen=True)
class Memory:
    """What a prompt and a few decoded tokens took.

    Attributes:
        cache: the cache's own bytes after the last token.
        peak_bytes: most that the CUDA allocator held at any time beyond what it held before (weights); None elsewhere:
            the CPU's allocator keeps no such count.
    """

    cache: CacheBytes
    peak_bytes: int | None


@torch.inference_mode()
def measure_memory(
    model: Any,
    make_cache: Callable[[], Any],
    *,
    tokens: int,
    batch: int = 1,
    new_tokens: int = 4,
    prefill_chunk: int = 2048,
    seed: int = 0,
) -> Memory:
    """Fill a fresh cache with a random prompt of `tokens` and decode `new_tokens` more.

    Args:
        prefill_chunk: tokens of one forward pass of the prompt, so that activations do not hide the cache.
    """
    device, on_cuda = model.device, model.device.type == "cuda"
    ids = random_prompt(model, batch, tokens + new_tokens, seed)
    before = 0
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    cache = make_cache()
    parts = [*ids[:, :tokens].split(prefill_chunk, dim=1), *(ids[:, i : i + 1] for i in range(tokens, ids.shape[1]))]
    for part in parts:
        model(input_ids=part, **cache_kwargs(cache, model), use_cache=True, logits_to_keep=1)
    peak = torch.cuda.max_memory_allocated(device) - before if on_cuda else None
    return Memory(weigh(cache, model, batch * (tokens + new_tokens)), peak)
