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


#: (head_dim, keys, values): codes that kernels deal to lanes, of either side.
DEALT = [
    (128, (64, 8), (64, 8)), (128, (64, 8), (32, 8)), (128, (32, 8), (32, 8)), (128, (64, 6), (64, 6)), (128, (32, 6), (64, 4)),
    (128, (64, 5), (128, 4)), (128, (16, 8), (32, 4)), (128, (64, 7), (128, 8)), (64, (32, 8), (32, 8)), (64, (64, 8), (64, 6)),
    (64, (32, 6), (64, 4)), (64, (32, 7), (32, 5)), (64, (32, 5), (16, 6)), (96, (48, 8), (24, 8)), (256, (128, 8), (64, 8)),
]  # fmt: skip


def poison() -> None:
    """Leave NaN in torch's cached blocks, so that unwritten outputs and unset scratch show."""
    blocks = [torch.full((n,), float("nan"), device="cuda") for n in (256, 4096, 1 << 16, 1 << 20, 1 << 22)]
    del blocks


def attend(case, q, mask=None, sinks=None, scale=0.1, softcap=0.0, max_tokens=4096):  # type: ignore[no-untyped-def]
    poison()
    return cuda_backend.attend(q, case.place, mask, sinks, scale, softcap, max_tokens)


def check(case, q, *args, **kwargs):  # type: ignore[no-untyped-def]
    out = attend(case, q, *args, **kwargs)
    mask, sinks, scale, softcap = (list(args) + [None, None, 0.1, 0.0][len(args) :])[:4]
    error = h.relative_error(out, h.reference(case, q, mask, sinks, scale, softcap))
    assert error < h.TOLERANCE[q.dtype], (case.geometry, error)
    assert not case.tickets.any()


@pytest.mark.parametrize("shape", [*DEALT, *h.NATURAL], ids=str)
def test_attention(shape) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(0)
    for group in (1, 2, 4, 7, 8, 12, 16):
        page_size = rng.choice([16, 32, 48, 64, 128, 256, 512])
        dtype = rng.choice([torch.float16, torch.bfloat16])
        lengths = [rng.choice([0, 1, 3, 40, 200]), rng.randint(1, 3000), rng.randint(1, 6000)]
        recent = rng.choice([1, 24, 128])
        case = h.make_case(*shape, lengths, kv_heads=2, page_size=page_size, recent=recent, dtype=dtype, device="cuda")
        q = (torch.randn(3, 2 * group, 1, shape[0]) * rng.choice([0.5, 1.0, 3.0])).to(dtype).cuda()
        for max_tokens in (64, 8192, 1 << 20):  # the last: as blocks of long sequences are planned
            check(case, q, max_tokens=max_tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_attention_over_exact_pages(head_dim: int, dtype: torch.dtype) -> None:
    rng = random.Random(head_dim)
    for group in (1, 3, 4, 8, 11, 16):
        lengths = [rng.choice([0, 1, 3, 40]), rng.randint(1, 3000), rng.randint(1, 6000)]
        case = h.make_case(
            head_dim, None, None, lengths, kv_heads=2, page_size=rng.choice([16, 48, 64, 512]),
            sink_tokens=rng.choice([0, 4]), recent=rng.choice([1, 24, 128]), dtype=dtype, device="cuda",
        )  # fmt: skip
        q = (torch.randn(3, 2 * group, 1, head_dim) * rng.choice([0.5, 1.0, 3.0])).to(dtype).cuda()
        for max_tokens in (64, 8192):
            check(case, q, None, None, head_dim**-0.5, 0.0, max_tokens=max_tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codes", [(64, 8), (32, 6), None], ids=str)
def test_masks_sinks_and_softcap(codes: tuple[int, int] | None, dtype: torch.dtype) -> None:
    case = h.make_case(
        128, codes, codes, [1500, 0, 900], kv_heads=2, page_size=16, dtype=dtype, starts=[0, 7, 600], extra_slots=9,
        device="cuda",
    )  # fmt: skip
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
                check(case, q, mask, extra, 0.1, softcap, max_tokens=max_tokens)


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize(
    "shape", [(128, (64, 8), (64, 8)), (128, (64, 8), (32, 8)), (128, None, None), (256, None, None)], ids=str
)
def test_a_mask_is_asked_once_for_a_block_and_never_missed(shape, is_long: bool) -> None:  # type: ignore[no-untyped-def]
    """Masks that hide nothing change nothing; one hidden token anywhere in a block's share is seen."""
    rng = random.Random(1)
    lengths, starts, kv_heads, max_tokens = (
        ([30000, 9000], [0, 21000], 4, 1 << 20) if is_long else ([6000, 2000], [0, 4000], 1, 7000)
    )
    case = h.make_case(*shape, lengths, kv_heads=kv_heads, page_size=64, starts=starts, device="cuda")
    q = torch.randn(2, 4 * kv_heads, 1, shape[0]).half().cuda()
    first, end = starts[1], starts[1] + lengths[1]
    silent = torch.zeros(2, 1, 1, lengths[0] + 1000, dtype=torch.bool)  # as generate makes them: False before and after a row
    silent[0, ..., : lengths[0]] = True
    silent[1, ..., first:end] = True
    plain = attend(case, q, max_tokens=max_tokens)
    masked = attend(case, q, silent.cuda(), max_tokens=max_tokens)
    assert h.relative_error(masked, plain.double().cpu()) < h.TOLERANCE[q.dtype]
    anywhere = [rng.randint(first + 4, end - 100) for _ in range(2 if is_long else 5)]
    for column in (first, first + 3, first + 4, end - 1, *anywhere):
        mask = silent.clone()
        mask[1, ..., column] = False
        check(case, q, mask.cuda(), max_tokens=max_tokens)


def test_consecutive_launches_and_graph_capture() -> None:
    case = h.make_case(128, (64, 8), (64, 8), [5000], kv_heads=4, device="cuda")
    q = torch.randn(1, 16, 1, 128).half().cuda()
    want = h.reference(case, q, None, None, 0.1, 0.0)
    for _ in range(50):
        out = attend(case, q, max_tokens=8192)
    assert h.relative_error(out, want) < 1e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [cuda_backend.attend(q, case.place, None, None, 0.1, 0.0, 8192) for _ in range(3)]
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    assert all(h.relative_error(out, want) < 1e-3 for out in outs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*DEALT, *h.NATURAL], ids=str)
def test_encode(shape, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    for page_size in (16, 48, 512):
        case = h.make_case(*shape, [3000], page_size=page_size, kv_heads=2, recent=1, device="cuda")
        x = torch.randn(2, 1200, 2, shape[0]).to(dtype).cuda().transpose(1, 2)
        ids = torch.tensor([[1, -1], [0, 2]], dtype=torch.int32, device="cuda")
        first = torch.tensor([3, 100], dtype=torch.int32, device="cuda")
        for side, which in enumerate(h.SIDES):
            address = int(case.desc[1, side])
            cuda_backend.encode(x, address, case.codec(which), ids, first, case.geometry)
            for row, j in ((0, 0), (1, 0), (1, 1)):
                start = int(first[row]) + page_size * j
                h.check_page(case, which, int(ids[row, j]), x[row, :, start : start + page_size])


@pytest.mark.parametrize(
    "shape",
    [
        (128, (64, 8), (64, 8)), (128, (64, 8), (32, 8)), (64, (32, 6), (64, 4)), (80, (40, 5), (20, 8)), (80, None, None),
    ],
    ids=str,
)  # fmt: skip
def test_append_step_by_step(shape) -> None:  # type: ignore[no-untyped-def]
    """The window, counts and pages; a page that left is what encoding the same tokens makes of them."""
    sinks, page = 4, 48
    case = h.make_case(*shape, [100, 0, 170], page_size=page, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    needed = [case.config.coded_tokens(n + 60) // page for n in (100, 0, 170)]
    free = [p for p in range(len(case.pool)) if p not in set(case.page_table.flatten().tolist())]
    table = case.page_table.cpu()
    for row, n in enumerate(needed):
        for j in range(n):
            if table[row, j] < 0 and free:
                table[row, j] = free.pop()
    case.page_table.copy_(table)
    flags = torch.zeros(4, dtype=torch.int32, device="cuda")
    history = [[h.exact(case, row, which) for row in range(3)] for which in h.SIDES]
    q = torch.randn(3, 4, 1, shape[0]).bfloat16().cuda()
    for _ in range(60):
        k, v = (torch.randn(3, 2, 1, shape[0]).bfloat16().cuda() for _ in range(2))
        before = case.lengths.tolist()
        cuda_backend.append(k, v, case.place, flags)
        stuck = flags[0].item()
        for row, length in enumerate(case.lengths.tolist()):
            coded_before, coded = (case.config.coded_tokens(n) for n in (before[row], before[row] + 1))
            has_page = coded == coded_before or table[row, coded_before // page] >= 0
            assert length == before[row] + has_page
            assert has_page or stuck
            if not has_page:
                continue
            for side, (which, x) in enumerate(zip(h.SIDES, (k, v), strict=True)):
                history[side][row] = torch.cat([history[side][row], x[row].double().cpu()], dim=1)
                now = h.exact(case, row, which)
                recent = now[:, sinks + coded :]
                assert torch.equal(recent, history[side][row][:, sinks + coded : length])
                if coded == coded_before:
                    continue
                left = history[side][row][:, sinks + coded_before : sinks + coded]
                page_id = int(table[row, coded_before // page])
                if shape[1] is None:
                    assert torch.equal(h.decode_page(case, which, page_id), left)
                else:
                    h.check_page(case, which, page_id, left)
                    appended = case.pages(which)[page_id].clone()
                    ids, first = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([[page_id]], [0]))
                    source = left[None].bfloat16().cuda()
                    cuda_backend.encode(source, int(case.desc[1, side]), case.codec(which), ids, first, case.geometry)
                    assert torch.equal(case.pages(which)[page_id], appended)
                history[side][row] = now
    check(case, q)
