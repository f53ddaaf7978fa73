"""The CUDA kernels without a GPU: they compile, do not spill, and index rightly on an emulated warp."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import harness as h
import pytest
import torch

from hf_pqcache.backends import jit, launch, nvrtc, selection
from hf_pqcache.errors import NoKernelError
from hf_pqcache.pages import layout

TUNED = sorted(jit.tuned_shapes())
#: Rounding of P and of the output to the model's dtype: fp16 has 11 digits, bf16 has 8.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is built with g++")


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


def _geometry(shape: tuple[int, int, int]) -> launch.Geometry:
    return launch.Geometry(*shape, 8, 1, 64, 4, 192, 100)


def _attend_spec(
    shape: tuple[int, int, int], name: str, group: int, arch: int, mask: int = 0, tokens: int = 4096, is_bf16: bool = False
) -> jit.KernelSpec:
    shared = {80: 166912, 90: 232448}[arch]
    device = launch.Device(divmod(arch, 10), 132, shared)
    return launch.attend_plan(_geometry(shape), group, name, is_bf16, mask, False, tokens, device).spec


@pytest.mark.skipif(nvrtc.find() is None, reason="NVRTC is not installed (pip install nvidia-cuda-nvrtc-cu12)")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("shape", [(128, 64, 8), (64, 32, 6), (80, 40, 5), (128, 0, 0)], ids=str)
def test_nvrtc_compiles_every_kind_of_kernel(shape: tuple[int, int, int], arch: int) -> None:
    """What users run, and stricter than nvcc: it has no host functions."""
    capability, shared_bytes = (arch // 10, arch % 10), {80: 166912, 90: 232448}[arch]
    name = "paged" if not shape[1] else "tuned" if shape in TUNED else "generic"
    for spec in (*selection.specs(shape, capability, shared_bytes), _attend_spec(shape, name, 4, arch, mask=1)):
        assert nvrtc.compile_error(spec, capability) is None


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("shape", TUNED, ids=str)
def test_tuned_kernels_compile_without_spills(shape: tuple[int, int, int], group: int, arch: int, tmp_path: Path) -> None:
    # Few and many tokens for a block are two variants where four heads are served; the second has no register to spare, and
    # bfloat16 needs more of them.
    many = 1 << 20
    for tokens, mask, is_bf16 in ((4096, 0, False), (many, 0, True), (many, 1, False)) if group == 4 else ((many, 1, True),):
        report = _compile(_attend_spec(shape, "tuned", group, arch, mask, tokens, is_bf16), arch, tmp_path)
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report


@pytest.mark.parametrize("arch", [80, 90])
def test_other_kernels_compile(arch: int, tmp_path: Path) -> None:
    for shape in ((128, 64, 8), (256, 32, 5), (40, 40, 7)):
        _compile(_attend_spec(shape, "generic", 16, arch, mask=2), arch, tmp_path)
        for source in ("append.cu", "encode.cu"):
            _compile(launch.encode_plan(shape, True, source).spec, arch, tmp_path)
    _compile(launch.append_spec((128, 0, 0), True), arch, tmp_path)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 192, 256])
def test_kernels_of_exact_pages_compile_without_spills(head_dim: int, arch: int, tmp_path: Path) -> None:
    for mask in (0, 1):
        report = _compile(_attend_spec((head_dim, 0, 0), "paged", 4, arch, mask), arch, tmp_path)
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report


# -- attention on the emulator ---------------------------------------------------------------------------------------
@needs_compiler
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("shape", TUNED, ids=str)
def test_tuned_attention_matches_float64(shape: tuple[int, int, int], group: int) -> None:
    page_size = {1: 16, 4: 48, 8: 64}[group]
    case = h.make_case(*shape, [300, 37], page_size=page_size)
    q = torch.randn(2, group, 1, shape[0]).half()
    out, wavefronts = h.attend_emulated(case, q, "tuned", splits=2)
    assert h.relative_error(out, h.reference(case, q, None, None, 0.1, 0.0)) < TOLERANCE[q.dtype]
    # eight heads leave a two-way conflict on the keys' half of the look-ups (attend_warp.cuh, TURN_WORDS)
    assert wavefronts == (1.5 if group == 8 and shape[2] != 6 else 1.0), "table look-ups hit the same bank"
    assert not case.tickets.any()


@needs_compiler
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("shape", [(128, 64, 8), (128, 128, 4), (64, 64, 8)], ids=str)
def test_codes_by_way_of_shared_memory_match_float64(shape: tuple[int, int, int], group: int) -> None:
    """In long sequences codes are copied into shared memory; the emulator copies when it is waited for, not before."""
    case = h.make_case(*shape, [700, 37, 0, 330], starts=[0, 3, 0, 9])
    plan = launch.attend_plan(case.geometry, group, "tuned", False, 0, False, 8192, h.EMULATED)
    assert dict(plan.spec.defines)["PQ_STAGED"] == 1
    q = torch.randn(4, group, 1, shape[0]).half()
    mask = torch.rand(4, 1, 1, 650) > 0.3
    for given in (None, torch.ones_like(mask), mask):
        for splits in (1, 3):
            out, wavefronts = h.attend_emulated(case, q, "tuned", splits, given, planned_tokens=8192)
            assert h.relative_error(out, h.reference(case, q, given, None, 0.1, 0.0)) < TOLERANCE[q.dtype]
            assert wavefronts == 1.0


@needs_compiler
@pytest.mark.parametrize("name", ["tuned", "generic", "paged"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masks_sinks_softcap_and_ragged_rows(name: str, dtype: torch.dtype) -> None:
    case = h.make_case(128, 64, 8, [150, 0, 60], kv_heads=2, page_size=16, dtype=dtype, starts=[0, 7, 3], extra_slots=9)
    group = 10
    q = torch.randn(3, 2 * group, 1, 128).to(dtype)
    boolean = torch.rand(3, 1, 1, 140) > 0.3
    boolean[2] = False
    no = torch.tensor(torch.finfo(dtype).min)
    additive = torch.where(torch.rand(1, 1, 1, 400) > 0.3, torch.randn(1, 1, 1, 400), no).to(dtype)[..., ::2]
    sinks = torch.randn(2 * group).to(dtype)
    if name == "paged":
        case = h.make_case(128, 0, 0, [150, 0, 60], kv_heads=2, page_size=16, dtype=dtype, starts=[0, 7, 3], extra_slots=9)
    for mask, extra, softcap, splits in (
        (None, None, 0.0, 3),
        (boolean, None, 0.0, 2),
        (additive, sinks, 0.0, 1),
        (additive, sinks, 5.0, 3),
    ):
        out, _ = h.attend_emulated(case, q, name, splits, mask, extra, 0.1, softcap)
        want = h.reference(case, q, mask, extra, 0.1, softcap)
        assert h.relative_error(out, want) < TOLERANCE[dtype]
        assert not out[1].any(), "an empty row gives zeros"
        assert not case.tickets.any()


@needs_compiler
@pytest.mark.parametrize("name", ["tuned", "paged"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_is_asked_once_for_a_block_and_never_missed(name: str, kind: str) -> None:
    """Blocks whose share of the mask says nothing do not look again: one hidden token anywhere must still be seen."""
    shape = (128, 64, 8) if name == "tuned" else (128, 0, 0)
    lengths, starts, splits = [260, 190], [0, 21], 2
    case = h.make_case(*shape, lengths, page_size=16, starts=starts)
    config, total = case.view.config, max(n + s for n, s in zip(lengths, starts, strict=True))
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
        out, _ = h.attend_emulated(case, q, name, splits, mask)
        want = h.reference(case, q, mask, None, 0.1, 0.0)
        assert h.relative_error(out, want) < TOLERANCE[q.dtype], i


@needs_compiler
@pytest.mark.parametrize("shape", [(128, 64, 8), (64, 32, 6), (80, 40, 5), (96, 24, 7), (256, 128, 4)], ids=str)
def test_generic_attention_matches_float64(shape: tuple[int, int, int]) -> None:
    case = h.make_case(*shape, [130, 37, 3], page_size=32, kv_heads=2)
    q = torch.randn(3, 6, 1, shape[0]).half()
    out, _ = h.attend_emulated(case, q, "generic", splits=3)
    assert h.relative_error(out, h.reference(case, q, None, None, 0.1, 0.0)) < TOLERANCE[q.dtype]


@needs_compiler
@pytest.mark.parametrize("name", ["tuned", "generic"])
def test_a_layer_that_has_yet_to_learn_attends_to_its_window(name: str) -> None:
    """Kernels copy their tables before they know that no token is coded: the tables must be there."""
    case = h.make_case(128, 64, 8, [90, 0, 17], kv_heads=2, recent=100, is_coded=False)
    q = torch.randn(3, 4, 1, 128).half()
    out, _ = h.attend_emulated(case, q, name, splits=2)
    assert h.relative_error(out, h.reference(case, q, None, None, 0.1, 0.0)) < TOLERANCE[q.dtype]


@needs_compiler
def test_one_key_copy_is_right_where_shared_memory_is_small() -> None:
    case = h.make_case(128, 64, 8, [200], page_size=16)
    q = torch.randn(1, 4, 1, 128).half()
    out, _ = h.attend_emulated(case, q, "tuned", splits=1, planned_tokens=1)
    assert h.relative_error(out, h.reference(case, q, None, None, 0.1, 0.0)) < TOLERANCE[q.dtype]


# -- exact pages -----------------------------------------------------------------------------------------------------
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_attention_over_exact_pages_matches_float64(head_dim: int, dtype: torch.dtype) -> None:
    for group, page_size, sinks, recent, splits in ((1, 16, 0, 1, 3), (11, 48, 4, 24, 2), (8, 64, 0, 24, 1)):
        case = h.make_case(
            head_dim, 0, 0, [300, 0, 37], kv_heads=2, page_size=page_size, sink_tokens=sinks, recent=recent, dtype=dtype
        )
        q = torch.randn(3, 2 * group, 1, head_dim).to(dtype)
        out, _ = h.attend_emulated(case, q, "paged", splits, scale=head_dim**-0.5)
        want = h.reference(case, q, None, None, head_dim**-0.5, 0.0)
        assert h.relative_error(out, want) < TOLERANCE[dtype]
        assert not out[1].any(), "an empty row gives zeros"
        assert not case.tickets.any()


@needs_compiler
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_over_exact_pages_with_any_number_of_query_heads(head_dim: int) -> None:
    case = h.make_case(head_dim, 0, 0, [90, 41], page_size=16, starts=[0, 49], dtype=torch.bfloat16)
    padded = torch.arange(90) >= torch.tensor([0, 49])[:, None]
    for group in range(1, 17):
        q = torch.randn(2, group, 1, head_dim).bfloat16()
        mask = padded[:, None, None] if group % 2 else None
        out, _ = h.attend_emulated(case, q, "paged", 2, mask, scale=head_dim**-0.5)
        want = h.reference(case, q, mask, None, head_dim**-0.5, 0.0)
        assert h.relative_error(out, want) < TOLERANCE[torch.bfloat16]


@needs_compiler
@pytest.mark.parametrize("page_size", [16, 48])
def test_append_copies_pages_that_leave_the_window(page_size: int) -> None:
    sinks, recent = 2, 5
    full = sinks + recent + 3 * page_size - 1  # one more token makes the third page
    case = h.make_case(
        80, 0, 0, [full, 1, full], kv_heads=2, page_size=page_size, sink_tokens=sinks, recent=recent, dtype=torch.bfloat16
    )
    view = case.view
    view.page_table[0, 2] = min(set(range(case.key_pages.shape[0])) - set(view.page_table.flatten().tolist()))
    before = {which: [h.exact(case, row, which) for row in range(3)] for which in ("key", "value")}
    k, v = (torch.randn(3, 2, 1, 80).bfloat16() for _ in range(2))
    flags = torch.zeros(4, dtype=torch.int32)
    h.append_emulated(case, k, v, flags)
    assert view.lengths.tolist() == [full + 1, 2, full], "row 2 had no page"
    assert flags.tolist() == [1, 0, 0, 0]
    assert not case.tickets.any()
    for which, new in (("key", k), ("value", v)):
        for row in range(3):
            added = [] if row == 2 else [new[row].double()]
            assert torch.equal(h.exact(case, row, which), torch.cat([before[which][row], *added], dim=1))


# -- writing codes ---------------------------------------------------------------------------------------------------
@needs_compiler
@pytest.mark.parametrize("shape", [(128, 64, 8), (128, 32, 8), (128, 128, 4), (64, 32, 6), (80, 40, 5)], ids=str)
def test_encode_writes_nearest_codes_in_page_layout(shape: tuple[int, int, int]) -> None:
    case = h.make_case(*shape, [200, 200], page_size=48, kv_heads=2)
    x = torch.randn(2, 150, 2, shape[0]).half().transpose(1, 2)
    if shape[0] == 64:
        x = torch.nn.functional.pad(x, (1, 0))[..., 1:]  # vectors that are not aligned
    before = {which: [h.page_codes(case, which, p) for p in (0, 3)] for which in ("key", "value")}
    ids = torch.tensor([[1, -1, 4], [2, 5, -1]], dtype=torch.int32)
    first = torch.tensor([3, 0], dtype=torch.int32)
    for which in ("key", "value"):
        h.encode_emulated(case, x, which, ids, first)
        for row, j in ((0, 0), (0, 2), (1, 0), (1, 1)):
            start = int(first[row]) + 48 * j
            got = h.excess_distance(case, which, int(ids[row, j]), x[row, :, start : start + 48])
            assert got < 1e-6
        for page, codes in zip((0, 3), before[which], strict=True):
            assert torch.equal(h.page_codes(case, which, page), codes), "a page that was not named is untouched"


@needs_compiler
@pytest.mark.parametrize("shape", [(128, 64, 8), (64, 64, 6)], ids=str)
def test_append_fills_window_flushes_pages_and_counts(shape: tuple[int, int, int]) -> None:
    sinks, recent, page = 4, 24, 16
    full = sinks + recent + 3 * page - 1  # one more token makes the third page
    case = h.make_case(*shape, [full, 2, 40, full], page_size=page, kv_heads=2, dtype=torch.bfloat16)
    view = case.view
    view.page_table[0, 2] = int(case.key_pages.shape[0]) - 1
    leaving = [h.exact(case, 0, which)[:, sinks + 2 * page : sinks + 3 * page] for which in ("key", "value")]
    k, v = (torch.randn(4, 2, 1, shape[0]).bfloat16() for _ in range(2))
    flags = torch.zeros(4, dtype=torch.int32)
    stuck = view.window_keys[3].clone()
    h.append_emulated(case, k, v, flags)
    assert view.lengths.tolist() == [full + 1, 3, 41, full], "row 3 had no page"
    assert flags.tolist() == [1, 0, 0, 0]
    assert torch.equal(view.window_keys[3].nan_to_num(9), stuck.nan_to_num(9))
    assert not case.tickets.any()
    for row in (0, 1, 2):
        length = int(view.lengths[row])
        assert torch.equal(h.exact(case, row, "key")[:, length - 1], k[row, :, 0].double())
        assert torch.equal(h.exact(case, row, "value")[:, length - 1], v[row, :, 0].double())
    for which, want in zip(("key", "value"), leaving, strict=True):
        assert h.excess_distance(case, which, int(view.page_table[0, 2]), want) < 1e-6


# -- choosing --------------------------------------------------------------------------------------------------------
def test_layout_orders_are_permutations() -> None:
    for page_size in (16, 48, 512):
        for m, bits in ((64, 8), (32, 8), (128, 4), (64, 4), (64, 6), (32, 6), (10, 5), (9, 7)):
            for order in (layout.key_order, layout.value_order):
                assert torch.equal(order(page_size, m, bits).sort().values, torch.arange(page_size * m))


def test_a_cpu_cache_goes_to_torch_and_forcing_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (128, 128, 64, 8, 4, torch.float16, torch.device("cpu"))
    monkeypatch.delenv("HF_PQCACHE_KERNEL", raising=False)
    assert selection.select(*arguments) == ("torch", "the cache is on cpu")
    monkeypatch.setenv("HF_PQCACHE_KERNEL", "tuned")
    with pytest.raises(NoKernelError, match="PQC002"):
        selection.select(*arguments)


def test_splits_fill_the_device_and_stop_at_short_sequences() -> None:
    assert launch.num_splits(8, 131072, 132) == 16
    assert launch.num_splits(64, 32768, 132) == 2
    assert launch.num_splits(8, 16, 132) == 1
    assert launch.num_splits(1000, 131072, 132) <= 3
