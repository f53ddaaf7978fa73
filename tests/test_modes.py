"""Every mode of `generate`, on many architectures: tokens and logits equal those of a plain, uncompressing cache."""

from __future__ import annotations

import pytest
from scenarios import SCENARIOS, Run, assert_same, is_supported
from tiny_models import ALIKE, EAGER_ONLY, FUSED, MORE_FUSED, SMALL, build, codebook_of
from transformers import DynamicCache

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.cache.reference import ReferenceCache

pytestmark = pytest.mark.usefixtures("one_thread")

#: Nothing in the other scenarios depends on the attention function.
FEW = ("greedy, padded", "beams, padded", "turns, padded", "hand-made mask")
CASES = [
    pytest.param(name, implementation, s, marks=[pytest.mark.slow] if name in ALIKE and s not in FEW else [])
    for name in FUSED
    for implementation in ["eager" if name in EAGER_ONLY else "sdpa"]
    for s in SCENARIOS
]
CASES += [(name, "eager" if name in EAGER_ONLY else "sdpa", s) for name in MORE_FUSED for s in FEW]
CASES += [(name, "eager", s) for name in (*FUSED, *MORE_FUSED) if name not in EAGER_ONLY for s in FEW]


@pytest.mark.parametrize(("name", "implementation", "scenario"), CASES)
def test_equals_a_cache_that_decodes(name: str, implementation: str, scenario: str) -> None:
    if not is_supported(name, scenario):
        pytest.skip("transformers refuses it for every cache")
    config, book = build(name, implementation).config, codebook_of(name)
    ours = Run(name, implementation, lambda starts: PagedPQCache(config, book, SMALL))
    theirs = Run(name, implementation, lambda starts: ReferenceCache(config, book, SMALL, starts))
    assert_same(SCENARIOS[scenario], ours, theirs)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen3_next", "falcon_h1"])
def test_equals_dynamic_cache_while_nothing_is_coded(name: str, scenario: str) -> None:
    implementation = "eager" if name in EAGER_ONLY else "sdpa"
    if not is_supported(name, scenario):
        pytest.skip("transformers refuses it for every cache")
    config, book = build(name, implementation).config, codebook_of(name)
    ours = Run(name, implementation, lambda starts: PagedPQCache(config, book, SMALL, extended_residual=128), length=20)
    theirs = Run(name, implementation, lambda starts: DynamicCache(config=config), length=20)
    assert_same(SCENARIOS[scenario], ours, theirs)


#: Grouped heads; windows beside full attention; learnt positions; attention sinks; a recurrent state.
EXACT_CASES = [
    (name, "eager" if name in EAGER_ONLY else "sdpa", s)
    for name in ("llama", "gemma3", "opt", "gpt_oss", "qwen3_next", "falcon_h1")
    for s in SCENARIOS
]
EXACT_CASES += [(name, "eager", s) for name in ("llama", "gemma2") for s in FEW]


@pytest.mark.parametrize(("name", "implementation", "scenario"), EXACT_CASES)
def test_exact_pages_equal_dynamic_cache(name: str, implementation: str, scenario: str) -> None:
    """Three pages are full after the prompt; every decode step reads them."""
    if not is_supported(name, scenario):
        pytest.skip("transformers refuses it for every cache")
    config = build(name, implementation).config
    assert PagedKVCache(config).stats()["compressed_layers"]
    ours = Run(name, implementation, lambda starts: PagedKVCache(config, page_size=16, max_pages=64))
    theirs = Run(name, implementation, lambda starts: DynamicCache(config=config))
    assert_same(SCENARIOS[scenario], ours, theirs)
