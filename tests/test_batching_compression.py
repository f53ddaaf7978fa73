"""Prompts stored beside later steps: whatever becomes of jobs, requests say what `generate` says, and nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
from engine_runs import CODED, EXACT, NEW, alone, ask_alone, check_that_nothing_is_lost, engine, greedy, model, prompts, results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from late_lane import Late
from transformers import __version__ as transformers_version

pytestmark = [pytest.mark.cache]
if tuple(map(int, transformers_version.split(".")[:2])) < (5, 20):
    pytest.skip("continuous batching needs transformers 5.20", allow_module_level=True)

from hf_pqcache.batching import disable_batching, enable_batching  # noqa: E402
from hf_pqcache.batching.lanes import Inline  # noqa: E402
from hf_pqcache.batching.slots import SlotLayers  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _references() -> None:
    ask_alone()


@pytest.fixture(autouse=True)
def _own_blocks_after() -> Iterator[None]:
    yield
    disable_batching(model())


def run(
    lane: Any, arrivals: list[tuple[int, int, float | None]], exact: bool = False, sequences: int = 1, **config: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Serve prompts by number, new tokens and seconds until each is cancelled -> outputs that are not as alone, statistics."""
    enable_batching(model(), exact=exact, compress=lane, **(EXACT if exact else CODED))
    with model().continuous_batching_context_manager(greedy(sequences), continuous_batching_config=engine(**config)) as manager:
        wanted: dict[str, list[int]] = {}
        for number, new, cancelled in arrivals:
            name = manager.add_request(list(prompts()[number]), max_new_tokens=new)
            if cancelled is not None:
                time.sleep(cancelled)
                manager.cancel_request(name)
                continue
            for family in [name, *(f"{name}__child#{i}" for i in range(sequences - 1))]:
                wanted[family] = alone(prompts()[number], exact)[:new]
        found = results(manager, set(wanted))
        assert set(found) >= set(wanted)
        assert manager.background_thread_status.fatal_error is None
        odd = {name: found[name] for name, tokens in wanted.items() if found[name].generated_tokens != tokens}
        check_that_nothing_is_lost(manager)
        return odd, manager.stats()["compression"]


LAYERS = tiny_models.build("llama").config.num_hidden_layers
#: The first prompt makes the equaliser; the others are long enough for pages.
LONG = [(11, NEW, None), (8, NEW, None), (10, NEW, None), (12, NEW, None), (9, NEW, None)]


@pytest.mark.parametrize("exact", [False, True])
def test_jobs_that_end_while_others_decode(exact: bool) -> None:
    lane = Late([4])
    odd, stats = run(lane, LONG, exact)
    assert not odd
    assert stats["jobs"] == len(LONG) - (not exact)
    assert LAYERS <= len(lane.tickets) <= LAYERS * stats["jobs"]
    assert stats["beside"] >= 2
    assert stats["within"] == (not exact)


def test_nothing_else_to_do_waits_for_the_oldest_job() -> None:
    odd, stats = run(Late([10**9]), LONG, max_requests_per_batch=1)
    assert not odd
    assert stats["waits"] >= stats["jobs"] > 0


def test_a_lane_that_says_done_too_early_is_caught() -> None:
    """The planted race: requests read blocks that nobody has written, and say something else."""
    odd, _ = run(Late(is_lying=True), LONG)
    assert odd


def test_a_request_that_ends_with_its_prompt_gives_back_blocks_only_when_they_are_written() -> None:
    """One token each: all end while their jobs are under way. Their blocks come to others, who say what they would alone."""
    forced = [(11, NEW, None)] + [(number, 1 if i % 2 else NEW, None) for i, number in enumerate((10, 11, 12, 9, 10, 12, 8))]
    odd, stats = run(Late([10**9]), forced, num_blocks=16, max_requests_per_batch=3)
    assert not odd
    assert stats["jobs"] >= 4


def test_room_for_prompts_that_wait_is_never_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[int] = []
    enable_batching(model(), compress=Late([6]), **CODED)
    config = engine(max_batch_tokens=32)
    monkeypatch.setattr("hf_pqcache.batching.sizes.STAGING_SHARE", 0.0)  # as little as there must be: a step's tokens
    with model().continuous_batching_context_manager(greedy(), continuous_batching_config=config) as manager:
        names = {manager.add_request(list(prompts()[i]), max_new_tokens=NEW): i for i in (5, 4, 3, 5, 4, 3, 2)}
        found: dict[str, Any] = {}
        while len(found) < len(names) and manager.is_running():
            if (result := manager.get_result(timeout=0.002)) is not None:
                found[result.request_id] = result
            most.append(manager.stats()["compression"]["waiting_tokens"] if manager.stats() else 0)
        assert manager.stats()["compression"]["room_tokens"] == 32
        assert {name: r.generated_tokens for name, r in found.items()} == {
            n: alone(prompts()[i], False) for n, i in names.items()
        }
        check_that_nothing_is_lost(manager)
    assert 0 < max(most) <= 32


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_job_that_fails_is_done_within(after: int) -> None:
    odd, stats = run(Late([after], fails=range(LAYERS - 1, 1000, LAYERS)), LONG)
    assert not odd
    assert stats["failed_jobs"] == stats["jobs"]


@pytest.mark.parametrize("layer", range(2))
def test_a_lane_that_takes_nothing_leaves_prompts_to_steps(layer: int) -> None:
    odd, stats = run(Late([2], raises=range(layer, 1000, LAYERS)), LONG)
    assert not odd
    assert stats["failed_jobs"] == stats["jobs"]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_prompt_that_cannot_be_stored_fails_alone(layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`store` fails for one request for good, in its first layer or half-way; the others go on."""
    enable_batching(model(), compress=Late([2]), **CODED)
    with model().continuous_batching_context_manager(greedy(), continuous_batching_config=engine()) as manager:
        first = manager.add_request(list(prompts()[11]), max_new_tokens=NEW)
        assert results(manager, {first})[first].error is None
        stored = SlotLayers.store

        def store(self: Any, number: int, slot: int, keys: Any, *rest: Any) -> None:
            if keys.shape[1] == len(prompts()[10]) and number == layer:
                raise MemoryError("there is no room for it")
            stored(self, number, slot, keys, *rest)

        monkeypatch.setattr(SlotLayers, "store", store)
        names = {number: manager.add_request(list(prompts()[number]), max_new_tokens=NEW) for number in (8, 10, 9, 11)}
        found = results(manager, set(names.values()))
        assert "no room for it" in found[names[10]].error
        for number in (8, 9, 11):
            assert found[names[number]].generated_tokens == alone(prompts()[number], False)
        check_that_nothing_is_lost(manager)


def test_a_prefix_is_shared_only_once_it_is_stored() -> None:
    lane = Late([10**9])
    enable_batching(model(), compress=lane, **CODED)
    config = engine(allow_block_sharing=True, max_requests_per_batch=4)
    with model().continuous_batching_context_manager(greedy(), continuous_batching_config=config) as manager:
        names = [manager.add_request(list(prompts()[number]), max_new_tokens=NEW) for number in (10, 11, 11, 13, 12)]
        found = results(manager, set(names))
        for number, name in zip((10, 11, 11, 13), names, strict=False):
            assert found[name].generated_tokens == alone(prompts()[number], False)
        again = manager.add_request([*prompts()[11], 7, 8, 9], max_new_tokens=NEW)
        assert results(manager, {again})[again].error is None
        assert manager.stats()["prefix_tokens"] > 50
        check_that_nothing_is_lost(manager)


MIX = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([16, 30, 200]),
        "max_batch_tokens": st.sampled_from([40, 64, 256]),
        "max_requests_per_batch": st.sampled_from([1, 2, 4, 8]),
        "scheduler_type": st.sampled_from(["fifo", "prefill_first"]),
        "exact": st.booleans(),
        "sequences": st.sampled_from([1, 1, 2]),
    }
)
ARRIVALS = st.lists(
    st.tuples(
        st.sampled_from([3, 7, 8, 9, 10, 11, 12, 13]), st.integers(1, NEW), st.sampled_from([None, None, None, 0.0, 0.02])
    ),
    min_size=1,
    max_size=6,
)
NUMBERS = st.sets(st.integers(0, 12), max_size=4)
LANE = st.builds(Late, st.lists(st.integers(0, 8), min_size=1, max_size=4), NUMBERS, NUMBERS)
LAZY = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}


@settings(max_examples=8, **LAZY)
@given(MIX, ARRIVALS, LANE)
def test_any_jobs(mix: dict[str, Any], arrivals: Any, lane: Late) -> None:
    odd, _ = run(lane, arrivals, **mix)
    assert not odd


@pytest.mark.slow
@settings(max_examples=150, **LAZY)
@given(MIX, ARRIVALS, LANE)
def test_a_hundred_and_fifty_runs_of_jobs(mix: dict[str, Any], arrivals: Any, lane: Late) -> None:
    odd, _ = run(lane, arrivals, **mix)
    assert not odd


def test_what_cannot_be_had_is_told() -> None:
    enable_batching(model(), compress="partition", **CODED)
    with model().continuous_batching_context_manager(greedy(), continuous_batching_config=engine()) as manager:
        name = manager.add_request(list(prompts()[8]), max_new_tokens=4)
        assert results(manager, {name})[name].generated_tokens == alone(prompts()[8], False)[:4]
        stats = manager.stats()["compression"]
    assert stats["lane"] == Inline.name
    assert stats["greenctx_available"] is False
    assert "no streams" in stats["greenctx_reason"]


@pytest.mark.parametrize(
    ("asked", "why"), [({"compress": "cuda"}, "inline"), ({"partition": object()}, "compress='partition'")]
)
def test_wrong_wishes_are_refused(asked: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        enable_batching(model(), **asked)
