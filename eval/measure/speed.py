"""Time to the first token and time per token of `generate` under any cache; knows no result row.

Prompts are random tokens: speed depends on their number, not on their meaning. A token's moment is when its choice has been
made, on a GPU by the GPU's clock: to wait for the device would keep `generate` from queueing what it otherwise queues.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.utils import DeferredStopCheck

from hf_pqcache.models.names import cache_kwargs


@dataclass(frozen=True)
class Speed:
    """Medians over the repeats.

    Attributes:
        ttft_ms: from the call of generate to the first token.
        tpot_ms: between two tokens after the first.
        tokens_per_s: new tokens of all rows over the time after the first ones.
    """

    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float


class TokenClock(StoppingCriteria):
    """Notes the moment of every token; stops nothing and waits for nothing."""

    def __init__(self, device: torch.device, batch: int) -> None:
        self.device = device
        self.never = torch.zeros(batch, dtype=torch.bool, device=device)
        synchronize(device)
        self.begin = self.now()
        self.moments: list[Any] = []

    def now(self) -> Any:
        """An event in the stream's order on a GPU, seconds elsewhere."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        self.moments.append(self.now())
        return self.never

    def seconds(self) -> list[float]:
        """From the clock's making until each token."""
        synchronize(self.device)
        if self.device.type != "cuda":
            return [moment - self.begin for moment in self.moments]
        return [self.begin.elapsed_time(moment) / 1e3 for moment in self.moments]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def deferred_stop_check() -> Iterator[None]:
    """Let `generate` ask one step late whether it is done, so that it queues the next step while the device works.

    transformers does so on MPS only, for caches that can be cropped (`DeferredStopCheck`).
    """
    on_mps = DeferredStopCheck.is_supported

    def is_supported(device: torch.device, *args: Any, **kwargs: Any) -> bool:
        return bool(on_mps(torch.device("mps"), *args, **kwargs))

    with patch.object(DeferredStopCheck, "is_supported", staticmethod(is_supported)):
        yield


def random_prompt(model: Any, batch: int, tokens: int, seed: int) -> torch.Tensor:
    """Token ids int64 (batch, tokens) on the model's device, from the whole vocabulary but its first few."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(10, vocabulary - 1), vocabulary, (batch, tokens), generator=generator).to(model.device)


def timed_generate(model: Any, ids: torch.Tensor, cache: Any, new_tokens: int, **options: Any) -> list[float]:
    """Seconds from the call of a greedy `generate` after ids (B, T) until each of its new tokens is there."""
    clock = TokenClock(model.device, ids.shape[0])
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_kwargs(cache),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    return clock.seconds()


@torch.inference_mode()
def measure_speed(
    model: Any,
    make_cache: Callable[[], Any],
    *,
    prompt_tokens: int,
    new_tokens: int = 64,
    batch: int = 1,
    repeats: int = 3,
    warmup: int = 1,
    seed: int = 0,
) -> Speed:
    """Speed of greedy generation of exactly `new_tokens` tokens after random prompts of `prompt_tokens`.

    Args:
        make_cache: makes a fresh cache for every run.
        warmup: runs before those that count.

    Raises ValueError for fewer than two new tokens: the second is the first that has a time of its own.
    """
    if new_tokens < 2 or repeats < 1:
        raise ValueError(f"new_tokens={new_tokens}, repeats={repeats}: use 2 or more new tokens and 1 or more repeats")
    ids = random_prompt(model, batch, prompt_tokens, seed)
    first, rest = [], []
    for turn in range(warmup + repeats):
        times = timed_generate(model, ids, make_cache(), new_tokens, min_new_tokens=new_tokens)
        if turn >= warmup:
            first.append(times[0])
            rest.append((times[-1] - times[0]) / (len(times) - 1))
    tpot = median(rest)
    return Speed(ttft_ms=1000 * median(first), tpot_ms=1000 * tpot, tokens_per_s=batch / tpot)
