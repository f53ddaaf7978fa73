"""How an unchanged generate gets to the kernels, without a GPU: launches run on the emulator."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import harness
import pytest
import torch
from on_kernels import kernels_on_cpu
from tiny_models import SMALL, build, codebook_of, padded
from transformers import DynamicCache

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.backends import dispatch
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is built with g++")


@pytest.fixture
def kernels() -> Iterator[None]:
    with kernels_on_cpu(harness.EmulatedKernel):
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return copy.deepcopy(build("llama")).half()


def generate(model: Any, cache: Any) -> Any:
    inputs, _ = padded(2, 40)
    options = {"max_new_tokens": 14, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **cache_kwargs(cache), **options)


def first_difference(a: Any, b: Any) -> float:
    """Largest relative distance of logits up to the first token that differs."""
    worst = 0.0
    for x, y, ours, others in zip(a.logits, b.logits, a.sequences.T[-14:], b.sequences.T[-14:], strict=True):
        worst = max(worst, float((x.float() - y.float()).norm() / y.float().norm()))
        if not torch.equal(ours, others):
            break
    return worst


def test_exact_pages_run_on_their_kernels_and_equal_an_exact_cache(model: Any, kernels: None) -> None:
    cache = PagedKVCache(model.config, page_size=16, max_pages=16)
    ours = generate(model, cache)
    stats = cache.stats()
    assert set(stats["calls"]) == {"append/cuda", "attend/exact"}
    assert {engine["name"] for engine in stats["engines"].values()} == {"exact"}
    assert stats["pages_used"] == sum((length - 1) // 16 for length in (40 + 13, 33 + 13))
    exact = generate(model, DynamicCache(config=model.config))
    assert first_difference(ours, exact) < 0.02
    assert torch.equal(ours.sequences[:, :41], exact.sequences[:, :41])


def test_coded_pages_run_on_their_kernels_and_equal_plain_torch(
    model: Any, kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = PagedPQCache(model.config, codebook_of("llama"), SMALL)
    ours = generate(model, fast)
    assert set(fast.stats()["calls"]) == {"append/cuda", "attend/generic"}
    monkeypatch.setenv("HF_PQCACHE_KERNEL", "torch")
    slow = PagedPQCache(model.config, codebook_of("llama"), SMALL)
    plain = generate(model, slow)
    assert set(slow.stats()["calls"]) == {"append/torch", "attend/torch"}
    assert first_difference(ours, plain) < 0.02


def test_exact_pages_need_no_more_than_a_model_dtype_and_rows_of_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(head_dim: int, device: str = "cuda") -> dispatch.Choice:
        dispatch._select.cache_clear()
        return dispatch.select((head_dim, head_dim), (None, None), 4, torch.float16, torch.device(device))

    monkeypatch.delenv("HF_PQCACHE_KERNEL", raising=False)
    assert choose(128, "cpu") == ("torch", "the cache is on cpu")
    monkeypatch.setattr(dispatch.jit, "why_unavailable", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(dispatch.launch, "device_of", lambda index: dispatch.Device((9, 0), 132, 232448))
    assert choose(80).name == "exact"
    assert choose(84).name == "torch"
    monkeypatch.setenv("HF_PQCACHE_KERNEL", "torch")
    assert choose(80).name == "torch"
