"""A cache in long use and in company: memory stays flat, and caches on one model do not notice one another."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import psutil
import pytest
import torch
from tiny_models import SMALL, build, codebook_of, padded, tokens
from torch import Tensor
from transformers import DynamicCache, LlamaConfig

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
HEAD_DIM, PAGE, MAX_PAGES = 8, 16, 200
CONFIG = LlamaConfig(
    num_hidden_layers=1, hidden_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=HEAD_DIM, vocab_size=8
)


def make(kind: str) -> Any:
    if kind == "exact":
        return PagedKVCache(CONFIG, page_size=PAGE, max_pages=MAX_PAGES)
    return PagedPQCache(CONFIG, num_subspaces=8, num_bits=4, page_size=PAGE, max_pages=MAX_PAGES, extended_residual=16)


def one_by_one(cache: Any, count: int) -> int:
    """`generate`'s way: a growing row, cut back or forgotten when the pool is full -> pages that were owned anew."""
    k, owned = torch.randn(1, 1, 1, HEAD_DIM), 0
    for i in range(count):
        if cache.get_seq_length() == MAX_PAGES * PAGE:
            owned += 2500 // PAGE
            cache.crop(-2500)
        cache.update(k, k, 0)
        if i == 0:
            cache.layers[0].commit()
    return owned


def side_by_side(cache: Any, count: int) -> int:
    """A serving loop's way: sequences of 300 tokens, each a fork of the one before, three alive -> pages owned anew."""
    k, owned = torch.randn(1, 1, HEAD_DIM), 0
    for name in range(count // 300):
        if name:
            cache.fork_sequence(name - 1, name)
            cache.crop_sequence(name, 150)
        else:
            cache.allocate_sequence(name, 300)
        if name >= 3:
            cache.free_sequence(name - 3)
        for _ in range(300):
            cache.append_tokens(name, 0, k, k)
        owned += cache.sequence_stats(name)["pages"] - 150 // PAGE
    for name in cache.sequence_ids:
        cache.free_sequence(name)
    return owned


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "use", "count"), [("codes", side_by_side, 100_000), ("exact", one_by_one, 25_000)])
def test_a_long_stream_of_single_tokens_keeps_memory_flat(kind: str, use: Callable[[Any, int], int], count: int) -> None:
    """After a tenth of it nothing grows any more, and every page has been used again and again."""
    cache, process = make(kind), psutil.Process()
    readings, owned = [], 0
    for part in (count // 10, count * 45 // 100, count * 45 // 100):
        owned += use(cache, part)
        cache.reset()
        gc.collect()
        tensors = sum(issubclass(type(x), Tensor) for x in gc.get_objects())
        readings.append((sys.getallocatedblocks(), tensors, process.memory_info().rss))
        assert cache.stats()["pages_free"] == MAX_PAGES
    _, (blocks, tensors, rss), (last_blocks, last_tensors, last_rss) = readings
    assert owned > 5 * MAX_PAGES
    assert last_tensors == tensors
    assert abs(last_blocks - blocks) < 500, "Python objects pile up"
    assert last_rss - rss < 4 << 20


# -- in company -------------------------------------------------------------------------------------------------------
def run(name: str, new_cache: Callable[[], Any], seed: int) -> tuple[Tensor, Tensor]:
    """Two turns of a padded batch."""
    model, cache, logits = build(name), new_cache(), []
    inputs, _ = padded(2, 40 + seed)
    inputs["input_ids"] = inputs["input_ids"].roll(seed, dims=0)
    for turn in range(2):
        out = model.generate(
            **inputs,
            **cache_kwargs(cache),
            max_new_tokens=20,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits += out.logits
        ids = torch.cat([out.sequences, tokens(len(out.sequences), 3, turn)], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1)
        inputs = {"input_ids": ids, "attention_mask": mask}
    return ids, torch.cat(logits)


def caches(name: str) -> list[Callable[[], Any]]:
    config, book = build(name).config, codebook_of(name)
    return [
        lambda: PagedPQCache(config, book, SMALL),
        lambda: DynamicCache(config=config),
        lambda: PagedPQCache(config, book, SMALL),
        lambda: PagedKVCache(config, page_size=16, max_pages=64),
    ]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_threads_with_caches_of_their_own_do_not_disturb_one_another(name: str) -> None:
    """Four threads call `generate` on one model at once, one of them with transformers' own cache."""
    alone = [run(name, new, seed) for seed, new in enumerate(caches(name))]
    barrier, interval = Barrier(len(alone)), sys.getswitchinterval()

    def together(seed: int, new: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
        barrier.wait(timeout=60)
        return [run(name, new, seed) for _ in range(3)]

    sys.setswitchinterval(1e-5)  # threads take turns within every step
    try:
        with ThreadPoolExecutor(len(alone)) as pool:
            results = list(pool.map(together, range(len(alone)), caches(name)))
    finally:
        sys.setswitchinterval(interval)
    for expected, repeats in zip(alone, results, strict=True):
        for got in repeats:
            assert torch.equal(got[0], expected[0])
            torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_caches_that_take_turns_step_by_step_do_not_disturb_one_another(name: str) -> None:
    model, steps = build(name), 25

    def step(cache: Any, seed: int, i: int) -> Tensor:
        with torch.no_grad():
            return model(tokens(2, 1 if i else 40 + seed, 10 * seed + i), **cache_kwargs(cache)).logits

    alone = []
    for seed, new in enumerate(caches(name)):
        cache = new()
        alone.append([step(cache, seed, i) for i in range(steps)])
    together = [new() for new in caches(name)]
    for i in range(steps):
        for seed, cache in enumerate(together):
            torch.testing.assert_close(step(cache, seed, i), alone[seed][i], rtol=1e-4, atol=1e-4)
