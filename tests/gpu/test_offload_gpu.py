"""Pages in pinned host memory on a GPU: the same bits as without, however late a transfer is, and less device memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_models import VOCABULARY, llama_config, random_book
from transformers import LlamaForCausalLM

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.pages import offload

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYERS = 5
KINDS = pytest.mark.parametrize("kind", ["codes", "exact"])


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(LAYERS)).to("cuda", torch.float16).eval()


def make_cache(model: Any, kind: str, max_pages: int | None = 600, **options: Any) -> Any:
    if kind == "exact":
        return PagedKVCache(model.config, page_size=16, max_pages=max_pages, compile=False, **options)
    settings = {"page_size": 16, "extended_residual": 32, "max_pages": max_pages, "compile": False}
    return PagedPQCache(model.config, random_book(), **settings, **options)


def generate(model: Any, cache: Any, length: int = 1500, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(2)).cuda()
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 40}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_kwargs(cache),
        return_dict_in_generate=True,
        output_logits=True,
        **(settings | options),
    )
    return out.sequences, torch.stack(out.logits)


def assert_equal(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@KINDS
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prefill_chunk_size": 400}], ids=str)
def test_results_are_those_without(model: Any, kind: str, options: dict[str, Any]) -> None:
    expected = generate(model, make_cache(model, kind), **options)
    cache = make_cache(model, kind, offload=True)
    assert_equal(generate(model, cache, **options), expected)
    slabs = [slab for view in cache.storage.layers.views.values() for slab in view.store.host.values()]
    assert all(side.is_pinned() for slab in slabs for side in (slab.keys, slab.values))
    assert not cache.is_compileable
    cache.reset()
    assert_equal(generate(model, cache, **options), expected)


@KINDS
def test_late_transfers_are_waited_for(model: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every transfer starts some milliseconds late: whoever does not wait for it reads the pages of another layer."""
    expected = generate(model, make_cache(model, kind), max_new_tokens=20)
    whole = offload.StagingGroup.load

    def copy_late(self: Any, place: int) -> None:
        torch.cuda._sleep(5_000_000)
        whole(self, place)

    monkeypatch.setattr(offload.StagingGroup, "load", copy_late)
    assert_equal(generate(model, make_cache(model, kind, offload=True), max_new_tokens=20), expected)


@KINDS
def test_the_device_needs_room_for_two_layers(model: Any, kind: str) -> None:
    prompt, used = torch.ones(1, 100, dtype=torch.long, device="cuda"), []
    with torch.no_grad():
        model(prompt)  # what torch's libraries allocate once
    for options in ({}, {"offload": True}):
        cache = make_cache(model, kind, max_pages=None, expected_tokens=64000, **options)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            model(prompt, **cache_kwargs(cache), logits_to_keep=1)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated() - before)
        view = cache.storage.layers.views[0]
        layer_bytes = sum(slab.nbytes for slab in view.store.slabs.values())
        del cache, view
    assert used[0] - used[1] == pytest.approx((LAYERS - 2) * layer_bytes, rel=0.1)
