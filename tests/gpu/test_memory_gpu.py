"""Memory on a GPU, by torch's allocator: held follows used, growth disturbs no graph, and a full cache says so in time."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from gpu_models import HEAD_DIM, KV_HEADS, VOCABULARY, first_difference, llama_config, random_book
from transformers import DynamicCache, LlamaForCausalLM

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.pages.block_pool import MIN_SLAB

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYERS = 3
KINDS = pytest.mark.parametrize("kind", ["codes", "exact"])


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(LAYERS)).to("cuda", torch.float16).eval()


def make(model: Any, kind: str, **options: Any) -> Any:
    if kind == "exact":
        return PagedKVCache(model.config, **{"page_size": 16, **options})
    return PagedPQCache(model.config, random_book(), **{"page_size": 16, "extended_residual": 32, **options})


def generate(model: Any, cache: Any, ids: Any, new: int, **options: Any) -> Any:
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **cache_kwargs(cache), **(settings | options))


def prompt(count: int, seed: int = 2, batch: int = 1) -> Any:
    return torch.randint(1, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed)).cuda()


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def feed(cache: Any, count: int, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    for layer in range(LAYERS):
        shape = (2, 1, KV_HEADS, count, HEAD_DIM)
        cache.update(*torch.randn(shape, generator=generator, device="cuda", dtype=torch.float16), layer)
    cache.stats()


@KINDS
@pytest.mark.parametrize("options", [{}, {"offload": True}], ids=str)
@pytest.mark.parametrize("count", [128, 2048, 32768])
def test_held_by_the_allocator_follows_used(model: Any, kind: str, options: dict[str, Any], count: int) -> None:
    warm = make(model, kind, **options)  # scratch that kernels keep, and tensors that a next cache takes over
    feed(warm, count, 0)
    feed(warm, 1, 0)
    del warm
    before = allocated()
    cache = make(model, kind, **options)
    tables = 0
    for step, more in enumerate([count, 1, 1, count // 3, 1]):
        feed(cache, more, step)
        stats = cache.stats()
        tables = max(tables, stats["bytes"]["tables"])
        held = allocated() - before + tables  # which were there before
        slab = 2 * (MIN_SLAB + 1) * cache.storage.layers.page_bytes
        # The allocator rounds sizes, and leaves up to 1 MiB of a large block unsplit with whoever took it.
        large = sum(s.nbytes > 1 << 20 for v in cache.storage.layers.views.values() for s in v.store.slabs.values())
        rounding = 4096 * LAYERS * (4 + 2 * len(cache.storage.layers.views[0].store.slabs)) + (large << 20)
        assert abs(held - stats["bytes_reserved_device"]) <= rounding + 2 * tables
        assert stats["bytes_reserved"] <= 1.15 * stats["bytes_total"] + slab
    cache.reset()
    assert allocated() - before <= stats["bytes"]["window"] + stats["bytes"]["codebooks"] + slab + rounding + 2 * tables


@KINDS
def test_compiled_generate_grows_under_one_graph(model: Any, kind: str) -> None:
    """Slabs come while captured graphs are replayed; results are those of eager code, and nothing compiles again."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    ids = prompt(100)
    logits = {"output_logits": True, "return_dict_in_generate": True}
    expected = generate(model, make(model, kind, compile=False), ids, 400, **logits)
    cache = make(model, kind)
    assert cache.is_compileable
    generate(model, cache, ids, 24, **logits)
    frames, reserved = torch._dynamo.utils.counters["stats"]["unique_graphs"], cache.stats()["pages_reserved"]
    cache.reset()
    got = generate(model, cache, ids, 400, **logits)
    stats = cache.stats()
    assert stats["pages_reserved"] > reserved
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames == 1
    assert first_difference(got, expected) < 0.03  # compiled code rounds elsewhere
    assert stats["bytes_reserved"] <= 1.15 * stats["bytes_total"] + 2 * (MIN_SLAB + 1) * cache.storage.layers.page_bytes
    if kind == "exact":
        assert first_difference(got, generate(model, DynamicCache(config=model.config), ids, 60, **logits)) < 0.03


@KINDS
def test_compiled_generate_past_the_last_page(model: Any, kind: str) -> None:
    """At every length from 1 to 200 tokens past the border: PQC001 before the step, not a token lost or made up."""
    torch.compiler.reset()
    cache = make(model, kind, max_pages=4)
    config = cache.storage.layers.config
    room = config.sink_tokens + config.extended_residual + 5 * config.page_size - 1
    ids = prompt(room - 30)
    whole = generate(model, cache, ids, 31)  # the last token needs no place
    assert (whole.shape[1], cache.get_seq_length()) == (room + 1, room)
    for beyond in [*range(1, 40), *range(40, 201, 10)]:
        cache.reset()
        with pytest.raises(PagesExhaustedError, match="PQC001"):
            generate(model, cache, ids, 31 + beyond)
        assert cache.get_seq_length() == room
        assert cache.stats()["pages_used"] == 4
    cache.crop(-20)
    again = generate(model, cache, whole[:, : room - 19], 20)
    assert again.shape[1] == room + 1


@KINDS
def test_two_live_caches_in_turn_equal_each_alone(model: Any, kind: str) -> None:
    """Also a copy that shares the prefix of the other."""
    torch.compiler.reset()
    ids = [prompt(120, seed=1), prompt(133, seed=2)]
    alone = [generate(model, make(model, kind), x, 80) for x in ids]
    caches, texts = [make(model, kind) for _ in ids], list(ids)
    for _ in range(8):
        for i in range(2):
            texts[i] = generate(model, caches[i], texts[i], 10)
    for got, expected in zip(texts, alone, strict=True):
        assert torch.equal(got[:, :160], expected[:, :160])
    twin = copy.deepcopy(caches[0])
    more = [generate(model, cache, texts[0], 40) for cache in (caches[0], twin)]
    assert torch.equal(*more)
    assert twin.storage.layers.allocator is caches[0].storage.layers.allocator


@KINDS
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_own_compile_of_a_step(model: Any, kind: str, backend: str) -> None:
    """Without get_mask_sizes on the host between steps: pages are there, or it is PQC001."""
    torch.compiler.reset()
    caches = [make(model, kind, compile=False), make(model, kind)]
    step = torch.compile(lambda ids, **kwargs: model(ids, **kwargs), backend=backend)
    logits: list[list[Any]] = [[], []]
    with torch.no_grad():
        for i, cache in enumerate(caches):
            model(prompt(100), **cache_kwargs(cache))
            for n in range(50):
                logits[i].append((model if i == 0 else step)(prompt(1, seed=n), **cache_kwargs(cache)).logits)
        assert caches[1].get_seq_length() == 150
        for a, b in zip(*logits, strict=True):
            assert float((a - b).float().norm() / a.float().norm()) < 0.03
        full = make(model, kind, max_pages=6)
        model(prompt(100), **cache_kwargs(full))

        def fill() -> None:
            for n in range(200):
                step(prompt(1, seed=n), **cache_kwargs(full))

        with pytest.raises(PagesExhaustedError, match="PQC001"):
            fill()
