"""Compiled decode steps on the CPU: one graph, the tokens of eager code, and no compilation for the next cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graphs import NEW, Graphs, assert_same, generate
from tiny_models import ALIKE, COMPILED, EAGER_ONLY, SMALL, build, codebook_of, padded, tokens
from torch import Tensor
from transformers import DynamicCache

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.cache.reference import ReferenceCache
from hf_pqcache.eval.measure.speed import deferred_stop_check
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.storage.lengths import Lengths

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in COMPILED])
def test_compiled_steps_equal_a_cache_that_decodes(name: str, graphs: Graphs) -> None:
    model, book = build(name), codebook_of(name)
    inputs, starts = padded(2, 50)
    cache = PagedPQCache(model.config, book, SMALL, compile=True)
    assert cache.is_compileable
    expected = generate(model, ReferenceCache(model.config, book, SMALL, starts), inputs)
    assert_same(generate(model, cache, inputs, compile_config=graphs.config), expected)
    assert graphs.count == 1, "a step compiled again"

    cache.reset()
    assert_same(generate(model, cache, inputs, compile_config=graphs.config), expected)
    assert graphs.count == 1, "a cache that was reset compiled again"
    del cache
    fresh = PagedPQCache(model.config, book, SMALL, compile=True)
    assert_same(generate(model, fresh, inputs, compile_config=graphs.config), expected)
    assert graphs.count == 1, "a fresh cache compiled again"


@pytest.mark.parametrize("name", ["llama", "granite", "opt"])
def test_compiled_steps_over_exact_pages_equal_dynamic_cache(name: str, graphs: Graphs) -> None:
    """Prompts run eagerly and decode steps compiled, two turns; then a fresh cache takes over the graph."""
    model = build(name)
    inputs, _ = padded(2, 50)

    def turns(make: Any, **options: Any) -> tuple[Tensor, Tensor]:
        cache = make()
        sequences, first = generate(model, cache, inputs, **options)
        ids = torch.cat([sequences, tokens(2, 5, seed=3)], dim=1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - 50), value=1)
        _, second = generate(model, cache, {"input_ids": ids, "attention_mask": mask}, **options)
        del cache
        sequences, third = generate(model, make(), inputs, **options)
        return sequences, torch.cat([first, second, third])

    got = turns(lambda: PagedKVCache(model.config, page_size=16, max_pages=64, compile=True), compile_config=graphs.config)
    assert_same(got, turns(lambda: DynamicCache(config=model.config)))
    assert graphs.count == 1


class NoEvent:
    """In place of torch.Event, which the CPU lacks: there everything has happened."""

    def __init__(self, **options: Any) -> None: ...

    record = synchronize = lambda self: None


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_stop_check_one_step_late_leaves_no_trace_and_waits_for_nothing(
    is_compiled: bool, graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where generate looks for its end one step late it crops nothing in each step, and the step too many at the end."""
    monkeypatch.setattr(torch, "Event", NoEvent)
    reads = 0
    refresh = Lengths.refresh

    def counted(lengths: Lengths) -> None:
        nonlocal reads
        reads += 1
        refresh(lengths)

    monkeypatch.setattr(Lengths, "refresh", counted)
    model = build("llama")
    ids = tokens(1, 50)
    sampling = {"do_sample": True, "temperature": 3.0}
    torch.manual_seed(0)
    plain, logits = generate(model, DynamicCache(config=model.config), {"input_ids": ids}, **sampling)
    new = plain[0, 50:].tolist()
    end = max(set(new), key=new.index)  # the token that comes last for the first time
    stop = 50 + new.index(end) + 1
    assert stop > 55
    options = sampling | ({"compile_config": graphs.config} if is_compiled else {})
    torch.manual_seed(0)
    with deferred_stop_check():
        cache = PagedKVCache(model.config, page_size=16, max_pages=64, compile=is_compiled)
        got = generate(model, cache, {"input_ids": ids}, eos_token_id=end, pad_token_id=0, **options)
    assert_same(got, (plain[:, :stop], logits[: stop - 50]))
    assert reads <= NEW // 8, "lengths are read once per half a page of steps"
    assert cache.get_seq_length() == stop - 1
    assert graphs.count == int(is_compiled)


def test_eager_and_compiled_calls_take_turns_on_one_cache(graphs: Graphs) -> None:
    """Prompts run eagerly and decode steps compiled, turn after turn; beams run eagerly on the same kind of cache."""
    model, book = build("llama"), codebook_of("llama")
    caches = [PagedPQCache(model.config, book, SMALL, compile=True), ReferenceCache(model.config, book, SMALL)]
    results = []
    for cache, options in zip(caches, ({"compile_config": graphs.config}, {}), strict=True):
        ids, parts = tokens(2, 30), []
        for turn in range(3):
            sequences, logits = generate(model, cache, {"input_ids": ids}, max_new_tokens=9, **options)
            parts.append(logits)
            ids = torch.cat([sequences, tokens(2, 5, seed=turn)], dim=1)
        results.append((sequences, torch.cat(parts)))
    assert_same(*results)
    assert graphs.count == 1
    beams = {"num_beams": 3, "max_new_tokens": 9}
    inputs = {"input_ids": tokens(2, 50)}
    got = generate(model, PagedPQCache(model.config, book, SMALL, compile=True), inputs, compile_config=graphs.config, **beams)
    assert_same(got, generate(model, ReferenceCache(model.config, book, SMALL), inputs, **beams))


def test_compiled_steps_rarely_wait_for_the_device(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host counts compiled steps and reads lengths back once per half a page of them: each reading is a wait."""
    readings: list[int] = []
    refresh = Lengths.refresh
    monkeypatch.setattr(Lengths, "refresh", lambda self: (readings.append(1), refresh(self))[1])
    model, book = build("llama"), codebook_of("llama")
    cache = PagedPQCache(model.config, book, SMALL, compile=True)
    steps = 4 * SMALL.page_size
    generate(model, cache, {"input_ids": tokens(1, 50)}, max_new_tokens=steps, compile_config=graphs.config)
    assert 0 < len(readings) <= steps // (SMALL.page_size // 2)


@pytest.mark.parametrize("mode", ["sampling", "chunks", "copy"])
def test_other_modes_compile_too(mode: str, graphs: Graphs) -> None:
    import copy

    model, book = build("qwen3"), codebook_of("qwen3")
    results = []
    for cache in (PagedPQCache(model.config, book, SMALL, compile=True), ReferenceCache(model.config, book, SMALL)):
        options: dict[str, Any] = {"compile_config": graphs.config} if isinstance(cache, PagedPQCache) else {}
        ids = tokens(2, 50)
        if mode == "sampling":
            torch.manual_seed(0)
            options |= {"do_sample": True, "temperature": 2.0}
        elif mode == "chunks":
            options |= {"prefill_chunk_size": 25}
            if "compile_config" in options:
                options["compile_config"].fullgraph = False
        else:
            with torch.no_grad():
                model(ids[:, :40], **cache_kwargs(cache))
            cache = copy.deepcopy(cache)
        results.append(generate(model, cache, {"input_ids": ids}, **options))
    assert_same(*results)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "reader", "deepseek_v3"])
def test_what_cannot_compile_says_no_before_it_starts(name: str, graphs: Graphs) -> None:
    """Sliding layers of transformers cannot be compiled, nor models that read keys themselves: they run eagerly."""
    model, book = build(name, "eager" if name in EAGER_ONLY else "sdpa"), codebook_of(name)
    cache = PagedPQCache(model.config, book, SMALL, compile=True)
    assert not cache.is_compileable
    inputs = {"input_ids": tokens(2, 50)}
    got = generate(model, cache, inputs, compile_config=graphs.config)
    assert_same(got, generate(model, ReferenceCache(model.config, book, SMALL), inputs))
    assert not cache.is_compileable
    assert graphs.count == 0
