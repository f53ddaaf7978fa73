"""Time to the first token and time per token of `generate` under any cache; knows no result row.

Prompts are random tokens: speed depends on their number, not on their meaning. Every token's time is taken when
`generate` has it on the host, after the device has been waited for, as a user who streams the answer sees it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList


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
    """Notes the time of every token; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> Any:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_prompt(model: Any, batch: int, tokens: int, seed: int) -> torch.Tensor:
    """Token ids int64 (batch, tokens) on the model's device, from the whole vocabulary but its first few."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(min(10, vocabulary - 1), vocabulary, (batch, tokens), generator=generator).to(model.device)


def timed_generate(model: Any, ids: torch.Tensor, cache: Any, new_tokens: int, **options: Any) -> list[float]:
    """Seconds from the call of a greedy `generate` after ids (B, T) until each of its new tokens is there."""
    clock = TokenClock(model.device)
    synchronize(model.device)
    begin = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    return [moment - begin for moment in clock.times]


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
