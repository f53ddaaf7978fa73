"""Time of one decode step by stage, under any cache: module hooks with CUDA events, or the CPU's clock. Knows no task.

Hooks cost time themselves, most on a GPU that waits for its host: read the shares, and take the step's true time from
`speed`. A compiled step has no modules left to hook, so steps run eagerly here.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_pqcache.eval.measure.speed import random_prompt
from hf_pqcache.models.names import cache_kwargs

#: embedding: token vectors. norm: all layer norms. projection: query, key, value and output matrices of attention.
#: append: the cache's update. attention: what is left of the attention block: rotary embedding and attention itself,
#: for a compressed cache with the decoding of codes. mlp, head: as named. other: what is left of the step.
STAGES = ("embedding", "norm", "projection", "append", "attention", "mlp", "head", "other")

#: Steps that count, and steps before them.
STEPS, WARM_UP = 16, 3


class _Stopwatch:
    """Sums the time between `start` and `stop` by name, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._open: dict[tuple[str, int], Any] = {}

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, name: str, key: int = 0) -> None:
        self._open[name, key] = self._now()

    def stop(self, name: str, key: int = 0) -> None:
        self.spans[name].append((self._open.pop((name, key)), self._now()))

    def total_ms(self) -> dict[str, float]:
        if self.on_cuda:
            torch.cuda.synchronize()
            return {name: sum(a.elapsed_time(b) for a, b in spans) for name, spans in self.spans.items()}
        return {name: 1000 * sum(b - a for a, b in spans) for name, spans in self.spans.items()}


@torch.inference_mode()
def measure_breakdown(
    model: Any,
    make_cache: Callable[[], Any],
    *,
    tokens: int,
    batch: int = 1,
    steps: int = STEPS,
    warmup: int = WARM_UP,
    seed: int = 0,
) -> dict[str, float]:
    """Mean milliseconds of each of STAGES in a decode step after a random prompt of `tokens`; their sum is the step.

    Raises ValueError for a model that has no block called `self_attn` or `attn`, or never calls the cache's update.
    """
    ids = random_prompt(model, batch, tokens + warmup + steps, seed)
    cache = make_cache()
    model(input_ids=ids[:, :tokens], **cache_kwargs(cache, model), use_cache=True, logits_to_keep=1)
    for i in range(tokens, tokens + warmup):
        model(input_ids=ids[:, i : i + 1], **cache_kwargs(cache, model), use_cache=True)
    watch = _Stopwatch(model.device)
    with _hooks(model, cache, watch):
        for i in range(tokens + warmup, ids.shape[1]):
            watch.start("step")
            model(input_ids=ids[:, i : i + 1], **cache_kwargs(cache, model), use_cache=True)
            watch.stop("step")
    total = {name: ms / steps for name, ms in watch.total_ms().items()}
    if "block" not in total or "append" not in total:
        raise ValueError(f"{type(model).__name__} has no attention block called self_attn or attn that updates the cache")
    total["attention"] = total.pop("block") - total.get("projection", 0.0) - total["append"]
    step = total.pop("step")
    return {name: total.get(name, 0.0) for name in STAGES[:-1]} | {"other": step - sum(total.values())}


@contextmanager
def _hooks(model: Any, cache: Any, watch: _Stopwatch) -> Iterator[None]:
    """Time the stages of `model` and the cache's update; the update is replaced on this one cache only."""
    handles = []
    for name, module in _stages(model):
        handles.append(module.register_forward_pre_hook(lambda m, _, name=name: watch.start(name, id(m))))
        handles.append(module.register_forward_hook(lambda m, _, out, name=name: watch.stop(name, id(m))))
    update = cache.update

    def timed_update(*args: Any, **kwargs: Any) -> Any:
        watch.start("append")
        result = update(*args, **kwargs)
        watch.stop("append")
        return result

    cache.update = timed_update
    try:
        yield
    finally:
        del cache.update
        for handle in handles:
            handle.remove()


def _stages(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """(stage, module) of every module to time. Norms inside of an attention block are part of attention."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    blocks = [m for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in ("self_attn", "attn", "attention")]
    inside = {id(m): m for block in blocks for m in block.modules() if m is not block}
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if module is embedding:
            yield "embedding", module
        elif module is head:
            yield "head", module
        elif any(module is block for block in blocks):
            yield "block", module
        elif id(module) in inside:
            if last.endswith("_proj") or type(module).__name__ in ("Linear", "Conv1D"):
                yield "projection", module
        elif last in ("mlp", "feed_forward", "block_sparse_moe"):
            yield "mlp", module
        elif "norm" in last or last.startswith("ln_"):
            yield "norm", module
