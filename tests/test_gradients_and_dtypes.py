"""A cache in training code and under autocast: gradients of the current pass, no graph kept, dtypes as torch.cat has them."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from allocations import Allocations
from tiny_models import SMALL, build, codebook_of, tokens
from torch import Tensor
from transformers import DynamicCache

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = pytest.mark.parametrize("kind", ["codes", "exact"])
WINDOW = 30  # tokens that all caches here hold exactly


def make(kind: str) -> Any:
    config = build("llama").config
    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "exact":
        return PagedKVCache(config, page_size=16)
    return PagedPQCache(config, codebook_of("llama"), SMALL)


def logits(cache: Any, ids: Tensor) -> Tensor:
    return build("llama")(ids, **cache_kwargs(cache)).logits


def gradients(cache: Any, passes: list[Tensor]) -> list[Tensor]:
    """Of the last pass's loss with respect to all weights."""
    model = build("llama")
    for ids in passes[:-1]:
        with torch.no_grad():
            logits(cache, ids)
    model.zero_grad()
    logits(cache, passes[-1]).square().mean().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


@KINDS
@pytest.mark.parametrize("counts", [[20], [20, 1], [20, 1, 1], [20, 5]], ids=str)
def test_gradients_of_the_current_pass_are_the_models(kind: str, counts: list[int]) -> None:
    passes = [tokens(2, count, seed) for seed, count in enumerate(counts)]
    got, expected = gradients(make(kind), passes), gradients(make("dynamic"), passes)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


@KINDS
def test_a_conversation_without_no_grad_computes_the_same(kind: str) -> None:
    """Also past the exact window: a plain model(ids) of many tokens, then steps."""
    inputs = [tokens(1, 100, 1), *(tokens(1, 1, seed) for seed in range(2, 24)), tokens(1, 20, 50)]
    tracked, plain = make(kind), make(kind)
    for ids in inputs:
        with torch.no_grad():
            expected = logits(plain, ids)
        got = logits(tracked, ids)
        assert got.requires_grad
        torch.testing.assert_close(got.detach(), expected, rtol=1e-4, atol=1e-4)
    assert tracked.stats()["pages_used"] == plain.stats()["pages_used"] > 0
    assert not any(w.requires_grad for v in tracked.storage.layers.views.values() for w in (v.window_keys, v.window_values))


@KINDS
def test_a_reused_cache_keeps_no_graph(kind: str) -> None:
    cache = make(kind)
    held = []
    with Allocations() as memory:
        for seed in range(5):
            logits(cache, tokens(1, 90, seed)).square().mean().backward()
            logits(cache, tokens(1, 1, seed))
            logits(cache, tokens(1, 7, seed)).square().mean().backward()
            cache.reset()
            build("llama").zero_grad(set_to_none=True)
            gc.collect()
            held.append(memory.held())
    assert held[-1] <= held[1] + 4096


@KINDS
def test_what_autocast_stored_goes_on_in_float32(kind: str) -> None:
    """Within the window every cache holds what DynamicCache does: bfloat16 tokens as they are, float32 ones as they are."""

    def run(cache: Any) -> list[Tensor]:
        out = []
        with torch.no_grad():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out.append(logits(cache, tokens(2, 12, 1)))
            out += [logits(cache, tokens(2, n, 2)) for n in (6, 1, 1)]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out += [logits(cache, tokens(2, n, 3)) for n in (2, 1)]
            out.append(logits(cache, tokens(2, 1, 4)))
        return out

    for i, (got, expected) in enumerate(zip(run(make(kind)), run(make("dynamic")), strict=True)):
        bound = 1e-3 if i < 4 else 0.03  # a step of ours attends in float32, which bfloat16 queries would not
        torch.testing.assert_close(got.float(), expected.float(), rtol=bound, atol=bound)


@pytest.mark.parametrize("options", [{}, {"offload": True}], ids=str)
def test_pages_of_tokens_are_rewritten_without_loss(options: dict[str, Any]) -> None:
    config, generator = build("llama").config, torch.Generator().manual_seed(0)
    cache, twin = PagedKVCache(config, page_size=16, **options), DynamicCache(config=config)
    copies = []
    for dtype, count in (
        (torch.bfloat16, 50),
        (torch.float32, 40),
        (torch.bfloat16, 1),
        (torch.float16, 20),
        (torch.float32, 1),
    ):
        for layer in range(2):
            k, v = torch.randn(2, 2, 2, count, 16, generator=generator).to(dtype)
            cache.update(k, v, layer)
            twin.update(k, v, layer)
        expected = [layer.keys.clone() for layer in twin.layers]
        assert all(torch.equal(a.keys, b) for a, b in zip(cache.layers, expected, strict=True))
        copies.append((copy.deepcopy(cache), expected))
    for other, expected in copies:  # which share pages with a cache that went on in another dtype
        assert all(torch.equal(a.keys, b) for a, b in zip(other.layers, expected, strict=True))
        assert other.layers[0].keys.dtype == expected[0].dtype
    assert cache.stats()["pages_used"] > 0
