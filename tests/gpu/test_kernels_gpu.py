"""Every kernel on a GPU against float64: random lengths, pages, groups, masks; poisoned outputs and scratch."""

from __future__ import annotations

import random

import harness as h
import pytest
import torch

from hf_pqcache.backends import cuda_backend, jit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or jit.why_unavailable() is not None, reason="needs a GPU and CuPy"),
]


TUNED = sorted(jit.tuned_shapes())
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3}


def poison() -> None:
    """Leave NaN in torch's cached blocks, so that unwritten outputs and unset scratch show."""
    blocks = [torch.full((n,), float("nan"), device="cuda") for n in (256, 4096, 1 << 16, 1 << 20, 1 << 22)]
    del blocks


def attend(case, q, name, mask=None, sinks=None, scale=0.1, softcap=0.0, max_tokens=4096):  # type: ignore[no-untyped-def]
    poison()
    view = case.view
    return cuda_backend.attend(
        q,
        case.desc,
        1,
        view.seq_lens,
        view.left_pad,
        view.page_table,
        mask,
        sinks,
        case.geometry,
        scale,
        softcap,
        max_tokens,
        name,
    )


def check(case, q, name, *args, **kwargs):  # type: ignore[no-untyped-def]
    out = attend(case, q, name, *args, **kwargs)
    mask, sinks, scale, softcap = (list(args) + [None, None, 0.1, 0.0][len(args) :])[:4]
    error = h.relative_error(out, h.reference(case, q, mask, sinks, scale, softcap))
    assert error < TOLERANCE[q.dtype], (name, case.geometry, error)
    assert not case.tickets.any()


@pytest.mark.parametrize("name", ["tuned", "generic"])
@pytest.mark.parametrize("shape", TUNED, ids=str)
def test_attention(shape: tuple[int, int, int], name: str) -> None:
    rng = random.Random(0)
    for group in (1, 2, 3, 4, 5, 7, 8, 12, 16):
        page_size = rng.choice([16, 32, 48, 64, 128, 256, 512])
        dtype = rng.choice([torch.float16, torch.bfloat16])
        lengths = [rng.choice([0, 1, 3, 40, 200]), rng.randint(1, 3000), rng.randint(1, 6000)]
        case = h.make_case(
            *shape,
            lengths,
            kv_heads=2,
            page_size=page_size,
            recent=rng.choice([1, 24, 128]),
            dtype=dtype,
            device="cuda",
        )
        q = (torch.randn(3, 2 * group, 1, shape[0]) * rng.choice([0.5, 1.0, 3.0])).to(dtype).cuda()
        for max_tokens in (64, 8192, 1 << 20):  # the last: as blocks of long sequences are planned
            check(case, q, name, max_tokens=max_tokens)


@pytest.mark.parametrize("name", ["tuned", "generic"])
@pytest.mark.parametrize("shape", TUNED, ids=str)
def test_a_layer_that_has_yet_to_learn(shape: tuple[int, int, int], name: str) -> None:
    case = h.make_case(*shape, [90, 0, 17], kv_heads=2, recent=100, device="cuda", is_coded=False)
    check(case, torch.randn(3, 8, 1, shape[0]).half().cuda(), name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_attention_over_exact_pages(head_dim: int, dtype: torch.dtype) -> None:
    rng = random.Random(head_dim)
    for group in (1, 3, 4, 8, 11, 16):
        case = h.make_case(
            head_dim,
            0,
            0,
            [rng.choice([0, 1, 3, 40]), rng.randint(1, 3000), rng.randint(1, 6000)],
            kv_heads=2,
            page_size=rng.choice([16, 48, 64, 512]),
            sink_tokens=rng.choice([0, 4]),
            recent=rng.choice([1, 24, 128]),
            dtype=dtype,
            device="cuda",
        )
        q = (torch.randn(3, 2 * group, 1, head_dim) * rng.choice([0.5, 1.0, 3.0])).to(dtype).cuda()
        for max_tokens in (64, 8192):
            check(case, q, "paged", None, None, head_dim**-0.5, 0.0, max_tokens=max_tokens)


def test_append_to_exact_pages_step_by_step() -> None:
    sinks, page = 2, 16
    case = h.make_case(80, 0, 0, [100, 0, 70], page_size=page, kv_heads=2, sink_tokens=sinks, recent=1, device="cuda")
    view = case.view
    table, pool = view.page_table.cpu(), case.key_pages.shape[0]
    free = sorted(set(range(pool)) - set(table.flatten().tolist()))
    table[0, (table[0] >= 0).sum()] = free.pop()
    view.page_table.copy_(table)
    flags = torch.zeros(4, dtype=torch.int32, device="cuda")
    history = {which: [h.exact(case, row, which) for row in range(3)] for which in ("key", "value")}
    for _ in range(20):
        before = view.lengths.tolist()
        k, v = (torch.randn(3, 2, 1, 80).half().cuda() for _ in range(2))
        cuda_backend.append(k, v, case.desc, 1, view.seq_lens, view.page_table, flags, case.geometry)
        for row, length in enumerate(view.lengths.tolist()):
            for which, new in (("key", k), ("value", v)):
                if length > before[row]:
                    history[which][row] = torch.cat([history[which][row], new[row].double().cpu()], dim=1)
                assert torch.equal(h.exact(case, row, which), history[which][row])
    assert view.lengths.tolist()[0] == 120
    assert flags[0].item() == 1, "some row ran out of pages"
    check(case, torch.randn(3, 4, 1, 80).half().cuda(), "paged")


@pytest.mark.parametrize("shape", [(80, 40, 5), (96, 24, 7), (256, 128, 4), (40, 40, 8), (128, 8, 8)], ids=str)
def test_generic_attention_of_other_shapes(shape: tuple[int, int, int]) -> None:
    case = h.make_case(*shape, [1000, 37, 2500], page_size=32, kv_heads=2, device="cuda")
    check(case, torch.randn(3, 6, 1, shape[0]).half().cuda(), "generic")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tuned", "generic", "paged"])
def test_masks_sinks_and_softcap(name: str, dtype: torch.dtype) -> None:
    case = h.make_case(
        128,
        *((0, 0) if name == "paged" else (64, 8)),
        [1500, 0, 900],
        kv_heads=2,
        page_size=16,
        dtype=dtype,
        starts=[0, 7, 600],
        extra_slots=9,
        device="cuda",
    )
    q = torch.randn(3, 8, 1, 128).to(dtype).cuda()
    boolean = torch.rand(3, 1, 1, 1400) > 0.3
    boolean[2] = False
    padding = torch.ones(3, 1, 1, 1600, dtype=torch.bool)
    padding[2, ..., :600] = False
    no = torch.tensor(torch.finfo(dtype).min)
    additive = torch.where(torch.rand(1, 1, 1, 4000) > 0.3, torch.randn(1, 1, 1, 4000), no).to(dtype).cuda()[..., ::2]
    sinks = torch.randn(8).to(dtype).cuda()
    for mask in (None, boolean.cuda(), padding.cuda(), additive):
        for extra, softcap in ((None, 0.0), (sinks, 0.0), (sinks, 5.0)):
            for max_tokens in (4096, 1 << 20):
                check(case, q, name, mask, extra, 0.1, softcap, max_tokens=max_tokens)


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("shape", [(128, 64, 8), (128, 32, 8), (64, 64, 8), (128, 0, 0), (256, 0, 0)], ids=str)
def test_a_mask_is_asked_once_for_a_block_and_never_missed(shape: tuple[int, int, int], is_long: bool) -> None:
    """Masks that hide nothing change nothing; one hidden token anywhere in a block's share is seen."""
    rng = random.Random(1)
    lengths, starts, kv_heads, max_tokens = (
        ([30000, 9000], [0, 21000], 4, 1 << 20) if is_long else ([6000, 2000], [0, 4000], 1, 7000)
    )
    case = h.make_case(*shape, lengths, kv_heads=kv_heads, page_size=64, starts=starts, device="cuda")
    name = "tuned" if shape[1] else "paged"
    q = torch.randn(2, 4 * kv_heads, 1, shape[0]).half().cuda()
    first, end = starts[1], starts[1] + lengths[1]
    silent = torch.zeros(2, 1, 1, lengths[0] + 1000, dtype=torch.bool)  # as generate makes them: False before and after a row
    silent[0, ..., : lengths[0]] = True
    silent[1, ..., first:end] = True
    plain = attend(case, q, name, max_tokens=max_tokens)
    masked = attend(case, q, name, silent.cuda(), max_tokens=max_tokens)
    assert h.relative_error(masked, plain.double().cpu()) < TOLERANCE[q.dtype]
    anywhere = [rng.randint(first + 4, end - 100) for _ in range(2 if is_long else 5)]
    for column in (first, first + 3, first + 4, end - 1, *anywhere):
        mask = silent.clone()
        mask[1, ..., column] = False
        check(case, q, name, mask.cuda(), max_tokens=max_tokens)


def test_consecutive_launches_and_graph_capture() -> None:
    case = h.make_case(128, 64, 8, [5000], kv_heads=4, device="cuda")
    q = torch.randn(1, 16, 1, 128).half().cuda()
    want = h.reference(case, q, None, None, 0.1, 0.0)
    for _ in range(50):
        out = attend(case, q, "tuned", max_tokens=8192)
    assert h.relative_error(out, want) < 1e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [
            cuda_backend.attend(
                q,
                case.desc,
                1,
                case.view.seq_lens,
                case.view.left_pad,
                case.view.page_table,
                None,
                None,
                case.geometry,
                0.1,
                0.0,
                8192,
            )
            for _ in range(3)
        ]
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    assert all(h.relative_error(out, want) < 1e-3 for out in outs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*TUNED, (80, 40, 5), (128, 8, 8)], ids=str)
def test_encode(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for page_size in (16, 48, 512):
        case = h.make_case(*shape, [3000], page_size=page_size, kv_heads=2, recent=1, device="cuda")
        x = torch.randn(2, 1200, 2, shape[0]).to(dtype).cuda().transpose(1, 2)
        ids = torch.tensor([[1, -1], [0, 2]], dtype=torch.int32, device="cuda")
        first = torch.tensor([3, 100], dtype=torch.int32, device="cuda")
        for which, pages, book in (
            ("key", case.key_pages, case.kept[0]),
            ("value", case.value_pages, case.kept[1]),
        ):
            cuda_backend.encode(x, pages.data_ptr(), book, ids, first, which, case.geometry)
            for row, j in ((0, 0), (1, 0), (1, 1)):
                start = int(first[row]) + page_size * j
                excess = h.excess_distance(case, which, int(ids[row, j]), x[row, :, start : start + page_size])
                assert excess < 1e-6


@pytest.mark.parametrize("shape", [(128, 64, 8), (128, 32, 8), (128, 128, 4), (64, 32, 6), (80, 40, 5)], ids=str)
def test_append_step_by_step(shape: tuple[int, int, int]) -> None:
    sinks, page = 4, 48
    case = h.make_case(*shape, [100, 0, 170], page_size=page, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    view = case.view
    pool = case.key_pages.shape[0]
    needed = [case.view.config.coded_tokens(n + 60) // page for n in (100, 0, 170)]
    free = [p for p in range(pool) if p not in set(view.page_table.flatten().tolist())]
    table = view.page_table.cpu()
    for row, n in enumerate(needed):
        for j in range(n):
            if table[row, j] < 0 and free:
                table[row, j] = free.pop()
    view.page_table.copy_(table)
    flags = torch.zeros(4, dtype=torch.int32, device="cuda")
    history = [[h.exact(case, row, which) for row in range(3)] for which in ("key", "value")]
    q = torch.randn(3, 4, 1, shape[0]).bfloat16().cuda()
    name = "tuned" if shape in jit.tuned_shapes() else "generic"
    for _ in range(60):
        k, v = (torch.randn(3, 2, 1, shape[0]).bfloat16().cuda() for _ in range(2))
        before = view.lengths.tolist()
        cuda_backend.append(k, v, case.desc, 1, view.seq_lens, view.page_table, flags, case.geometry)
        stuck = flags[0].item()
        for row, length in enumerate(view.lengths.tolist()):
            coded_before, coded = (view.config.coded_tokens(n) for n in (before[row], before[row] + 1))
            has_page = coded == coded_before or table[row, coded_before // page] >= 0
            assert length == before[row] + has_page
            assert has_page or stuck
            if not has_page:
                continue
            for side, (which, x) in enumerate((("key", k), ("value", v))):
                history[side][row] = torch.cat([history[side][row], x[row].double().cpu()], dim=1)
                now = h.exact(case, row, which)
                recent_part = now[:, sinks + coded :]
                assert torch.equal(recent_part, history[side][row][:, sinks + coded : length])
                if coded > coded_before:
                    left = history[side][row][:, sinks + coded_before : sinks + coded]
                    page_id = int(table[row, coded_before // page])
                    assert h.excess_distance(case, which, page_id, left) < 1e-6
                    history[side][row] = now
    check(case, q, name)
