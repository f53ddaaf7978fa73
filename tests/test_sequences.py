"""Sequences side by side in either cache: what they cost, what they share, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma3TextConfig, LlamaConfig

from hf_pqcache import Codebook, PagedKVCache, PagedPQCache
from hf_pqcache.codebook import shipped
from hf_pqcache.config import PQConfig
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.pages.device_state import DeviceState

LAYERS, HEADS, HEAD_DIM, PAGE = 2, 2, 16, 64
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, hidden_size=32, num_attention_heads=2, num_key_value_heads=HEADS, head_dim=HEAD_DIM, vocab_size=8
)


def book() -> Codebook:
    return shipped.codebook(PQConfig(num_bits=4), HEAD_DIM, HEAD_DIM)


def make(kind: str, max_pages: int = 40, **kw: Any) -> Any:
    if kind == "exact":
        return PagedKVCache(CONFIG, max_pages=max_pages, **kw)
    return PagedPQCache(CONFIG, book(), max_pages=max_pages, sink_tokens=4, extended_residual=16, **kw)


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, count, HEAD_DIM, generator=generator), torch.randn(HEADS, count, HEAD_DIM, generator=generator)


def fill(cache: Any, name: Any, count: int, seed: int = 0) -> None:
    for layer in range(LAYERS):
        cache.append_tokens(name, layer, *tokens(count, seed))


def every_tensor(cache: Any) -> Iterator[Tensor]:
    """All memory of a cache."""
    for view in cache.storage.layers.views.values():
        yield from (x for x in vars(view).values() if isinstance(x, Tensor))
        yield from (side for slab in view.store.slabs.values() for side in (slab.keys, slab.values))
    for state in cache.storage.layers.states.values():
        assert isinstance(state, DeviceState)
        yield from (x for x in vars(state).values() if isinstance(x, Tensor))


def allocated_bytes(cache: Any) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in every_tensor(cache)}.values())


KINDS = pytest.mark.parametrize("kind", ["exact", "codes"])


def test_a_long_tailed_mix_takes_a_fifth_of_a_padded_static_cache() -> None:
    """32 sequences of 128 to 2048 tokens, as many of a length as the length is short; everything allocated is counted."""
    lengths = [2048] + 2 * [1024] + 4 * [512] + 8 * [256] + 17 * [128]
    static = len(lengths) * max(lengths) * LAYERS * 2 * HEADS * HEAD_DIM * 2  # keys and values in fp16
    cache = make("exact", max_pages=sum((n - 1) // PAGE for n in lengths))
    for i, length in enumerate(lengths):
        cache.allocate_sequence(i)
        for layer in range(LAYERS):
            k, v = (x.half() for x in tokens(length, i))
            cache.append_tokens(i, layer, k, v)
    assert cache.stats()["pages_free"] == 0
    for i, length in enumerate(lengths):
        assert torch.equal(cache.get_kv(i, 1)[0], tokens(length, i)[0].half())
    assert allocated_bytes(cache) <= 0.2 * static
    stats = cache.stats()
    assert allocated_bytes(cache) == pytest.approx(stats["bytes_reserved"], rel=0.01)
    assert stats["bytes_total"] <= stats["bytes_reserved"] <= 1.15 * stats["bytes_total"]


@KINDS
def test_memory_is_taken_as_tokens_arrive(kind: str) -> None:
    cache = make(kind, max_pages=6)
    cache.allocate_sequence("a")
    assert cache.stats()["pages_used"] == 0
    used = []
    for _ in range(30):
        fill(cache, "a", 10)
        used.append(cache.stats()["pages_used"])
    config = cache.storage.layers.config
    assert used == [config.coded_tokens(10 * (i + 1)) // PAGE for i in range(30)]
    assert used[-1] == 4


@KINDS
def test_freed_pages_are_used_again_at_once(kind: str) -> None:
    cache = make(kind, max_pages=4)
    for i in range(5):
        cache.allocate_sequence(i)
        fill(cache, i, 4 * PAGE + 1 + 20 * (kind == "codes"), i)
        assert cache.stats()["pages_free"] == 0
        freed = set(cache.storage.layers.table.rows[0])
        cache.free_sequence(i)
        cache.allocate_sequence("next", initial_len=2 * PAGE + 40)
        assert set(cache.storage.layers.table.rows[0]) <= freed
        cache.free_sequence("next")
    assert cache.storage.layers.batch == 1, "a freed row is used again, too"


@KINDS
def test_a_fork_leaves_its_source_the_pages_reserved_for_it(kind: str) -> None:
    cache = make(kind)
    cache.allocate_sequence("a", initial_len=500)
    fill(cache, "a", 100)
    reserved = cache.sequence_stats("a")["pages"]
    cache.fork_sequence("a", "b")
    assert cache.sequence_stats("a")["pages"] == reserved
    assert cache.sequence_stats("b")["pages"] == cache.sequence_stats("b")["shared_pages"] == 1
    assert cache.stats()["pages_used"] == reserved


@KINDS
def test_a_fork_shares_its_prefix_and_goes_its_own_way(kind: str) -> None:
    cache = make(kind)
    cache.allocate_sequence("a")
    fill(cache, "a", 300)
    used = cache.stats()["pages_used"]
    for i in range(5):
        cache.fork_sequence("a", i)
    assert cache.stats()["pages_used"] == used
    assert cache.sequence_stats(3) == {**cache.sequence_stats("a"), "shared_pages": used}
    before = cache.get_kv("a", 0)
    fill(cache, 0, 100, seed=1)
    fill(cache, 1, 100, seed=2)
    cache.free_sequence("a")
    for i, seed in ((0, 1), (1, 2)):
        k, v = cache.get_kv(i, 0)
        config = cache.storage.layers.config
        coded = config.sink_tokens + config.coded_tokens(300)
        assert torch.equal(k[:, :coded], before[0][:, :coded])
        assert torch.equal(v[:, -10:], tokens(100, seed)[1][:, -10:])
    for i in range(5):
        cache.free_sequence(i)
    assert cache.stats()["pages_used"] == 0


@KINDS
def test_exhaustion_leaves_all_sequences_as_they_were(kind: str) -> None:
    cache = make(kind, max_pages=5)
    for name in "ab":
        cache.allocate_sequence(name)
        fill(cache, name, 150, ord(name))
    before = {name: cache.get_kv(name, 1) for name in "ab"}
    stats = cache.stats()
    with pytest.raises(PagesExhaustedError, match=r"PQC001.*max_pages"):
        fill(cache, "a", 300)
    with pytest.raises(PagesExhaustedError, match="PQC001"):
        cache.allocate_sequence("c", initial_len=1000)
    assert cache.sequence_ids == ["a", "b"]
    assert cache.stats() == stats
    for name in "ab":
        assert all(torch.equal(x, y) for x, y in zip(cache.get_kv(name, 1), before[name], strict=True))
    cache.free_sequence("a")
    fill(cache, "b", 100)


@KINDS
def test_what_does_not_fit_is_refused(kind: str) -> None:
    cache = make(kind)
    k, v = tokens(3)
    with pytest.raises(KeyError, match=r"no sequence 'a'; there are \[\]"):
        cache.append_tokens("a", 0, k, v)
    cache.allocate_sequence("a")
    with pytest.raises(ValueError, match="layer 0 has no tokens yet"):
        cache.get_kv("a", 0)
    with pytest.raises(ValueError, match=r"layer 7 is not kept in pages; layers that are: \[0, 1\]"):
        cache.append_tokens("a", 7, k, v)
    cache.append_tokens("a", 0, k[None], v[None])
    for bad_k, bad_v, message in (
        (k[:1], v[:1], r"k: layer 0 takes \(2, 3, 16\) torch.float32 on cpu, got \(1, 3, 16\)"),
        (k, v[..., :8], r"v: layer 0 takes \(2, 3, 16\)"),
        (k.half(), v.half(), "got .* torch.float16"),
        (k, v[:, :2], "equal H and T"),
        (torch.stack([k, k]), torch.stack([v, v]), "equal H and T"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.append_tokens("a", 0, bad_k, bad_v)
    with pytest.raises(ValueError, match="'a' already"):
        cache.fork_sequence("a", "a")
    for action in (lambda: cache.allocate_sequence("b", -1), lambda: cache.crop_sequence("a", -1)):
        with pytest.raises(ValueError, match="must not be negative"):
            action()
    assert cache.get_kv("a", 0)[0].equal(k)
    assert cache.sequence_ids == ["a"]


@KINDS
def test_generate_and_sequences_do_not_mix(kind: str) -> None:
    cache = make(kind)
    k, v = (x[None].expand(3, -1, -1, -1) for x in tokens(20))
    cache.allocate_sequence("a")
    for action in (
        lambda: cache.update(k, v, 0),
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: cache.batch_repeat_interleave(2),
    ):
        with pytest.raises(ValueError, match="holds sequences made by allocate_sequence"):
            action()
    cache.reset()
    for layer in range(LAYERS):
        cache.update(k, v, layer)
    assert torch.equal(cache.layers[0].keys, k)
    with pytest.raises(ValueError, match="holds tokens of generate; reset"):
        cache.allocate_sequence("a")
    cache.reset()
    cache.allocate_sequence("a")
    fill(cache, "a", 5)
    cache.free_sequence("a")
    for layer in range(LAYERS):  # nothing is left of them: another number of rows is welcome
        cache.update(k[:2], v[:2], layer)
    assert cache.layers[0].keys.shape == (2, HEADS, 20, HEAD_DIM)


def test_layers_that_stay_with_transformers_have_no_sequences() -> None:
    config = Gemma3TextConfig(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    cache = PagedKVCache(config)
    cache.allocate_sequence("a")
    with pytest.raises(ValueError, match="layer 0 is not kept in pages"):
        cache.append_tokens("a", 0, *tokens(3))
    cache.append_tokens("a", 1, *tokens(3))


def test_keys_and_values_may_differ_in_head_dim() -> None:
    k, _ = tokens(200)
    v = torch.randn(HEADS, 200, 24)
    cache = make("exact")
    cache.allocate_sequence("a")
    cache.append_tokens("a", 0, k, v)
    assert all(torch.equal(x, y) for x, y in zip(cache.get_kv("a", 0), (k, v), strict=True))
    coded = PagedPQCache(CONFIG, bits=3, max_pages=10, extended_residual=8)
    coded.allocate_sequence("a")
    coded.append_tokens("a", 0, k, v)
    got = coded.get_kv("a", 0)
    assert [x.shape for x in got] == [k.shape, v.shape]
    assert all(0 < (x - y).norm() / y.norm() < 0.4 for x, y in zip(got, (k, v), strict=True))
    with pytest.raises(ValueError, match="num_subspaces=16 does not cut values of 24"):
        PagedPQCache(CONFIG, num_bits=4, num_subspaces=16).update(k[None], v[None], 0)


def test_exact_pages_are_laid_out_as_kernels_read_them() -> None:
    cache = make("exact", page_size=16)
    cache.allocate_sequence(0)
    fill(cache, 0, 40)
    view, (k, _) = cache.storage.layers.views[0], tokens(40)
    pages = view.page_numbers(0, 0, 2)
    assert torch.equal(view.store.read("key", pages).transpose(0, 1).flatten(1, 2), k[:, :32])
    size = HEADS * 16 * HEAD_DIM  # numbers of one side of a page
    (slab,) = view.store.slabs.values()
    ids = view.store.device_ids(np.array(pages))
    memory = torch.as_strided(slab.keys, (len(slab.keys), size), (view.store.page_bytes // slab.keys.element_size(), 1))
    assert view.store.bases == (slab.keys.data_ptr(), slab.keys.data_ptr() + size * slab.keys.element_size())
    assert torch.equal(memory[ids].view(2, HEADS, 16, HEAD_DIM).transpose(0, 1).flatten(1, 2), k[:, :32])
    assert torch.equal(view.window_keys[0][:, 32 % 17 :][:, :2], k[:, 32:34])
