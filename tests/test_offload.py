"""Pages in host memory: the numbers are those of a cache on the device, bit for bit, and the device holds two layers only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenarios import SCENARIOS, Run, assert_same
from tiny_models import EAGER_ONLY, SMALL, build, codebook_of, tokens
from torch import Tensor

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.pages import offload

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "llama_deep"
LAYERS = 5
KINDS = pytest.mark.parametrize("kind", ["codes", "exact"])


def make(kind: str, **options: Any) -> Any:
    config = build(NAME).config
    if kind == "exact":
        return PagedKVCache(config, page_size=16, max_pages=64, **options)
    return PagedPQCache(config, codebook_of(NAME), SMALL, **options)


@given(st.sets(st.integers(0, 40)))
def test_runs_are_all_pages_in_as_few_ranges_as_can_be(pages: set[int]) -> None:
    found = offload.runs(pages)
    assert [page for run in found for page in range(run.start, run.stop)] == sorted(pages)
    assert all(a.stop < b.start for a, b in pairwise(found))


CASES = [("codes", scenario) for scenario in SCENARIOS]
CASES += [("exact", scenario) for scenario in ("beams, padded", "prompt lookup", "chunks", "rows moved", "deep copies")]


@pytest.mark.parametrize(("kind", "scenario"), CASES)
def test_results_are_those_without(kind: str, scenario: str) -> None:
    ours = Run(NAME, "sdpa", lambda starts: make(kind, offload=True))
    theirs = Run(NAME, "sdpa", lambda starts: make(kind))
    assert_same(SCENARIOS[scenario], ours, theirs, tolerance=0)


@pytest.mark.parametrize("name", ["gemma3", "gptj", "deepseek_v3", "opt", "gpt_oss", "qwen3_next", "gemma3n"])
def test_other_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that read decoded keys or share them between layers; with one staging pool for their few layers."""
    monkeypatch.setattr(offload, "NUM_STAGING", 1)
    config, book = build(name).config, codebook_of(name)
    implementation = "eager" if name in EAGER_ONLY else "sdpa"
    ours = Run(name, implementation, lambda starts: PagedPQCache(config, book, SMALL, offload=True))
    theirs = Run(name, implementation, lambda starts: PagedPQCache(config, book, SMALL))
    assert_same(SCENARIOS["beams, padded"], ours, theirs, tolerance=0)


def slabs(cache: Any) -> dict[int, int]:
    """Bytes of every slab on the device, by address."""
    found = [slab for view in cache.storage.layers.views.values() for slab in view.store.slabs.values()]
    return {slab.keys.data_ptr(): slab.keys.nbytes + slab.values.nbytes for slab in found}


@KINDS
def test_the_device_holds_the_pages_of_two_layers(kind: str) -> None:
    found = []
    for options in ({}, {"offload": True}):
        cache = make(kind, **options)
        with torch.no_grad():
            build(NAME)(tokens(2, 70), **cache_kwargs(cache))
        found.append((sum(slabs(cache).values()), cache.stats(), cache))
    (whole, plain, _), (staged, stats, cache) = found
    assert stats["pages_used"] == plain["pages_used"] > 0
    assert staged * LAYERS == whole * 2
    name = "pages" if kind == "exact" else "codes"
    assert stats["bytes"] == plain["bytes"] | {"staging": plain["bytes"][name] * 2 // LAYERS}
    assert plain["bytes_host"] == plain["bytes"]["staging"] == 0
    assert plain["bytes_device"] == plain["bytes_total"]
    assert stats["bytes_host"] == stats["bytes"][name]
    assert stats["bytes_device"] + stats["bytes_host"] == stats["bytes_total"]
    assert plain["bytes_device"] - stats["bytes_device"] == plain["bytes"][name] * (LAYERS - 2) // LAYERS
    assert stats["bytes_reserved_host"] == whole
    assert plain["bytes_reserved_host"] == 0


def transfers(cache: Any, monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> list[int]:
    """Places of the layers whose pages came to the device during `action`."""
    seen = []
    whole = offload.StagingGroup.load

    def copy_and_note(self: Any, place: int) -> None:
        seen.append(place)
        whole(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(offload.StagingGroup, "load", copy_and_note)
        action()
    return seen


def test_every_layer_comes_once_a_step_and_ahead_of_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, model = make("codes", offload=True), build(NAME)

    def step() -> None:
        with torch.no_grad():
            model(tokens(1, 1), **cache_kwargs(cache))

    with torch.no_grad():
        model(tokens(1, 100), **cache_kwargs(cache))
    step()
    assert transfers(cache, monkeypatch, step) == [0, 1, 2, 3, 4]

    staging: list[Tensor | None] = []
    for layer in model.model.layers:  # what is there already when a layer begins
        place = layer.self_attn.layer_idx
        layer.register_forward_pre_hook(
            lambda *_, place=place: staging.append(cache.storage.layers.views[0].store.group.staging[place % 2].owner == place)
        )
    try:
        step()
    finally:
        for layer in model.model.layers:
            layer._forward_pre_hooks.clear()
    assert staging == [False, True, True, True, True], "an odd layer is last: its pool cannot take the first layer's"


class Device:
    """A stand-in for CUDA's two streams: what is queued on the second one happens as late as it may."""

    def __init__(self) -> None:
        self.is_on_second = False
        self.waits_for_first = False
        self.queue: list[Callable[[], None]] = []
        self.num_late = 0

    # The second stream.
    def wait_stream(self, other: Device) -> None:
        self.waits_for_first = True

    def record_event(self) -> int:
        self.waits_for_first = False  # what the first does from now on must be waited for again
        return len(self.queue)

    def __enter__(self) -> None:
        self.is_on_second = True

    def __exit__(self, *error: object) -> None:
        self.is_on_second = False

    # The first stream, which is the program itself.
    def wait_event(self, event: int) -> None:
        for i, action in enumerate(self.queue[:event]):
            action()
            self.queue[i] = lambda: None

    def move(self, *args: Any) -> None:
        if not self.is_on_second:
            MOVE(*args)
            return
        assert self.waits_for_first, "the pool may still be in use"
        self.num_late += 1
        self.queue.append(lambda: MOVE(*args))


MOVE = offload.copy_slabs


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(offload, "new_stream", lambda _: device)
    monkeypatch.setattr(offload, "copy_slabs", device.move)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    return device


@pytest.mark.parametrize("kind", ["codes", "exact"])
@pytest.mark.parametrize("scenario", ["greedy, padded", "beams, padded", "prompt lookup", "chunks", "rows moved"])
def test_late_transfers_are_waited_for(kind: str, scenario: str, device: Device) -> None:
    ours = Run(NAME, "sdpa", lambda starts: make(kind, offload=True))
    theirs = Run(NAME, "sdpa", lambda starts: make(kind))
    assert_same(SCENARIOS[scenario], ours, theirs, tolerance=0)
    assert device.num_late > 20


def test_a_transfer_that_is_not_waited_for_is_noticed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "wait_event", lambda event: None)
    ours = Run(NAME, "sdpa", lambda starts: make("codes", offload=True))
    theirs = Run(NAME, "sdpa", lambda starts: make("codes"))
    with pytest.raises(AssertionError):
        assert_same(SCENARIOS["greedy, padded"], ours, theirs, tolerance=0)


def test_pages_that_nobody_refers_to_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make("exact", offload=True)
    with torch.no_grad():
        build(NAME)(tokens(2, 200), **cache_kwargs(cache))
    store = cache.storage.layers.views[3].store
    assert len(store.kept) == 2 * 12
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(-100)
    with torch.no_grad():
        build(NAME)(tokens(1, 1), **cache_kwargs(cache))
    assert len(store.kept) == 6


def test_writing_out_of_turn_is_noticed() -> None:
    cache = make("exact", offload=True)
    with torch.no_grad():
        build(NAME)(tokens(1, 50), **cache_kwargs(cache))
    stores = [view.store for view in cache.storage.layers.views.values()]
    stores[0].prefetch()
    with pytest.raises(RuntimeError, match="while another layer's pages were on the device"):
        stores[4].write_back([0])


@KINDS
def test_sequences_and_copies(kind: str) -> None:
    def history(cache: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        cache.allocate_sequence("a")
        seen = []
        for i in range(12):
            name = "a" if i < 6 or i % 2 else "b"
            if i == 6:
                cache.fork_sequence("a", "b")
            for layer in range(LAYERS):
                count = 13 + (layer if i == 5 else 0)  # layers that are ahead of others when the sequence is forked
                k, v = torch.randn(2, 1, count, 16, generator=generator)
                cache.append_tokens(name, layer, k, v)
            if i == 9:
                cache.crop_sequence("b", 40)
            if i == 10:
                cache = copy.deepcopy(cache)
            seen += [x for layer in range(LAYERS) for x in cache.get_kv(name, layer)]
        return seen

    got, expected = history(make(kind, offload=True)), history(make(kind))
    assert all(map(torch.equal, got, expected))


def test_it_runs_eagerly_and_says_so() -> None:
    for options in ({"compile": True}, {"compile": None}, {}):
        cache = PagedPQCache(build(NAME).config, codebook_of(NAME), SMALL, offload=True, **options)
        assert not cache.is_compileable
        assert "offload=True" in cache.stats()["eager_because"]
    assert make("codes").stats()["eager_because"].startswith("compile=False")
    assert make("codes", compile=True).stats()["eager_because"] is None
    assert copy.deepcopy(make("exact", offload=True)).stats()["eager_because"].startswith("offload=True")


def test_what_runs_out_is_said_and_leaves_the_cache_usable() -> None:
    cache = make("exact", offload=True)
    with torch.no_grad():
        build(NAME)(tokens(1, 500), **cache_kwargs(cache))
        with pytest.raises(PagesExhaustedError, match="PQC001"):
            build(NAME)(tokens(1, 600), **cache_kwargs(cache))
        cache.crop(-100)
        build(NAME)(tokens(1, 90), **cache_kwargs(cache))
