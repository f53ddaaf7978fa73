"""Perplexity of any cache, measured by running it: tokens go through the real thing, step by step. Knows no task.

`perplexity` simulates what a product-quantized cache does in one pass over a window; this file asks a cache itself, so
it also serves caches that nobody simulates. A window goes in `chunk` tokens at a time. With chunk=1 every token is
decoded as `generate` would, and the figure is what a user gets. With more, the tokens of a chunk see each other as the
cache hands out new tokens (exactly, in all caches but fp8), and older ones as the cache has kept them: `chunk` times
fewer steps, at the price of an exact window that is up to chunk - 1 tokens longer than deployed.

Where that price is nothing: tokens leave the window of our caches, and of the quantizers re-made here, a page of 64 at a
time. A first step of as many tokens as stay exact (4 + 128) and then chunks of a page are in step with that: of 64 tokens
63 see what they would see one by one, and the last of them one page more exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hf_pqcache.config import PQConfig
from hf_pqcache.eval.measure.perplexity import spans
from hf_pqcache.eval.measure.shares import Each, one_by_one, summed
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.models.positions import check_positions, max_positions

#: Tokens of the first step, and of every other, in step with pages and windows as they are by default.
PREFILL, CHUNK = PQConfig().sink_tokens + PQConfig().extended_residual, PQConfig().page_size
#: Tokens of an answer that are scored at once: short ones, which should see an exact window hardly longer than deployed.
ANSWER_CHUNK = 16
#: Logits that are held at once, in float32: 1 GiB.
_LOGITS = 1 << 28


@torch.inference_mode()
def cache_perplexity(
    model: Any,
    ids: Tensor,
    make_cache: Callable[[int, int], Any],
    *,
    window: int = 2048,
    stride: int | None = None,
    chunk: int = CHUNK,
    prefill: int | None = None,
    batch: int = 1,
    is_prompt: bool = False,
    max_windows: int | None = None,
    progress: bool = True,
    each: Each = one_by_one,
) -> float:
    """Strided perplexity of a text under a real cache; windows, strides and scored tokens are those of `perplexity`.

    Args:
        ids: token ids int64 (N).
        make_cache: makes a fresh cache for windows of so many tokens, and so many of them as rows.
        chunk: tokens of one step.
        prefill: tokens of the first step, as a prompt would come; None means `chunk`. fp8 caches take their scale from what
            comes first.
        is_prompt: whether the first step is a prompt, none of whose tokens is scored, nor the one that it predicts.
        batch: windows that run together, as rows. It changes no figure where the rows of a cache are independent, and
            spares time on a GPU.
        each: how batches of windows are gone through, see `shares.py`.

    Raises ValueError for impossible sizes.
    """
    stride = window if stride is None else stride
    prefill = chunk if prefill is None else prefill
    if window < 2 or not 1 <= stride <= window or min(chunk, prefill, batch) < 1:
        steps = f"chunk={chunk}, prefill={prefill}, batch={batch}"
        raise ValueError(f"window={window}, stride={stride}, {steps}: use 1 or more, window >= stride")
    parts = list(spans(ids.numel(), window, stride))[:max_windows]
    if not parts:
        raise ValueError(f"the text has {ids.numel()} tokens; perplexity needs at least two")
    if is_prompt:
        parts = [(begin, end, max(first, begin + prefill + 1)) for begin, end, first in parts if end > begin + prefill + 1]
        if not parts:
            raise ValueError(f"a prompt of {prefill} tokens leaves none to score in a window of {window}")
    check_positions(min(window, ids.numel()), max_positions(model.config), "a perplexity window", "the window")
    device = next(model.parameters()).device
    count = sum(end - first for _, end, first in parts)
    tokens = sum(end - begin for begin, end, _ in parts)
    batches = list(_batches(parts, batch))
    with tqdm(total=tokens, desc="perplexity, cache", unit="token", disable=not progress, leave=False) as bar:

        def loss(i: int) -> float:
            rows = batches[i]
            windows = torch.stack([ids[begin:end] for begin, end, _ in rows]).to(device)
            firsts = [first - begin for begin, _, first in rows]
            cache = make_cache(rows[0][1] - rows[0][0], len(rows))
            return _window_loss(model, windows, firsts, cache, chunk, prefill, bar.update)

        total = summed(each(len(batches), loss))
    return math.exp(min(total / count, 700.0))


def _batches(parts: Sequence[tuple[int, int, int]], batch: int) -> Iterator[list[tuple[int, int, int]]]:
    """Up to `batch` neighbouring windows of one length."""
    for _, same in groupby(parts, lambda part: part[1] - part[0]):
        rows = list(same)
        yield from (rows[i : i + batch] for i in range(0, len(rows), batch))


def _window_loss(
    model: Any, ids: Tensor, firsts: list[int], cache: Any, chunk: int, prefill: int, advance: Callable[[int], object]
) -> float:
    """Sum over rows r and tokens firsts[r].. of ids (B, n) of -log p(token | those before), as the cache lets them be seen."""
    rows, length = ids.shape
    total, begin = ids.new_zeros((), dtype=torch.float64), 0
    is_scored = torch.arange(length, device=ids.device) >= torch.tensor(firsts, device=ids.device)[:, None]
    step = max(1, _LOGITS // (rows * model.config.get_text_config(decoder=True).vocab_size))
    while begin < length:
        end = min(length, begin + min(step, chunk if begin else prefill))
        logits = model(input_ids=ids[:, begin:end], **cache_kwargs(cache, model), use_cache=True).logits
        targets = ids[:, begin + 1 : end + 1]  # one fewer at the very end
        wanted = is_scored[:, begin + 1 : end + 1]
        losses = F.cross_entropy(logits[:, : targets.shape[1]].float().flatten(0, 1), targets.flatten(), reduction="none")
        total += losses[wanted.flatten()].double().sum()
        advance(rows * (end - begin))
        begin = end
    return float(total)
