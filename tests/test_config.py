"""Sizes of a cache: what PQConfig refuses, the page size for a length, and a pool that never grows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import SMALL, build, codebook_of, tokens
from torch import Tensor

from hf_pqcache import PagedKVCache, PagedPQCache, PQConfig
from hf_pqcache.config import MAX_TOKENS, choose_page_size
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = pytest.mark.parametrize("kind", ["codes", "exact"])


def make(kind: str, **settings: Any) -> Any:
    config = build("llama").config
    if kind == "exact":
        return PagedKVCache(config, **settings)
    return PagedPQCache(config, codebook_of("llama"), SMALL, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 24}, "multiple of 16 from 16 to 512"),
        ({"page_size": "64"}, "page_size='64' must be an integer, got str"),
        ({"page_size": True}, "must be an integer, got bool"),
        ({"max_pages": 0}, "at least 1"),
        ({"max_pages": MAX_TOKENS // 64 + 1}, "use max_pages=33554431 or less"),
        ({"sink_tokens": MAX_TOKENS + 1}, "32 bits"),
        ({"extended_residual": 0}, "the token being decoded stays exact"),
        ({"num_bits": 9}, "use 4 to 8"),
        ({"value_bits": 3}, "use 4 to 8"),
        ({"bits": 5}, r"use one of \[2, 3, 4\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        PQConfig(**settings)


# -- page_size="auto" -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "page_size"),
    [(1, 16), (1024, 16), (2047, 16), (2048, 32), (4096, 64), (8191, 64), (8192, 128), (16_384, 256), (10**6, 256)],
)
def test_the_page_size_of_a_length(tokens: int, page_size: int) -> None:
    assert choose_page_size("auto", tokens) == page_size


@given(st.integers(1, 10**7))
def test_an_unfinished_page_is_small_against_the_sequence(expected_tokens: int) -> None:
    page_size = choose_page_size("auto", expected_tokens)
    assert page_size in (16, 32, 64, 128, 256)
    assert page_size == 16 or page_size * 64 <= expected_tokens
    assert page_size == 256 or 2 * page_size * 64 > expected_tokens, "the largest that is small enough"
    config = PQConfig(page_size=page_size, max_pages=10**5)
    exact = expected_tokens - config.coded_tokens(expected_tokens) - config.sink_tokens - config.extended_residual
    assert exact < max(16, expected_tokens / 64)


@KINDS
def test_caches_take_it(kind: str) -> None:
    cache = make(kind, page_size="auto", expected_tokens=5000, max_pages=100)
    assert cache.storage.layers.config.page_size == 64
    assert make(kind, page_size=32, expected_tokens=5000, max_pages=200).storage.layers.config.page_size == 32
    with pytest.raises(ValueError, match=r"pass expected_tokens=, prompt and new tokens together \(got None\)"):
        make(kind, page_size="auto")
    with pytest.raises(ValueError, match=r"got 0"):
        make(kind, page_size="auto", expected_tokens=0)
    with pytest.raises(ValueError, match=r'page_size=.best. is neither a number of tokens nor "auto"'):
        make(kind, page_size="best", expected_tokens=100)


# -- max_pages --------------------------------------------------------------------------------------------------------
@KINDS
def test_a_pool_without_room_for_the_expected_length_is_refused_at_once(kind: str) -> None:
    recent = 1 if kind == "exact" else SMALL.extended_residual + SMALL.sink_tokens
    fits = 10 * 16 + recent + 15
    make(kind, page_size=16, max_pages=10, expected_tokens=fits)
    with pytest.raises(ValueError, match=r"fill 11 pages of 16 tokens and max_pages=10; use max_pages=11 or more"):
        make(kind, page_size=16, max_pages=10, expected_tokens=fits + 1)


def memory(cache: Any) -> list[tuple[int, int]]:
    views = cache.storage.layers.views.values()
    return [(x.data_ptr(), x.nbytes) for view in views for x in vars(view).values() if isinstance(x, Tensor)]


@KINDS
def test_growth_beyond_max_pages_is_refused_and_nothing_grows(kind: str) -> None:
    """Prompt, single steps, generate and sequences: each raises PQC001, leaves what was there, and goes on after crop."""
    model, cache = build("llama"), make(kind, page_size=16, max_pages=5)

    def forward(count: int) -> None:
        with torch.no_grad():
            model(tokens(1, count), **cache_kwargs(cache))

    def step_by_step(count: int) -> None:
        for _ in range(count):
            forward(1)

    with pytest.raises(PagesExhaustedError, match=r"PQC001.*max_pages=\d+ or more"):
        forward(200)
    assert (cache.get_seq_length(), cache.stats()["pages_used"]) == (0, 0)
    forward(70)
    before = memory(cache)
    with pytest.raises(PagesExhaustedError, match="PQC001"):
        step_by_step(200)
    room = cache.storage.layers.config.sink_tokens + cache.storage.layers.config.extended_residual + 6 * 16 - 1
    assert cache.get_seq_length() == room, "every token that there is room for, and not one more"
    with pytest.raises(PagesExhaustedError, match="PQC001"):
        model.generate(tokens(1, room + 1), **cache_kwargs(cache), max_new_tokens=5)
    assert (cache.get_seq_length(), cache.stats()["pages_used"], cache.stats()["pages_free"]) == (room, 5, 0)
    cache.crop(-40)
    forward(40)
    assert memory(cache) == before
    cache.reset()
    cache.allocate_sequence("a")
    with pytest.raises(PagesExhaustedError, match="PQC001"):
        cache.allocate_sequence("b", initial_len=200)
    assert cache.sequence_ids == ["a"]
