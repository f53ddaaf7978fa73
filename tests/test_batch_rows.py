"""A continuous-batching step: what kernels are told of its rows, and that they serve any of them in any order."""

from __future__ import annotations

import random
import shutil
from typing import Any

import harness as h
import pytest
import torch
from batches import LAYER, NUM_LAYERS, Requests
from torch import Tensor

from hf_pqcache.backends import launch
from hf_pqcache.backends.batch_rows import BatchRows
from hf_pqcache.backends.cuda_backend import Place
from hf_pqcache.config import CodeShape
from hf_pqcache.pages.codec import ExactPages, max_page_id

MAIN = (128, (64, 8), (64, 8))
EXACT = (64, None, None)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is built with g++")
SINKS, RECENT, PAGE = 2, 5, 16
#: One more token makes the third page; no token is coded; some are; one page is, and none is left over.
LENGTHS = [SINKS + RECENT + 3 * PAGE - 1, 1, 40, SINKS + PAGE + RECENT]


def make(shape: Any, dtype: torch.dtype = torch.float16, **changes: Any) -> Requests:
    options = {"kv_heads": 2, "page_size": PAGE, "sink_tokens": SINKS, "recent": RECENT, "dtype": dtype}
    return Requests.make(shape, LENGTHS, max_batch=7, **(options | changes))


def random_rows(requests: Requests, num_rows: int, group: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """k, v (B, H, 1, d) and q (B, H * group, 1, d)."""
    g, dtype = requests.case.geometry, requests.case.windows[0].dtype
    k, v = (torch.randn(num_rows, g.kv_heads, 1, g.head_dim).to(dtype) for _ in h.SIDES)
    return k, v, torch.randn(num_rows, g.kv_heads * group, 1, g.head_dim).to(dtype)


# -- what kernels are told ---------------------------------------------------------------------------------------------
def test_a_step_says_of_each_row_what_the_block_table_does() -> None:
    rng = random.Random(0)
    rows = BatchRows(num_layers=5, max_batch=6, width=4, num_blocks=1000, trash_slot=9, device="cpu")
    addresses = set()
    for _ in range(30):
        batch = rng.randint(1, 6)
        table = torch.full((batch, 6), -1, dtype=torch.int32)
        lengths = torch.zeros(batch, dtype=torch.int32)
        wanted = []
        for row in range(batch):
            length, slot, blocks = rng.choice([0, 1, 300]), rng.choice([-1, 0, 8]), rng.sample(range(1000), rng.randint(0, 4))
            table[row, : 2 + len(blocks)] = torch.tensor([slot, 16 * len(blocks), *blocks])
            lengths[row] = length
            is_there = length > 0 and slot >= 0
            ids = [5 * block for block in blocks] if is_there else []
            wanted.append((slot, [length - 1, 16 * len(blocks)], ids) if is_there else (9, [0, 0], ids))
        rows.seq_lens.fill_(77), rows.page_table.fill_(77)  # as the step before left them
        step = rows.begin_step(table, lengths)
        for row, (slot, counts, ids) in enumerate(wanted):
            assert int(step.slots[row]) == slot
            assert step.seq_lens[:, row].tolist() == [counts] * 5
            assert step.page_table[row].tolist() == ids + [-1] * (4 - len(ids))
        assert not step.left_pad.any()
        assert all(t.is_contiguous() for t in (step.slots, step.page_table, *step.seq_lens))
        assert (rows.page_table[batch:] == 77).all()
        addresses.add(tuple(t.data_ptr() for t in step))
    assert len(addresses) == 1, "a captured graph knows them"


def test_a_step_reads_nothing_on_the_host() -> None:
    rows = BatchRows(2, 3, 4, 10, 3, device="meta")
    table, lengths = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((2, 6), (2,)))
    step = rows.begin_step(table, lengths)
    assert step.seq_lens.shape == (2, 2, 2)


def test_a_step_refuses_other_shapes() -> None:
    rows = BatchRows(2, 3, 4, 10, 3, device="cpu")
    for table, lengths in (((2, 5), (2,)), ((2, 6), (3,)), ((4, 6), (4,))):
        with pytest.raises(ValueError, match=r"expected a block table \(B, 6\) and lengths \(B\), B up to 3"):
            rows.begin_step(torch.zeros(table, dtype=torch.int32), torch.zeros(lengths, dtype=torch.int32))
    with pytest.raises(ValueError, match="expected int32"):
        rows.begin_step(torch.zeros(2, 6, dtype=torch.int32), torch.zeros(2, dtype=torch.int64))


def test_a_pool_of_more_pages_than_kernels_count_is_refused() -> None:
    most = max_page_id(ExactPages(8, 64, 128, torch.float16), 64)
    BatchRows(32, 1, 1, most // 32, 1, device="cpu", max_id=most)
    with pytest.raises(ValueError, match="fewer blocks"):
        BatchRows(32, 1, 1, most // 32 + 1, 1, device="cpu", max_id=most)


def test_slots_must_be_those_of_the_launch() -> None:
    requests = make(EXACT)
    case = requests.at(requests.rows.begin_step(*requests.tables(3)))
    case.place.check()
    assert case.slots is not None
    for slots in (case.slots[:2], case.slots.long()):
        with pytest.raises(ValueError, match=r"slots: expected contiguous int32 \(3,\)"):
            Place(*case.place[:-1], slots).check()


# -- what kernels do -------------------------------------------------------------------------------------------------
@needs_compiler
@pytest.mark.parametrize("shape", [MAIN, EXACT], ids=str)
def test_rows_in_another_order_are_computed_bit_for_bit_as_in_that_of_the_slots(shape: Any) -> None:
    """Rows that are not there change nothing, nor does it matter how many of the slots have one."""
    runs = []
    orders: list[list[int | None]] = [[2, None, 0, 3, None, None, 1], [3, 0], [1, None]]
    for order in (None, *orders):
        torch.manual_seed(0)
        requests = make(shape)
        k, v, q = random_rows(requests, len(LENGTHS))
        junk = random_rows(requests, 7)
        before = [requests.case.pool.clone(), *(window.clone() for window in requests.case.windows)]
        if order is None:  # as generate has them: a window for each row, no slots
            table, lengths = requests.tables(len(LENGTHS))
            requests.fill(range(len(LENGTHS)), table, lengths)
            case = requests.at(requests.rows.begin_step(table, lengths))
            case.slots = None
            k_now, v_now, q_now = k, v, q
        else:
            table, lengths = requests.tables(len(order))
            requests.fill(order, table, lengths)
            case = requests.at(requests.rows.begin_step(table, lengths))
            k_now, v_now, q_now = (
                torch.stack([other[row] if request is None else x[request] for row, request in enumerate(order)])
                for x, other in zip((k, v, q), junk, strict=True)
            )
        h.append_emulated(case, k_now, v_now, requests.flags)
        out, _ = h.attend_emulated(case, q_now, splits=2)
        assert out.isfinite().all()
        assert not requests.flags.any()
        assert not case.tickets.any()
        runs.append((case, out, before))
    plain, wanted, before = runs[0]
    for order, (case, out, _) in zip(orders, runs[1:], strict=True):
        stay = set(range(len(LENGTHS))) - set(order)
        for row, request in enumerate(order):
            if request is not None:
                assert torch.equal(out[row], wanted[request])
                assert torch.equal(case.counts[row], plain.counts[request])
        for window, as_plain, as_before in zip(case.windows, plain.windows, before[1:], strict=True):
            for request in range(len(LENGTHS)):
                same = as_before if request in stay else as_plain
                assert torch.equal(window[request].nan_to_num(9), same[request].nan_to_num(9))
        assert torch.equal(case.pool, before[0] if 0 in stay else plain.pool), "a page leaves the window of request 0 only"


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [MAIN, EXACT], ids=str)
@pytest.mark.parametrize(("recent", "shared"), [(RECENT, [0] * 4), (24, [1, 0, 2, 0])], ids=["alone", "shared"])
def test_steps_of_changing_rows_match_float64(shape: Any, dtype: torch.dtype, recent: int, shared: list[int]) -> None:
    """Of requests also that began with pages of others, which leave fewer tokens in the window."""
    torch.manual_seed(0)
    rng = random.Random(0)
    requests = make(shape, dtype, recent=recent, shared=shared)
    for batch in (4, 7, 2):
        order: list[int | None] = [*rng.sample(range(4), min(batch, 3)), *[None] * batch][:batch]
        rng.shuffle(order)
        table, lengths = requests.tables(batch)
        requests.fill(order, table, lengths)
        step = requests.rows.begin_step(table, lengths)
        k, v, q = random_rows(requests, batch)
        h.append_emulated(requests.at(step), k, v, requests.flags)
        out, _ = h.attend_emulated(requests.at(step), q, splits=rng.randint(1, 3))
        requests.check(order, step, k, v, q, out, h.TOLERANCE[dtype])


@needs_compiler
@pytest.mark.parametrize("shape", [MAIN, EXACT], ids=str)
@pytest.mark.parametrize("sinks", [0, SINKS])
def test_rows_that_are_not_there_touch_the_trash_slot_only(shape: Any, sinks: int) -> None:
    """All of them at once, whatever their stale block tables say; more of them than there are windows."""
    options = {"kv_heads": 2, "page_size": PAGE, "sink_tokens": sinks, "recent": 1}
    requests = Requests.make(shape, LENGTHS, max_batch=9, **options)
    case = requests.case
    table, lengths = requests.tables(9)
    requests.fill([0, 1, 2, 3, *[None] * 5], table, lengths)
    lengths.zero_()
    before = [x.clone() for x in (case.pool, *case.windows)]
    step = requests.rows.begin_step(table, lengths)
    k, v, q = random_rows(requests, 9)
    h.append_emulated(requests.at(step), k, v, requests.flags)
    out, _ = h.attend_emulated(requests.at(step), q, splits=2)
    assert torch.equal(step.seq_lens[LAYER], torch.tensor([[1, 0]] * 9, dtype=torch.int32))
    assert not step.seq_lens[[n for n in range(NUM_LAYERS) if n != LAYER]].any()
    assert not requests.flags.any()
    assert not case.tickets.any()
    assert torch.equal(case.pool, before[0])
    for window, x, old in zip(case.windows, (k, v), before[1:], strict=True):
        assert torch.equal(window[:-1].nan_to_num(9), old[:-1].nan_to_num(9))
        trash = window[requests.rows.trash_slot]
        assert any(torch.equal(trash[:, 0], row[:, 0]) for row in x), "one of the rows' tokens"
        assert trash[:, 1:].isnan().all()
    value = case.windows[1][requests.rows.trash_slot, :, 0].repeat_interleave(3, dim=0)
    assert torch.allclose(out[:, 0], value.expand(9, -1, -1), rtol=2e-3, atol=2e-3)


def test_a_launch_of_fewer_rows_has_a_geometry_of_its_own() -> None:
    geometry = make(MAIN).case.geometry
    assert geometry.keys == CodeShape(64, 8)
    assert geometry.of_batch(3).batch == 3
    assert geometry.of_batch(3) is geometry.of_batch(3)
    assert geometry.of_batch(geometry.batch) == geometry


@needs_compiler
@pytest.mark.parametrize("most_blocks", [1, 1 << 20])
@pytest.mark.parametrize("shape", [(64, (32, 8), (32, 5)), (64, None, None)], ids=str)
def test_append_of_many_rows_whose_pages_leave_at_once(shape: Any, most_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of more rows than a block has threads, and of more pages than blocks."""
    monkeypatch.setattr(launch, "_MOST_APPEND_BLOCKS", most_blocks)
    page_size, sinks, recent, rows = 48, 2, 5, 260 if most_blocks == 1 else 7
    full = sinks + recent + 2 * page_size - 1  # one more token makes the second page
    lengths = [full if row % (rows // 7) == 0 or row == rows - 1 else full - 20 for row in range(rows)]
    case = h.make_case(*shape, lengths, page_size=page_size, sink_tokens=sinks, recent=recent)
    case.page_table[:, 1] = case.page_table[:, 0]  # nobody attends to the first one again
    case.page_table[rows - 1, 1] = -1
    before = {which: [h.exact(case, row, which) for row in range(rows)] for which in h.SIDES}
    k, v = (torch.randn(rows, 1, 1, shape[0]).half() for _ in range(2))
    flags = torch.zeros(4, dtype=torch.int32)
    h.append_emulated(case, k, v, flags)
    assert flags.tolist() == [1, 0, 0, 0], "the last row had no page"
    assert not case.tickets.any()
    for row, length in enumerate(lengths[:-1]):
        coded = page_size * (1 + (length == full))
        assert case.counts[row].tolist() == [length + 1, coded]
        for which, new in zip(h.SIDES, (k, v), strict=True):
            if length == full:
                page, left = int(case.page_table[row, 1]), before[which][row][:, sinks + page_size : sinks + coded]
                if shape[1] is None:
                    assert torch.equal(h.decode_page(case, which, page), left)
                else:
                    h.check_page(case, which, page, left)
            assert torch.equal(h.exact(case, row, which)[:, -1], new[row, :, 0].double())
    assert case.counts[-1].tolist() == [full, page_size]
