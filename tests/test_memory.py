"""Memory held follows memory used, without a number from the user: as tokens come, and as they go."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import torch
from allocations import Allocations
from tiny_models import SMALL, build, codebook_of, tokens

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.errors import CacheOutOfMemoryError, PagesExhaustedError
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.pages.block_pool import MIN_SLAB, PageAllocator, PageTable
from hf_pqcache.pages.device_state import _IdleTensors
from hf_pqcache.pages.slabs import PLACE_BITS, PageSpec, PageStore

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = pytest.mark.parametrize("kind", ["codes", "exact"])
LAYERS, HEADS, HEAD_DIM = 2, 2, 16  # of the model "llama"


def make(kind: str, **options: Any) -> Any:
    config = build("llama").config
    if kind == "exact":
        return PagedKVCache(config, page_size=16, **options)
    return PagedPQCache(config, codebook_of("llama"), SMALL.replace(max_pages=None), **options)


def feed(cache: Any, count: int, seed: int = 0, batch: int = 1) -> None:
    """Random keys and values into all layers, as a pass would bring them; no model, which would allocate for itself."""
    generator = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        cache.update(*torch.randn(2, batch, HEADS, count, HEAD_DIM, generator=generator), layer)
    cache.stats()  # stores what waits


def smallest_slab(cache: Any) -> int:
    return (MIN_SLAB + 1) * cache.storage.layers.page_bytes


def assert_held_follows_used(cache: Any, memory: Allocations) -> None:
    gc.collect()
    stats = cache.stats()
    # Tables that were replaced by wider ones wait for a next cache of their shape; orders of codes are made once.
    assert memory.held() == pytest.approx(stats["bytes_reserved"], rel=0.02, abs=16384 + 2 * stats["bytes"]["tables"])
    assert stats["bytes_total"] <= stats["bytes_reserved"] <= 1.15 * stats["bytes_total"] + smallest_slab(cache)


@KINDS
@pytest.mark.parametrize("count", [128, 512, 2048, 8192, 32768])
def test_held_follows_used_at_any_length(kind: str, count: int) -> None:
    cache = make(kind)
    with Allocations() as memory:
        feed(cache, count)
        assert_held_follows_used(cache, memory)
        for step in range(40):
            feed(cache, 1, seed=step)
        assert_held_follows_used(cache, memory)
        cache.crop(-count // 2)
        stats = cache.stats()
        assert stats["bytes_reserved"] <= 2.1 * stats["bytes_total"] + smallest_slab(cache)  # one slab of the prompt
        cache.reset()
        assert_held_follows_used(cache, memory)
        feed(cache, count // 2)
        assert_held_follows_used(cache, memory)


@KINDS
def test_held_follows_used_token_by_token(kind: str) -> None:
    cache = make(kind)
    with Allocations() as memory:
        for step in range(300):
            feed(cache, 1, seed=step, batch=2)
            if step % 60 == 59:
                assert_held_follows_used(cache, memory)
    assert cache.stats()["pages_used"] > 30


@KINDS
def test_compiled_generate_grows_and_compiles_nothing_again(kind: str) -> None:
    from transformers import CompileConfig

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = build("llama")
    config = CompileConfig(fullgraph=False, backend=backend, mode=None)
    config._compile_all_devices = True
    ids = tokens(1, 40)
    model._compiled_call = None
    torch._dynamo.reset()
    cache = make(kind, compile=True)
    options = {"max_new_tokens": 12, "do_sample": False, "compile_config": config}
    model.generate(ids, **cache_kwargs(cache), **options)
    compiled, slabs = len(graphs), cache.stats()["pages_reserved"]
    assert compiled > 0
    cache.reset()
    got = model.generate(ids, **cache_kwargs(cache), **(options | {"max_new_tokens": 150}))
    assert cache.stats()["pages_reserved"] > slabs
    assert len(graphs) == compiled
    model._compiled_call = None
    expected = model.generate(ids, **cache_kwargs(make(kind, compile=False)), do_sample=False, max_new_tokens=150)
    assert torch.equal(got, expected)
    stats = cache.stats()
    assert stats["bytes_reserved"] <= 1.15 * stats["bytes_total"] + smallest_slab(cache)


@KINDS
def test_rows_longer_than_the_tables_widen_them(kind: str) -> None:
    """The model says 512 positions; whoever goes on beyond is served, as by DynamicCache."""
    model, cache, twin = build("llama"), make(kind, expected_tokens=64), make(kind)
    assert (cache.storage.layers.table_width, twin.storage.layers.table_width) == (4, 32)
    with torch.no_grad():
        for count in (50, 1, 300, 1, 1):
            ids = tokens(1, count, seed=count)
            got, expected = (model(ids, **cache_kwargs(c)).logits for c in (cache, twin))
            assert torch.equal(got, expected)
    assert cache.storage.layers.table_width > 16
    assert cache.stats()["calls"] == twin.stats()["calls"]


@KINDS
def test_a_hint_spares_growing_and_is_no_limit(kind: str) -> None:
    cache = make(kind, expected_tokens=1000)
    feed(cache, 100)
    reserved = cache.stats()["pages_reserved"]
    assert reserved >= cache.storage.layers.config.pages_of(1000)
    feed(cache, 890)
    assert cache.stats()["pages_reserved"] == reserved
    feed(cache, 500)
    assert cache.get_seq_length() == 1490


@KINDS
def test_max_pages_is_a_limit_for_each_copy(kind: str) -> None:
    cache = make(kind, max_pages=8)
    feed(cache, 100)
    copies = [copy.deepcopy(cache) for _ in range(3)]
    for one in (cache, *copies):
        with pytest.raises(PagesExhaustedError, match=r"PQC001.*max_pages=8 are free.*max_pages=\d+ or more"):
            feed(one, 100)
        one.crop(-(one.get_seq_length() - 100))
        feed(one, 20)
    assert cache.storage.layers.allocator.num_used <= 4 * 8


@KINDS
def test_copies_share_the_prefix_and_nothing_else(kind: str) -> None:
    """A prefix is there once for all conversations that go on from it; each sees its own tokens only."""
    cache = make(kind)
    feed(cache, 400)
    prefix = [layer.keys.clone() for layer in cache.layers]
    pages = cache.stats()["pages_used"]
    with Allocations() as memory:
        copies = [copy.deepcopy(cache) for _ in range(4)]
        windows = cache.stats()["bytes"]["window"]
        assert memory.held() < 4 * (windows + cache.stats()["bytes"]["tables"]) + 4096
    for i, one in enumerate(copies):
        feed(one, 60, seed=10 + i)
    own = sum(one.stats()["pages_used"] - pages for one in copies)
    assert cache.storage.layers.allocator.num_used == pages + own
    for i, one in enumerate(copies):
        alone = make(kind)
        feed(alone, 400)
        feed(alone, 60, seed=10 + i)
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(one.layers, alone.layers, strict=True))
    del cache, one
    gc.collect()
    assert copies[0].storage.layers.allocator.num_used == pages + own, "what copies still need stays"
    copies[0].crop(-460)
    assert all(
        torch.equal(layer.keys[:, :, :300], keys[:, :, :300]) for layer, keys in zip(copies[1].layers, prefix, strict=True)
    )
    allocator = copies[0].storage.layers.allocator
    copies.clear()
    gc.collect()
    assert allocator.num_used == 0


@KINDS
def test_a_cache_that_goes_while_another_takes_pages(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector may run in the middle of anything: here where the pool grows."""
    cache, alone = make(kind), make(kind)
    for one in (cache, alone):
        feed(one, 400)
    held = [copy.deepcopy(cache)]
    feed(held[0], 3000)
    held[0].crop(-2700)
    assert cache.storage.layers.allocator.num_reserved > cache.storage.layers.allocator.num_used + 100
    grow = PageStore.new_slab

    def grow_and_forget(self: PageStore, *args: Any) -> Any:
        held.clear()
        gc.collect()
        return grow(self, *args)

    monkeypatch.setattr(PageStore, "new_slab", grow_and_forget)
    for one in (cache, alone):
        feed(one, 3000, seed=1)
    assert not held
    assert cache.storage.layers.allocator.num_used == cache.stats()["pages_used"] == alone.stats()["pages_used"]
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, alone.layers, strict=True))


def test_tensors_come_back_while_others_are_taken() -> None:
    """As when the garbage collector finds a cache that is gone in the middle of making another."""
    idle = _IdleTensors()

    class Key:
        def __eq__(self, other: object) -> bool:
            idle.put("late", {})
            return False

    idle.put("mine", {"mine": torch.ones(1)})
    idle.put(Key(), {})
    found: list[Any] = []
    taking = threading.Thread(target=lambda: found.append(idle.take("mine")), daemon=True)
    taking.start()
    taking.join(timeout=20)
    assert found, "it waits for itself"
    assert found[0] is not None
    assert idle.take("late") == {}
    assert idle.take("mine") is None


# -- the allocator by itself ---------------------------------------------------------------------------------------------
def spec() -> PageSpec:
    return PageSpec((3, 40), torch.uint8)


def test_slabs_come_and_go_and_contents_stay() -> None:
    """Whatever slabs come and go in between, a page's bytes and its place for kernels say the same."""
    allocator = PageAllocator()
    store = PageStore(spec(), spec(), torch.device("cpu"))
    allocator.attach(store)
    generator = torch.Generator().manual_seed(0)
    kept: dict[int, torch.Tensor] = {}
    for round_ in range(60):
        pages = allocator.allocate(1 + round_ % 7)
        x = torch.randint(0, 256, (len(pages), 3, 40), dtype=torch.uint8, generator=generator)
        store.write("key", pages, x)
        store.write("value", pages, 255 - x)
        kept |= dict(zip(pages, x, strict=True))
        gone = [page for page in kept if torch.rand((), generator=generator) < 0.2]
        allocator.release(gone)
        for page in gone:
            del kept[page]
        numbers = sorted(kept, key=lambda page: hash((page, round_)))
        if not numbers:
            continue
        expected = torch.stack([kept[page] for page in numbers])
        assert torch.equal(store.read("key", numbers), expected)
        assert torch.equal(store.read("value", numbers), 255 - expected)
        ids, base = store.device_ids(torch.tensor(numbers).numpy()), store.bases[0]
        assert (ids >= 0).all()
        for page, at in zip(numbers, ids.tolist(), strict=True):
            slab = store.slabs[page >> PLACE_BITS]
            place = page & ((1 << PLACE_BITS) - 1)
            assert slab.keys[place].data_ptr() == base + at * store.page_bytes
            assert slab.values[place].data_ptr() == store.bases[1] + at * store.page_bytes
    allocator.release(kept)
    assert allocator.num_used == 0
    assert allocator.num_reserved <= MIN_SLAB


def test_no_memory_for_a_slab_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = PageAllocator()
    stores = [PageStore(spec(), spec(), torch.device("cpu")) for _ in range(3)]
    for store in stores:
        allocator.attach(store)
    table = PageTable(allocator, 1)
    table.reserve([10])

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left, says the test")

    monkeypatch.setattr(stores[2], "new_slab", full)
    before = [dict(store.slabs) for store in stores]
    with pytest.raises(torch.OutOfMemoryError):
        table.reserve([20])
    assert [store.slabs for store in stores] == before
    assert (len(table.rows[0]), table.num_used, allocator.num_used) == (10, 10, 10)


@KINDS
def test_memory_that_runs_out_while_growing_is_pqc004_and_leaves_the_cache(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(kind)
    feed(cache, 100)
    before = [layer.keys.clone() for layer in cache.layers]

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left, says the test")

    with monkeypatch.context() as patch:
        patch.setattr(PageStore, "new_slab", full)
        with pytest.raises(CacheOutOfMemoryError, match="PQC004"):
            feed(cache, 200)
    assert cache.get_seq_length() == 100
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    feed(cache, 200)
    assert cache.get_seq_length() == 300


@KINDS
def test_copies_made_between_compiled_steps_do_not_write_into_each_other(kind: str) -> None:
    """Pages that a step to come was promised belong to the one that was promised them."""
    cache = make(kind, compile=True)
    feed(cache, 60)
    cache.get_mask_sizes(1, 0)
    copies = [copy.deepcopy(cache) for _ in range(2)]
    for step in range(20):
        for i, one in enumerate((cache, *copies)):
            one.get_mask_sizes(1, 0)
            feed(one, 1, seed=100 * i + step)
    alone = make(kind)
    feed(alone, 60)
    for step in range(20):
        feed(alone, 1, seed=step)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, alone.layers, strict=True))


@KINDS
def test_steps_that_only_the_device_counts_find_their_page(kind: str) -> None:
    """As captured graphs run: they advance the device's lengths and can ask nobody."""
    cache = make(kind, compile=True)
    feed(cache, 20)
    layers, lengths = cache.storage.layers, cache.storage.lengths
    for _ in range(150):
        cache.get_mask_sizes(1, 0)
        for view in layers.views.values():
            length = int(view.seq_lens[0, 0]) + 1
            assert len(layers.table.rows[0]) * view.config.page_size >= view.coded_tokens(length), f"token {length}"
            view.seq_lens.copy_(view.seq_lens_of([length]))
        lengths.is_stale = True
