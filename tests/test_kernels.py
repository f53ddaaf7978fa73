"""The CUDA kernels without a GPU: they compile, do not spill, and index rightly on an emulated warp."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import harness as h
import pytest
import torch

from hf_pqcache.backends import dispatch, jit, launch, nvrtc
from hf_pqcache.config import CodeShape
from hf_pqcache.errors import NoKernelError

#: (head_dim, keys, values): codes that kernels deal to lanes, of either side.
DEALT = [
    (128, (64, 8), (64, 8)), (128, (64, 7), (64, 5)), (128, (64, 5), (32, 6)), (128, (32, 8), (32, 8)), (128, (64, 6), (32, 4)),
    (128, (128, 4), (16, 8)), (64, (32, 8), (32, 8)), (64, (32, 6), (64, 4)), (64, (32, 7), (32, 5)),
    (64, (32, 5), (16, 6)), (64, (64, 8), (32, 5)), (96, (48, 8), (24, 8)), (256, (128, 8), (64, 8)),
]  # fmt: skip
MAIN = DEALT[0]
EXACT = (128, None, None)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is built with g++")
Shape = tuple[int, "tuple[int, int] | None", "tuple[int, int] | None"]


# -- compiling -------------------------------------------------------------------------------------------------------
def _compile(spec: jit.KernelSpec, arch: int, tmp_path: Path) -> str:
    """Compile for sm_<arch> by NVRTC, as users do, or else by nvcc; the resource report of ptxas."""
    if nvrtc.find() is not None:
        compiles, log = nvrtc.compile_log(spec, (arch // 10, arch % 10))
        assert compiles, log
        return log
    if not shutil.which("nvcc"):
        pytest.skip("neither NVRTC nor nvcc is installed (pip install nvidia-cuda-nvrtc-cu12)")
    command = ["nvcc", f"-arch=sm_{arch}", "-std=c++17", "-cubin", "-Xptxas", "-v", *spec.options]
    command += [f"-I{jit.SOURCES}", "-o", str(tmp_path / "kernel.cubin"), str(jit.SOURCES / spec.source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def _attend_spec(
    shape: Shape, group: int, arch: int, mask: int = 0, tokens: int = 4096, is_bf16: bool = False, has_slots: bool = False
) -> jit.KernelSpec:
    head_dim, *codes = shape
    keys, values = (None if code is None else CodeShape(*code) for code in codes)
    geometry = launch.Geometry(head_dim, keys, values, 8, 1, 64, 1 << 16, 4, 192, 100)
    device = launch.Device(divmod(arch, 10), 132, {80: 166912, 90: 232448}[arch])
    return launch.attend_plan(geometry, group, is_bf16, mask, False, tokens, device, has_slots).spec


#: The older architecture by hand: both take minutes.
ARCHITECTURES = [pytest.param(80, marks=pytest.mark.slow), 90]


SPILLING = [*DEALT[:4], DEALT[6]]
MASKED = [pytest.param(shape, True, marks=[pytest.mark.slow] if shape != MAIN else []) for shape in SPILLING]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("shape", "masked"), [*((shape, False) for shape in SPILLING), *MASKED], ids=str)
def test_attention_compiles_and_hardly_spills(shape: Shape, masked: bool, arch: int, tmp_path: Path) -> None:
    """Of few and of many tokens for a block; masks and bfloat16 need a few registers more."""
    for spec in {
        _attend_spec(shape, 4, arch, int(masked), tokens, masked) for tokens in (2048, 8192, 1 << 20)
    }:  # often the same
        report = _compile(spec, arch, tmp_path)
        found = re.search(r"(\d+) bytes spill stores", report)
        assert int(found[1] if found else 1 << 20) <= (64 if masked else 16), report


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", [MAIN, EXACT], ids=str)
def test_slots_for_rows_hardly_spill(shape: Shape, arch: int, tmp_path: Path) -> None:
    report = _compile(_attend_spec(shape, 4, arch, tokens=8192, is_bf16=True, has_slots=True), arch, tmp_path)
    found = re.search(r"(\d+) bytes spill stores", report)
    assert int(found[1] if found else 1 << 20) <= 16, report


#: Further ones that codes are read one by one of: as `h.NATURAL[0]`, by hand.
MORE = [pytest.param(shape, marks=pytest.mark.slow) for shape in (h.NATURAL[4], (256, (32, 5), (16, 6)))]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shape", [MAIN, h.NATURAL[0], *MORE], ids=str)
def test_every_kind_of_kernel_compiles(shape: Any, arch: int, tmp_path: Path) -> None:
    head_dim, keys, values = shape
    _compile(_attend_spec(shape, 16, arch, mask=2), arch, tmp_path)
    _compile(launch.encode_spec(head_dim, CodeShape(*keys), False, True), arch, tmp_path)
    _compile(launch.encode_spec(head_dim, CodeShape(*values), True, True), arch, tmp_path)
    _compile(launch.append_spec(head_dim, CodeShape(*keys), CodeShape(*values), True), arch, tmp_path)


@pytest.mark.parametrize("arch", [80, 90])
def test_appending_to_exact_pages_compiles(arch: int, tmp_path: Path) -> None:
    _compile(launch.append_spec(128, None, None, True), arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_kernels_of_exact_pages_compile_without_spills(head_dim: int, arch: int, tmp_path: Path) -> None:
    for mask in (0, 1):
        report = _compile(_attend_spec((head_dim, None, None), 4, arch, mask), arch, tmp_path)
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report


# -- attention on the emulator ---------------------------------------------------------------------------------------
def _check(case: h.Case, q: torch.Tensor, splits: int, *args: Any, **kwargs: Any) -> float:
    mask, sinks, scale, softcap = (*args, *(None, None, 0.1, 0.0)[len(args) :])
    out, wavefronts = h.attend_emulated(case, q, splits, mask, sinks, scale, softcap, **kwargs)
    error = h.relative_error(out, h.reference(case, q, mask, sinks, scale, softcap))
    assert error < h.TOLERANCE[q.dtype], (case.geometry, error)
    for row, length in enumerate(case.lengths.tolist()):
        assert length or not out[row].any(), "an empty row gives zeros"
    assert not case.tickets.any()
    return wavefronts


@needs_compiler
@pytest.mark.parametrize("shape", [*DEALT, *h.NATURAL], ids=str)
def test_attention_over_codes_matches_float64(shape: Shape) -> None:
    for group, page_size, splits in ((1, 16, 1), (5, 48, 2), (8, 64, 3)):
        case = h.make_case(*shape, [700 if shape == MAIN else 300, 37, 0], kv_heads=2, page_size=page_size)
        wavefronts = _check(case, torch.randn(3, 2 * group, 1, shape[0]).half(), splits)
        assert shape in h.NATURAL or wavefronts == 1.0, "table look-ups hit the same bank"


@needs_compiler
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_pieces_of_a_page_of_any_size(tiles: int) -> None:
    for page_size in (64, 128):
        case = h.make_case(*MAIN, [1900, 37, 330], page_size=page_size)
        for group, splits in ((4, 3), (12, 1)):
            _check(case, torch.randn(3, group, 1, 128).half(), splits, piece_tiles=tiles)


@needs_compiler
@pytest.mark.parametrize("size", [-60, 60])
def test_scales_at_the_ends_of_their_range(size: int) -> None:
    """Values of 2^-8 and of 2^11: weights times scales must neither overflow fp16 nor lose their digits in it."""
    case = h.make_case(*MAIN, [400], recent=1, page_size=16)
    layout, pages = case.layout("value"), case.pages("value")
    blocks = layout.split(pages)
    blocks[..., layout.code_bytes :] = (160 + size + torch.randint(-40, 28, (len(blocks), 1, layout.page_size))).to(torch.uint8)
    pages.copy_(layout.join(blocks))
    case.windows[1].nan_to_num_().mul_(2.0 ** (size / 8))
    _check(case, torch.randn(1, 4, 1, 128).half(), 2)
    query = torch.randn(1, 4, 1, 128).half()
    _check(case, query * 300, 1, None, None, 0.1 / 300)


@needs_compiler
@pytest.mark.parametrize("codes", [(64, 8), (32, 6), None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masks_sinks_softcap_and_ragged_rows(codes: tuple[int, int] | None, dtype: torch.dtype) -> None:
    case = h.make_case(128, codes, codes, [150, 0, 60], kv_heads=2, page_size=16, dtype=dtype, starts=[0, 7, 3], extra_slots=9)
    group = 10
    q = torch.randn(3, 2 * group, 1, 128).to(dtype)
    boolean = torch.rand(3, 1, 1, 140) > 0.3
    boolean[2] = False
    no = torch.tensor(torch.finfo(dtype).min)
    additive = torch.where(torch.rand(1, 1, 1, 400) > 0.3, torch.randn(1, 1, 1, 400), no).to(dtype)[..., ::2]
    sinks = torch.randn(2 * group).to(dtype)
    for mask, extra, softcap, splits in (
        (None, None, 0.0, 3),
        (boolean, None, 0.0, 2),
        (additive, sinks, 0.0, 1),
        (additive, sinks, 5.0, 3),
    ):
        _check(case, q, splits, mask, extra, 0.1, softcap)


@needs_compiler
@pytest.mark.parametrize("shape", [MAIN, EXACT], ids=str)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_is_asked_once_for_a_block_and_never_missed(shape: Shape, kind: str) -> None:
    """Blocks whose share of the mask says nothing do not look again: one hidden token anywhere must still be seen."""
    lengths, starts, splits = [260, 190], [0, 21], 2
    case = h.make_case(*shape, lengths, page_size=16, starts=starts)
    config, total = case.config, max(n + s for n, s in zip(lengths, starts, strict=True))
    q = torch.randn(2, 4, 1, 128).half()
    tile = 16
    silent = torch.ones(2, 1, 1, total, dtype=torch.bool)
    silent[1, ..., : starts[1]] = False  # left padding is no token of the row
    silent[1, ..., starts[1] + lengths[1] :] = False  # nor is what comes after it
    hidden = set()
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        tiles = config.coded_tokens(length) // tile
        share = -(-tiles // splits)
        first = start + config.sink_tokens
        ends = [first, first + share * tile, first + tiles * tile]  # of the blocks' shares
        hidden |= {(row, start + 1), (row, start + length - 1), (row, ends[0] + 77)}
        hidden |= {(row, column) for end in ends for column in (end - 1, end)}
    masks = [silent, silent[..., :150].clone(), silent[:1, ..., 5:].clone()]
    for row, column in sorted(hidden):
        masks.append(silent.clone())
        masks[-1][row, ..., column] = False
    middle = silent.clone()
    middle[0, ..., 60:150] = False
    masks.append(middle)
    for i, mask in enumerate(masks):
        if kind == "additive":
            no = torch.finfo(q.dtype).min
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, no)
        if i % 3 == 1:  # rows that begin anywhere in memory
            mask = torch.nn.functional.pad(mask, (3, 2))[..., 3:-2]
        elif i % 3 == 2:  # columns that do not lie side by side
            mask = mask.repeat_interleave(2, dim=-1)[..., ::2]
        _check(case, q, splits, mask)


# -- exact pages -----------------------------------------------------------------------------------------------------
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_attention_over_exact_pages_matches_float64(head_dim: int, dtype: torch.dtype) -> None:
    for group, page_size, sinks, recent, splits in ((1, 16, 0, 1, 3), (11, 48, 4, 24, 2), (8, 64, 0, 24, 1)):
        case = h.make_case(
            head_dim, None, None, [300, 0, 37], kv_heads=2, page_size=page_size, sink_tokens=sinks, recent=recent, dtype=dtype
        )
        _check(case, torch.randn(3, 2 * group, 1, head_dim).to(dtype), splits, None, None, head_dim**-0.5)


@needs_compiler
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_over_exact_pages_with_any_number_of_query_heads(head_dim: int) -> None:
    case = h.make_case(head_dim, None, None, [90, 41], page_size=16, starts=[0, 49], dtype=torch.bfloat16)
    padded = torch.arange(90) >= torch.tensor([0, 49])[:, None]
    for group in range(1, 17):
        mask = padded[:, None, None] if group % 2 else None
        _check(case, torch.randn(2, group, 1, head_dim).bfloat16(), 2, mask, None, head_dim**-0.5)


# -- writing pages ---------------------------------------------------------------------------------------------------
@needs_compiler
@pytest.mark.parametrize(
    "shape",
    [MAIN, (128, (64, 7), (64, 5)), (128, (128, 4), (32, 8)), (64, (32, 6), (64, 4)), (64, (32, 5), (16, 6)), *h.NATURAL[:2]],
    ids=str,
)
def test_encode_writes_statistics_and_nearest_codes(shape: Shape) -> None:
    for page_size in (16, 80):
        case = h.make_case(*shape, [4 * page_size + 40] * 2, page_size=page_size, kv_heads=2)
        x = torch.randn(2, 3 * page_size + 10, 2, shape[0]) * torch.rand(shape[0]) * 3 + torch.randn(shape[0])
        x = x.half().transpose(1, 2)
        if shape[0] == 64:
            x = torch.nn.functional.pad(x, (1, 0))[..., 1:]  # vectors that are not aligned
        ids = torch.tensor([[1, -1, 4], [2, 5, -1]], dtype=torch.int32)
        first = torch.tensor([3, 0], dtype=torch.int32)
        for which in h.SIDES:
            before = {page: case.pages(which)[page].clone() for page in (0, 3)}
            h.encode_emulated(case, x, which, ids, first)
            for row, j in ((0, 0), (0, 2), (1, 0), (1, 1)):
                start = int(first[row]) + page_size * j
                h.check_page(case, which, int(ids[row, j]), x[row, :, start : start + page_size])
            for page, bytes_ in before.items():
                assert torch.equal(case.pages(which)[page], bytes_), "a page that was not named is untouched"


@needs_compiler
def test_pages_of_zeros_and_of_one_number() -> None:
    case = h.make_case(*MAIN, [104], page_size=32, kv_heads=2)
    case.equaliser.fill_(1)  # one number in all channels is then a mean in one channel, and nothing else
    x = torch.zeros(1, 2, 64, 128).half()
    x[:, :, 32:] = 3.0
    for which in h.SIDES:
        h.encode_emulated(case, x, which, torch.tensor([[0, 1]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
        assert h.decode_page(case, which, 0).abs().max() < 1e-4
        decoded = h.decode_page(case, which, 1)
        assert decoded.isfinite().all()
        assert which == "value" or (decoded - 3).abs().max() < 0.05


@needs_compiler
@pytest.mark.parametrize("shape", [MAIN, (64, (64, 6), (32, 5)), (80, (40, 5), (20, 8)), (80, None, None)], ids=str)
@pytest.mark.parametrize("page_size", [16, 48])
def test_append_fills_the_window_and_writes_pages_as_encode_does(shape: Shape, page_size: int) -> None:
    sinks, recent = 2, 5
    full = sinks + recent + 3 * page_size - 1  # one more token makes the third page
    case = h.make_case(
        *shape, [full, 1, 40, full], kv_heads=2, page_size=page_size, sink_tokens=sinks, recent=recent, dtype=torch.bfloat16
    )
    page = min(set(range(len(case.pool))) - set(case.page_table.flatten().tolist()))
    case.page_table[0, 2] = page
    before = {which: [h.exact(case, row, which) for row in range(4)] for which in h.SIDES}
    k, v = (torch.randn(4, 2, 1, shape[0]).bfloat16() for _ in range(2))
    flags = torch.zeros(4, dtype=torch.int32)
    stuck = case.windows[0][3].clone()
    h.append_emulated(case, k, v, flags)
    assert case.lengths.tolist() == [full + 1, 2, 41, full], "row 3 had no page"
    assert flags.tolist() == [1, 0, 0, 0]
    assert torch.equal(case.windows[0][3].nan_to_num(9), stuck.nan_to_num(9))
    assert not case.tickets.any()
    for which, new in zip(h.SIDES, (k, v), strict=True):
        left = before[which][0][:, sinks + 2 * page_size : sinks + 3 * page_size]
        appended = case.pages(which)[page].clone()
        if shape[1] is None:
            assert torch.equal(h.decode_page(case, which, page), left)
        else:
            h.check_page(case, which, page, left)
            ids, first = torch.tensor([[page]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            h.encode_emulated(case, left[None].bfloat16(), which, ids, first)
            assert torch.equal(case.pages(which)[page], appended)
        for row in (0, 1, 2):
            assert torch.equal(h.exact(case, row, which)[:, -1], new[row, :, 0].double())


# -- choosing --------------------------------------------------------------------------------------------------------
def test_a_cpu_cache_goes_to_torch_and_forcing_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = CodeShape(64, 8), CodeShape(64, 8)
    arguments = ((128, 128), codes, 4, torch.float16, torch.device("cpu"))
    monkeypatch.delenv("HF_PQCACHE_KERNEL", raising=False)
    assert dispatch.select(*arguments) == ("torch", "the cache is on cpu")
    monkeypatch.setenv("HF_PQCACHE_KERNEL", "tuned")
    with pytest.raises(NoKernelError, match="PQC002"):
        dispatch.select(*arguments)


def test_splits_fill_the_device_and_stop_at_short_sequences() -> None:
    assert launch.num_splits(8, 131072, 132) == 16
    assert launch.num_splits(64, 32768, 132) == 2
    assert launch.num_splits(8, 16, 132) == 1
    assert launch.num_splits(1000, 131072, 132) <= 3
