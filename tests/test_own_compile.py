"""Whoever compiles a model or a loop around it by himself, with any back end: the answer is eager code's, or PQC001."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import SMALL, build, codebook_of, padded, tokens
from torch import Tensor

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = pytest.mark.parametrize("kind", ["codes", "exact"])
PROMPT, STEPS = 50, 18  # steps cross a page's border


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(kind: str, **options: Any) -> Any:
    config = build("llama").config
    if kind == "exact":
        return PagedKVCache(config, page_size=16, **options)
    return PagedPQCache(config, codebook_of("llama"), SMALL.replace(max_pages=None), **options)


Forward = Callable[..., Any]


def whole_forward(backend: str) -> Forward:
    model = copy.deepcopy(build("llama"))
    model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
    return model


def decode_loop(backend: str) -> Forward:
    model = copy.deepcopy(build("llama"))

    @torch.compile(backend=backend)
    def step(ids: Tensor, **kwargs: Any) -> Any:
        return model(ids, **kwargs)

    return lambda ids, **kwargs: (step if ids.shape[1] == 1 else model)(ids, **kwargs)


def run(forward: Forward, cache: Any, steps: int = STEPS, batch: int = 2) -> Tensor:
    out = []
    with torch.no_grad():
        forward(tokens(batch, PROMPT), **cache_kwargs(cache))
        for step in range(steps):
            out.append(forward(tokens(batch, 1, seed=step), **cache_kwargs(cache)).logits)
    return torch.stack(out)


WAYS = [
    pytest.param(whole_forward, "eager", False, "codes", marks=pytest.mark.slow),
    pytest.param(whole_forward, "aot_eager", True, "exact", marks=pytest.mark.slow),
    (decode_loop, "aot_eager", True, "codes"),
    (decode_loop, "aot_eager", False, "codes"),
    (decode_loop, "eager", None, "exact"),
]


@pytest.mark.parametrize(("way", "backend", "compile", "kind"), [*WAYS, (decode_loop, "aot_eager", True, "exact")])
def test_own_compile_equals_eager_code(way: Callable[[str], Forward], backend: str, compile: bool | None, kind: str) -> None:
    eager, cache = make(kind, compile=False), make(kind, compile=compile)
    expected, got = run(build("llama"), eager), run(way(backend), cache)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == PROMPT + STEPS
    assert cache.stats()["pages_used"] >= eager.stats()["pages_used"] > 0
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, eager.layers, strict=True))


def test_own_compile_without_asking_for_masks() -> None:
    """A mask of the user's own: nobody calls `get_mask_sizes`, and pages are there all the same."""
    eager, cache = make("codes", compile=False), make("codes", compile=True)
    model = build("llama")
    plain = [layer.self_attn.forward for layer in model.model.layers]
    compiled = [torch.compile(forward, backend="aot_eager") for forward in plain]
    positions = torch.zeros(1, 1, dtype=torch.long)
    cos_sin = model.model.rotary_emb(torch.zeros(1, 1, 32), positions)
    outs: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for forwards, one, out in ((plain, eager, outs[0]), (compiled, cache, outs[1])):
            for i in range(80):
                hidden = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(i))
                for forward in forwards:
                    out.append(forward(hidden, position_embeddings=cos_sin, attention_mask=None, **cache_kwargs(one))[0])
    torch.testing.assert_close(torch.stack(outs[1]), torch.stack(outs[0]), rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 80


@pytest.mark.parametrize(("kind", "backend"), [("codes", "aot_eager"), ("exact", "eager")])
def test_own_compile_past_max_pages_is_pqc001(kind: str, backend: str) -> None:
    cache, eager = make(kind, compile=True, max_pages=6), make(kind, compile=False, max_pages=6)
    for forward, one in ((build("llama"), eager), (decode_loop(backend), cache)):
        with pytest.raises(PagesExhaustedError, match="PQC001"):
            run(forward, one, steps=200)
    assert cache.get_seq_length() == eager.get_seq_length() > PROMPT
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, eager.layers, strict=True))


def compile_config() -> Any:
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return config


@KINDS
@pytest.mark.parametrize("prompt", [33, 40, 48, 97])
def test_compiled_generate_stops_at_the_last_page_and_not_a_token_later(kind: str, prompt: int) -> None:
    """Found before the step begins: the cache holds every token that there is room for, as eager code's does."""
    model = build("llama")
    lengths = []
    for is_compiled in (False, True):
        cache = make(kind, compile=is_compiled, max_pages=8)
        options = {"compile_config": compile_config()} if is_compiled else {}
        with pytest.raises(PagesExhaustedError, match="PQC001"):
            model.generate(tokens(1, prompt), **cache_kwargs(cache), do_sample=False, max_new_tokens=300, **options)
        lengths.append(cache.get_seq_length())
        assert cache.stats()["pages_used"] == 8
        cache.crop(-20)
        room = lengths[-1] - cache.get_seq_length()
        ids = tokens(1, cache.get_seq_length() + 1)
        cache_now = cache.get_seq_length()
        out = model.generate(ids, **cache_kwargs(cache), do_sample=False, max_new_tokens=room, **options)
        assert out.shape[1] == cache_now + 1 + room, "what fits is generated"
    assert lengths[0] == lengths[1]


@KINDS
@pytest.mark.parametrize("beyond", [1, 2, 16, 17])
def test_what_is_asked_for_fits_or_is_refused(kind: str, beyond: int) -> None:
    """generate never returns tokens that the cache could not hold."""
    model = build("llama")
    full = make(kind, compile=False, max_pages=4)
    config = full.storage.layers.config
    room = config.sink_tokens + config.extended_residual + 5 * config.page_size - 1
    for new in (room - 40, room - 40 + beyond):
        cache = make(kind, compile=True, max_pages=4)
        inputs, _ = padded(1, 41)
        options = {"do_sample": False, "max_new_tokens": new, "compile_config": compile_config()}
        if new == room - 40:  # the last token needs no place
            assert model.generate(**inputs, **cache_kwargs(cache), **options).shape[1] == 41 + new
            assert cache.get_seq_length() == room
        else:
            with pytest.raises(PagesExhaustedError, match="PQC001"):
                model.generate(**inputs, **cache_kwargs(cache), **options)
            assert cache.get_seq_length() == room


@KINDS
def test_two_live_caches_in_turn_equal_each_alone(kind: str) -> None:
    """They share compiled code; neither sees the other's tokens."""
    model, step = build("llama"), decode_loop("eager")
    prompts = [tokens(1, PROMPT, seed=1), tokens(1, PROMPT + 13, seed=2)]
    caches, alone = [make(kind, compile=True) for _ in prompts], [make(kind, compile=False) for _ in prompts]
    with torch.no_grad():
        for i, ids in enumerate(prompts):
            step(ids, **cache_kwargs(caches[i]))
            model(ids, **cache_kwargs(alone[i]))
        for n in range(STEPS):
            for i in range(2):
                ids = tokens(1, 1, seed=10 * n + i)
                got, expected = step(ids, **cache_kwargs(caches[i])).logits, model(ids, **cache_kwargs(alone[i])).logits
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
