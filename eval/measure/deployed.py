"""Perplexity of any cache, measured by running it: tokens go through the real thing, step by step. Knows no task.

`perplexity` simulates what a product-quantized cache does in one pass over a window; this file asks a cache itself, so
it also serves caches that nobody simulates. A window goes in `chunk` tokens at a time. With chunk=1 every token is
decoded as `generate` would, and the figure is what a user gets. With more, the tokens of a chunk see each other as the
cache hands out new tokens (exactly, in all caches but fp8), and older ones as the cache has kept them: `chunk` times
fewer steps, at the price of an exact window that is up to chunk - 1 tokens longer than deployed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hf_pqcache.eval.measure.perplexity import spans
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.models.positions import check_positions, max_positions

#: Tokens of a step; the groups and residual windows of all peers are multiples of it.
CHUNK = 16


@torch.inference_mode()
def cache_perplexity(
    model: Any,
    ids: Tensor,
    make_cache: Callable[[int], Any],
    *,
    window: int = 2048,
    stride: int | None = None,
    chunk: int = CHUNK,
    prefill: int | None = None,
    max_windows: int | None = None,
    progress: bool = True,
) -> float:
    """Strided perplexity of a text under a real cache; windows, strides and scored tokens are those of `perplexity`.

    Args:
        ids: token ids int64 (N).
        make_cache: makes a fresh cache for a window of so many tokens.
        chunk: tokens of one step.
        prefill: tokens of the first step, as a prompt would come; None means `chunk`. fp8 caches take their scale, and
            caches without a codebook their centroids, from what comes first.

    Raises ValueError for impossible sizes.
    """
    stride = window if stride is None else stride
    prefill = chunk if prefill is None else prefill
    if window < 2 or not 1 <= stride <= window or chunk < 1 or prefill < 1:
        raise ValueError(f"window={window}, stride={stride}, chunk={chunk}, prefill={prefill}: use 1 or more, window >= stride")
    parts = list(spans(ids.numel(), window, stride))[:max_windows]
    if not parts:
        raise ValueError(f"the text has {ids.numel()} tokens; perplexity needs at least two")
    check_positions(min(window, ids.numel()), max_positions(model.config), "a perplexity window", "the window")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    tokens = sum(end - begin for begin, end, _ in parts)
    with tqdm(total=tokens, desc="perplexity, cache", unit="token", disable=not progress, leave=False) as bar:
        for begin, end, first in parts:
            row = ids[begin:end].to(device)
            total += _window_loss(model, row, first - begin, make_cache(end - begin), chunk, prefill, bar.update)
            count += end - first
    return math.exp(min(total / count, 700.0))


def _window_loss(
    model: Any, ids: Tensor, first: int, cache: Any, chunk: int, prefill: int, advance: Callable[[int], object]
) -> float:
    """Sum over tokens first.. of ids (n) of -log p(token | those before), as the cache lets the model see them."""
    total, begin = 0.0, 0
    while begin < ids.numel():
        end = min(ids.numel(), begin + (chunk if begin else prefill))
        logits = model(input_ids=ids[None, begin:end], **cache_kwargs(cache, model), use_cache=True).logits[0]
        targets = ids[begin + 1 : end + 1]  # one fewer at the very end
        start = max(0, first - begin - 1)
        if start < targets.numel():
            part = logits[start : targets.numel()].float()
            total += float(F.cross_entropy(part, targets[start:], reduction="sum"))
        advance(end - begin)
        begin = end
    return total
