"""An unchanged generate on a GPU: kernels against plain torch, eager against CUDA graphs, one compilation for many caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_models import HEAD_DIM, KV_HEADS, VOCABULARY, first_difference, llama_config, random_book
from transformers import DynamicCache, LlamaForCausalLM

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.backends import store
from hf_pqcache.models.names import cache_kwargs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYERS = 3
#: How far apart logits may be that were rounded in different places.
#: Relative distance of logits. A number that lies between two centroids may get either one from kernels and from plain torch.
BOUNDS = {torch.float16: 0.04, torch.bfloat16: 0.08}


@pytest.fixture(scope="module", params=list(BOUNDS), ids=str)
def model(request: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(LAYERS)).to("cuda", request.param).eval()


def make_cache(model: Any, **settings: Any) -> PagedPQCache:
    settings = {"page_size": 16, "extended_residual": 32, "max_pages": 64} | settings
    return PagedPQCache(model.config, random_book(), **settings)


def prompt(model: Any, lengths: list[int]) -> dict[str, Any]:
    width = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(2)).cuda()
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, cache: Any, lengths: list[int], new: int = 40) -> Any:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
    return model.generate(
        **prompt(model, lengths), **cache_kwargs(cache), max_new_tokens=new, return_dict_in_generate=True, **options
    )


@pytest.mark.parametrize("lengths", [[150], [150, 90, 20]], ids=str)
def test_kernels_agree_with_plain_torch(model: Any, lengths: list[int], monkeypatch: Any) -> None:
    fast = make_cache(model, compile=False)
    ours = generate(model, fast, lengths)
    stats = fast.stats()
    assert stats["engines"][0]["name"] == "tuned"
    assert set(stats["calls"]) == {"append/cuda", "attend/tuned"}, stats["calls"]
    assert stats["pages_used"] > 0
    monkeypatch.setenv("HF_PQCACHE_KERNEL", "torch")
    slow = make_cache(model, compile=False)
    plain = generate(model, slow, lengths)
    assert set(slow.stats()["calls"]) == {"append/torch", "attend/torch"}
    assert first_difference(ours, plain) < BOUNDS[model.dtype]


def test_compiled_equals_eager_and_compiles_once(model: Any) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    eager = generate(model, make_cache(model, compile=False), [150, 90])
    cache = make_cache(model)
    assert cache.is_compileable
    compiled = generate(model, cache, [150, 90])
    assert first_difference(compiled, eager) < BOUNDS[model.dtype]
    assert cache.get_seq_length() == 150 + 39
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert frames == 1
    cache.reset()
    again = generate(model, cache, [150, 90])
    assert torch.equal(again.sequences, compiled.sequences)
    del cache
    fresh = generate(model, make_cache(model), [150, 90])
    assert torch.equal(fresh.sequences, compiled.sequences)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames, "a second cache must not compile again"


@pytest.mark.parametrize("lengths", [[150], [150, 90, 20]], ids=str)
@pytest.mark.parametrize("compile", [False, None])
def test_exact_pages_equal_an_exact_cache(model: Any, lengths: list[int], compile: bool | None) -> None:
    torch.compiler.reset()
    cache = PagedKVCache(model.config, page_size=16, max_pages=64, compile=compile)
    assert cache.is_compileable == (compile is None), "generate compiles by itself where kernels serve"
    ours = generate(model, cache, lengths)
    stats = cache.stats()
    assert set(stats["calls"]) == {"append/cuda", "attend/exact"}, stats["calls"]
    assert stats["pages_used"] >= sum((n + 39 - 1) // 16 for n in lengths)
    exact = generate(model, DynamicCache(config=model.config), lengths)
    bound = BOUNDS[model.dtype]
    assert first_difference(ours, exact) < (bound if compile is False else 1.5 * bound)  # compiled code rounds elsewhere
    if model.dtype == torch.float16:  # in bfloat16 the two best logits may be equal
        width = max(lengths)
        assert torch.equal(ours.sequences[:, : width + 4], exact.sequences[:, : width + 4])


def test_writing_exact_pages_does_not_wait_for_the_device(model: Any) -> None:
    cache = PagedKVCache(model.config, page_size=16, max_pages=200)
    shape = (1, KV_HEADS, 100 * 16, HEAD_DIM)
    keys, values = (torch.randn(shape, device="cuda", dtype=model.dtype) for _ in range(2))
    cache.update(keys[:, :, :1], values[:, :, :1], 0)
    view = cache.storage.layers.views[0]
    cache.storage.reservation.reserve_positions(0, 102 * 16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        store.write_pages(view, 0, keys[0], values[0], 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    written = view.store.read("key", view.page_numbers(0, 0, 99)).transpose(0, 1).flatten(1, 2)
    assert torch.equal(written, keys[0, :, : 99 * 16])


def test_prefill_memory_does_not_grow_with_the_prompt(model: Any) -> None:
    def extra(tokens: int) -> int:
        cache = make_cache(model, max_pages=2048, compile=False)
        shape = (1, KV_HEADS, tokens, HEAD_DIM)
        keys, values = (torch.randn(shape, device="cuda", dtype=model.dtype) for _ in range(2))
        cache.update(keys[:, :, :64], values[:, :, :64], 0)
        held = cache.stats()["bytes_reserved"]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cache.update(keys, values, 0)
        return torch.cuda.max_memory_allocated() - before - (cache.stats()["bytes_reserved"] - held)

    small, large = extra(2048), extra(16384)
    assert large <= small + 2**20, (small, large)
