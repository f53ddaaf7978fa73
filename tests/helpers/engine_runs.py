"""What the tests of continuous batching share: prompts, settings, and how requests are waited for."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import tiny_models
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.models.names import cache_kwargs

#: Fifty tokens fill two pages of codes.
CODED = {"page_size": 16, "extended_residual": 16}
EXACT = {"page_size": 16}
NEW = 24


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    made = torch.Generator().manual_seed(1)
    lengths = (1, 2, 5, 19, 20, 21, 35, 36, 37, 52, 90, 120)
    found = [tuple(torch.randint(1, 128, (n,), generator=made).tolist()) for n in lengths]
    return (*found, (*found[-1][:50], 3, 4, 5), found[-1])  # one that begins like another, and the same again


@cache
def model() -> Any:
    """Shared: do not change it."""
    return tiny_models.build("llama")


@cache
def alone(prompt: tuple[int, ...], exact: bool) -> list[int]:
    """What `generate` says to a prompt."""
    made = PagedKVCache(model().config, **EXACT) if exact else PagedPQCache(model().config, **CODED)
    out = model().generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, **cache_kwargs(made))
    return out[0, len(prompt) :].tolist()


def ask_alone() -> None:
    """What `generate` says to all prompts, before an engine has the model: while one runs, it serves nothing else."""
    for prompt in prompts():
        alone(prompt, True), alone(prompt, False)


def greedy(sequences: int = 1) -> GenerationConfig:
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    config.num_return_sequences = sequences  # refused by its constructor for greedy search, and fine for the engine
    return config


def engine(**changes: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{"num_blocks": 100, "max_batch_tokens": 64, "allow_block_sharing": False, **changes})


def results(manager: Any, wanted: set[str], seconds: float = 60.0) -> dict[str, Any]:
    found: dict[str, Any] = {}
    until = time.monotonic() + seconds
    while wanted - set(found) and time.monotonic() < until and manager.is_running():
        if (result := manager.get_result(timeout=0.05)) is not None and result.is_finished():
            found[result.request_id] = result
    return found


def check_that_nothing_is_lost(manager: Any) -> None:
    """Every block and every slot is free again, or keeps a prefix."""
    until = time.monotonic() + 5
    while (stats := manager.stats())["slots"]["free"] < stats["slots"]["total"] and time.monotonic() < until:
        time.sleep(0.02)
    assert stats["slots"]["free"] == stats["slots"]["total"]
    blocks = stats["blocks"]
    assert blocks["free"] + blocks["shareable"] == blocks["total"]
    assert stats["compression"]["waiting_tokens"] == stats["compression"]["under_way"] == 0
