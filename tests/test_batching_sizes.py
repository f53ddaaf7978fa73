"""How an engine's memory is divided."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_pqcache import PQConfig
from hf_pqcache.batching.sizes import Wishes, longest, plan

CONFIG = PQConfig()
GIB = 1 << 30
#: An 8B model: 2.2 MiB a block, 25 MiB a window, 128 KiB a token.
COSTS: dict[str, Any] = {"block_bytes": 2_250_000, "slot_bytes": 25_700_000, "token_bytes": 131_072, "max_batch_tokens": 8192}


def memory_of(sizes: Any) -> int:
    bytes_: int = sizes.num_blocks * COSTS["block_bytes"] + (sizes.num_slots + 1) * COSTS["slot_bytes"]
    return bytes_ + sizes.staging_tokens * COSTS["token_bytes"]


@given(
    st.integers(GIB, 200 * GIB),
    st.builds(
        Wishes,
        num_slots=st.none() | st.integers(1, 2000),
        max_length=st.integers(1, 1 << 20),
        is_usual=st.booleans(),
        max_prompt=st.none() | st.integers(1, 1 << 18),
    ),
    st.booleans(),
)
def test_what_is_planned_fits(memory: int, wishes: Wishes, is_beside: bool) -> None:
    try:
        sizes = plan(CONFIG, wishes, memory=memory, is_beside=is_beside, **COSTS)
    except MemoryError as error:
        assert "PQC004" in str(error)  # noqa: PT017
        assert memory < 3 * GIB
        return
    assert memory_of(sizes) <= memory
    assert 1 <= sizes.num_slots <= (wishes.num_slots or 1024)
    assert 1 <= sizes.table_width <= sizes.num_blocks


def test_a_known_workload_fills_the_memory() -> None:
    sizes = plan(CONFIG, Wishes(max_length=4608, is_usual=True, max_prompt=4096), memory=57 * GIB, **COSTS)
    assert sizes.staging_tokens == 2 * 4096, "one prompt ends in a step, and what is left of the step begins another one"
    assert sizes.num_slots > 330
    assert memory_of(sizes) > 56 * GIB
    assert sizes.num_blocks >= sizes.num_slots * CONFIG.pages_of(4608)


def test_the_longest_that_a_model_could_take_keeps_no_other_request_out() -> None:
    sizes = plan(CONFIG, Wishes(num_slots=64, max_length=1 << 17), memory=57 * GIB, **COSTS)
    assert sizes.num_slots == 64


@given(st.integers(1, 300))
def test_longest_is_the_longest(pages: int) -> None:
    most = longest(CONFIG, pages)
    assert CONFIG.pages_of(most) == pages
    assert CONFIG.pages_of(most + 1) == pages + 1


def test_more_than_there_is_says_what_to_lower() -> None:
    with pytest.raises(MemoryError, match=r"PQC004.*num_blocks"):
        plan(CONFIG, Wishes(num_blocks=10**6), memory=GIB, **COSTS)


def test_prompts_that_are_stored_beside_later_steps_wait_for_two_steps() -> None:
    memory = 57 * GIB
    plain = plan(CONFIG, Wishes(max_length=4608, max_prompt=4096), memory=memory, **COSTS)
    beside = plan(CONFIG, Wishes(max_length=4608, max_prompt=4096), memory=memory, is_beside=True, **COSTS)
    assert beside.staging_tokens == plain.staging_tokens + 2 * COSTS["max_batch_tokens"]
    poor = plan(CONFIG, Wishes(max_length=64, max_prompt=8), memory=3 * GIB, is_beside=True, **COSTS)
    assert poor.staging_tokens == COSTS["max_batch_tokens"], "no less than a step, or none would ever be stored beside"
