"""Random layers, the float64 reference, and kernels run on the CPU; shared by the tests of the kernels."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import struct
import subprocess
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hf_pqcache.backends import cuda_backend, jit, launch
from hf_pqcache.codebook import pq
from hf_pqcache.config import CodeShape, PQConfig, Side
from hf_pqcache.pages.codec import CodedPages
from hf_pqcache.pages.layout import PageLayout

HERE = Path(__file__).parent
#: The shared memory and multiprocessors of the device that is emulated: an H200.
#: With one SM a plan splits nothing, so that its tokens are those of a block.
EMULATED = launch.Device((9, 0), 1, 232448)


#: (head_dim, keys, values): codes that kernels read one by one.
NATURAL = [
    (80, (40, 5), (20, 8)),
    (96, (24, 7), (16, 8)),
    (40, (40, 8), (20, 7)),
    (112, (28, 8), (16, 5)),
    (128, (8, 8), (8, 4)),
]


#: Rounding of P and of the output to the model's dtype: fp16 has 11 digits, bf16 has 8.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3}


STRUCTS = {
    cuda_backend.ATTEND_ARGS: "AttendArgs",
    cuda_backend.APPEND_ARGS: "AppendArgs",
    cuda_backend.ENCODE_ARGS: "EncodeArgs",
}


SIDES: tuple[Side, Side] = ("key", "value")


@dataclass
class Case:
    """A layer with random contents and all that a call of its kernels takes; lists hold keys, then values.

    pool: uint8 (max_pages, page bytes), keys and values of a page side by side. centroids: float16 (1, C, d/M), none for exact
    pages. windows: (batch, kv_heads, sink_tokens + window_slots, d). slots: see `cuda_backend.Place`.
    """

    config: PQConfig
    geometry: launch.Geometry
    pool: Tensor
    centroids: list[Tensor]
    windows: list[Tensor]
    counts: Tensor
    starts: Tensor
    page_table: Tensor
    tickets: Tensor
    equaliser: Tensor
    gains: tuple[float, float]
    desc: Tensor
    slots: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        return self.counts[:, 0]

    def layout(self, which: Side) -> PageLayout:
        codes = self.geometry.keys if which == "key" else self.geometry.values
        assert codes is not None
        return PageLayout(which, self.geometry.page_size, self.geometry.head_dim, *codes)

    def side_bytes(self, which: Side) -> int:
        g = self.geometry
        return g.kv_heads * (g.page_size * g.head_dim * 2 if g.is_exact else self.layout(which).nbytes)

    def pages(self, which: Side) -> Tensor:
        """(max_pages, bytes) of the pool, a view; (max_pages, H, P, d) in the model's dtype for exact pages."""
        first, g = (0 if which == "key" else self.offset), self.geometry
        side = self.pool[:, first : first + self.side_bytes(which)]
        return side.view(self.windows[0].dtype).unflatten(1, (g.kv_heads, g.page_size, g.head_dim)) if g.is_exact else side

    @property
    def offset(self) -> int:
        """Where a page's values begin."""
        return -(-self.side_bytes("key") // 64) * 64

    @property
    def place(self) -> cuda_backend.Place:
        return cuda_backend.Place(self.desc, 1, self.counts, self.starts, self.page_table, self.geometry, self.slots)

    def codec(self, which: Side) -> CodedPages:
        side = SIDES.index(which)
        return CodedPages(
            self.layout(which), self.geometry.kv_heads, self.centroids[side], self.gains[side],
            self.equaliser if which == "key" else torch.ones_like(self.equaliser),
        )  # fmt: skip


def random_blocks(layout: PageLayout, count: int) -> Tensor:
    """uint8 (count, bytes): pages as encoding makes them, with scales of many sizes."""
    codes = torch.randint(0, 1 << layout.num_bits, (count, layout.page_size, layout.num_subspaces), dtype=torch.uint8)
    size = torch.randint(-12, 8, (count, 1))  # of a whole page
    if layout.which == "value":
        magnitude = 160 + size + torch.randint(-24, 9, (count, layout.page_size))
        return layout.pack(codes, magnitude.to(torch.uint8))
    magnitude = (152 + size + torch.randint(-30, 9, (count, layout.head_dim))).to(torch.uint8)
    mean = torch.randint(-127, 128, (count, layout.head_dim), dtype=torch.int8)
    return layout.pack(codes, magnitude, mean, torch.rand(count).mul(0.01).half())


def make_case(
    head_dim: int,
    keys: tuple[int, int] | None,
    values: tuple[int, int] | None,
    lengths: list[int],
    kv_heads: int = 1,
    page_size: int = 64,
    sink_tokens: int = 4,
    recent: int = 24,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    extra_slots: int = 0,
    starts: list[int] | None = None,
    shared: list[int] | None = None,
) -> Case:
    """Rows of the given lengths; unused window slots, unused pages and table entries are poisoned.

    keys, values: (M, bits) of each side; None for pages of exact tokens. shared: how many pages each row has beyond those that
    left its window, as one does that began with the pages of another.
    """
    batch = len(lengths)
    config = PQConfig(page_size=page_size, sink_tokens=sink_tokens, extended_residual=recent)
    pages_of = [config.coded_tokens(n) // page_size + more for n, more in zip(lengths, shared or [0] * batch, strict=True)]
    max_pages, width = sum(pages_of) + 2, max(pages_of) + 2
    order = torch.randperm(max_pages)
    table = torch.full((batch, width), -1, dtype=torch.int32)
    used = 0
    for row, n in enumerate(pages_of):
        table[row, :n] = order[used : used + n]
        used += n
    slots = config.window_slots + extra_slots
    windows = []
    for _ in SIDES:
        window = torch.full((batch, kv_heads, sink_tokens + slots, head_dim), float("nan"), dtype=dtype)
        for row, n in enumerate(lengths):
            held = window_tokens(config, n, slots, pages_of[row] * page_size)
            window[row, :, [slot for slot, _ in held]] = torch.randn(kv_heads, len(held), head_dim).to(dtype)
        windows.append(window.to(device))
    shapes = [None if codes is None else CodeShape(*codes) for codes in (keys, values)]
    geometry = launch.Geometry(
        head_dim, *shapes, kv_heads, batch, page_size, 0, sink_tokens, slots, width
    )  # fmt: skip
    case = Case(config, geometry, torch.empty(0), [], windows, *[torch.empty(0)] * 5, (1.25, 1.125), torch.empty(0))
    stride = case.offset + -(-case.side_bytes("value") // 64) * 64
    case.geometry = geometry = replace(geometry, page_stride=stride)
    case.pool = torch.full((max_pages, stride), 255, dtype=torch.uint8)
    for which in SIDES:
        side = case.pages(which)
        if geometry.is_exact:
            side[order[:used]] = torch.randn(used, *side.shape[1:]).to(dtype)
        elif used:
            blocks = random_blocks(case.layout(which), used * kv_heads).unflatten(0, (used, kv_heads))
            side[order[:used]] = case.layout(which).join(blocks)
        if not geometry.is_exact:
            codes = shapes[SIDES.index(which)]
            assert codes is not None
            shape = (1, 1 << codes.num_bits, head_dim // codes.num_subspaces)
            case.centroids.append((torch.rand(shape) * 2 - 1).half().to(device))
    case.pool = case.pool.to(device)
    counts = [[n, pages * page_size] for n, pages in zip(lengths, pages_of, strict=True)]
    case.counts = torch.tensor(counts, dtype=torch.int32, device=device)
    case.starts = torch.tensor(starts or [0] * batch, dtype=torch.int32, device=device)
    case.page_table = table.to(device)
    case.tickets = torch.zeros(batch + 2 * batch * kv_heads, dtype=torch.int32, device=device)
    case.equaliser = torch.exp2(torch.randint(0, 4, (kv_heads, head_dim)).mul(torch.rand(kv_heads, head_dim) < 0.2) / 2).to(
        device
    )
    case.desc = torch.zeros(2, 12, dtype=torch.int64)  # layer 1 of 2: layer 0 must not be read
    addresses = [case.pool.data_ptr(), case.pool.data_ptr() + case.offset]
    addresses += [c.data_ptr() for c in case.centroids] or [0, 0]
    addresses += [case.equaliser.data_ptr(), *(w.data_ptr() for w in windows), case.tickets.data_ptr(), recent]
    addresses += struct.unpack("<q", struct.pack("<2f", *case.gains))
    found = [None, None] if geometry.is_exact else [cuda_backend.cells_of(case.codec(which)) for which in SIDES]
    addresses += [0 if lists is None else lists.data_ptr() for lists in found]
    case.desc[1] = torch.tensor(addresses)
    case.desc = case.desc.to(device)
    return case


def window_tokens(config: PQConfig, length: int, slots: int, coded: int) -> list[tuple[int, int]]:
    """(slot, token) of everything that a row's window holds."""
    sinks = config.sink_tokens
    held = [(t, t) for t in range(min(length, sinks))]
    return held + [(sinks + (t - sinks) % slots, t) for t in range(sinks + coded, length)]


def decode_page(case: Case, which: Side, page: int) -> Tensor:
    """float64 (H, P, d) on the CPU: what a page says its tokens are."""
    block = case.pages(which)[page].cpu()
    if case.geometry.is_exact:
        return block.double()
    codes, scales = case.layout(which).unpack(case.layout(which).split(block[None])[0])
    coded = pq.decode(codes, case.centroids[SIDES.index(which)].cpu(), torch.float64)
    scale = torch.exp2((scales["magnitude"].double() - 160) / 8)
    if which == "key":
        mean = scales["mean"].double() * scales["step"].double()[..., None]
        rotated = coded * scale[..., None, :] + mean[..., None, :]
    else:
        rotated = coded * scale[..., None]
    decoded = rotated @ hadamard(case.geometry.head_dim)
    return decoded * case.equaliser.double().cpu()[:, None] if which == "key" else decoded


@cache
def hadamard(head_dim: int) -> Tensor:
    """float64 (d, d): Sylvester's matrices of d's binary powers, the largest first, orthonormal."""
    blocks = []
    for size in (1 << i for i in range(9, -1, -1) if head_dim >> i & 1):
        index = torch.arange(size)
        parity = sum((index[:, None] & index[None, :]) >> i & 1 for i in range(9)) % 2
        blocks.append((1.0 - 2.0 * parity).double() / math.sqrt(size))
    return torch.block_diag(*blocks)


def exact(case: Case, row: int, which: Side) -> Tensor:
    """All keys or values of a row in float64: (H, length, d), on the CPU."""
    config, (length, coded) = case.config, case.counts[row].tolist()
    window = case.windows[SIDES.index(which)]
    out = torch.zeros(window.shape[1], length, window.shape[3], dtype=torch.float64)
    for slot, token in window_tokens(config, length, case.geometry.window_slots, coded):
        out[:, token] = window[row, :, slot].double().cpu()
    for i in range(coded // config.page_size):
        first = config.sink_tokens + i * config.page_size
        out[:, first : first + config.page_size] = decode_page(case, which, int(case.page_table[row, i]))
    return out


def reference(case: Case, q: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Attention in float64, (B, 1, Hq, d) on the CPU."""
    batch, heads, _, head_dim = q.shape
    kv_heads = case.geometry.kv_heads
    out = torch.zeros(batch, 1, heads, head_dim, dtype=torch.float64)
    for row in range(batch):
        keys, values = exact(case, row, "key"), exact(case, row, "value")
        length, start = keys.shape[1], int(case.starts[row])
        if length == 0:
            continue
        query = q[row, :, 0].double().cpu().view(kv_heads, -1, head_dim)
        score = query @ keys.transpose(1, 2) * scale
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if mask is not None:
            line = mask[row if mask.shape[0] > 1 else 0, 0, 0].cpu()[start : start + length]
            bias = torch.zeros(length, dtype=torch.float64)
            if mask.dtype == torch.bool:
                bias[: line.numel()].masked_fill_(~line, -math.inf)
            else:
                line = line.double()
                bias[: line.numel()] = line.masked_fill(line < -30000, -math.inf)
            score = score + bias
        if sinks is not None:
            score = torch.cat([score, sinks.double().cpu().view(kv_heads, -1, 1)], dim=-1)
        weights = torch.softmax(score, -1).nan_to_num(0)[..., :length]
        out[row, 0] = (weights @ values).view(heads, head_dim)
    return out


def relative_error(got: Tensor, want: Tensor) -> float:
    got = got.double().cpu()
    if not got.isfinite().all():
        return math.inf
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


@cache
def _library(spec: jit.KernelSpec, struct_name: str) -> Any:
    """The emulated kernel as a shared library; built once for a spec and a state of the sources."""
    sources = "".join(p.read_text() for p in sorted(HERE.glob("emulator.*")))
    key = hashlib.sha256(f"{spec}{jit.sources_digest()}{sources}".encode()).hexdigest()[:20]
    target = Path(tempfile.gettempdir()) / "hf_pqcache_emulator" / f"{key}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}-{id(spec)}")
        command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{HERE}", f"-I{jit.SOURCES}", *spec.options]
        command += [f'-DPQ_SOURCE="{spec.source}"', f"-DPQ_ARGS={struct_name}", f"-DPQ_ENTRY={spec.entry}"]
        subprocess.run([*command, "-o", str(partial), str(HERE / "emulator.cpp")], check=True)
        partial.rename(target)
    library = ctypes.CDLL(str(target))
    library.emulate.restype = ctypes.c_double
    return library


def emulate(spec: jit.KernelSpec, struct_name: str, layout_: Any, grid: tuple[int, int, int], values: tuple[Any, ...]) -> float:
    """Run a kernel on the CPU. Returns the shared-memory wavefronts for each conflict-free one of the look-ups."""
    packed = layout_.pack(*values)
    result = _library(spec, struct_name).emulate(packed, len(packed), *grid, spec.threads, spec.shared_bytes)
    if result < 0:
        raise RuntimeError({-1: "the struct's size differs", -2: "threads wait for each other forever"}[int(result)])
    return float(result)


def attend_emulated(
    case: Case,
    q: Tensor,
    splits: int,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 0.1,
    softcap: float = 0.0,
    piece_tiles: int | None = None,
) -> tuple[Tensor, float]:
    """(output, wavefronts for each look-up) of an attention kernel run on the CPU; output and scratch are poisoned."""
    geometry = case.geometry
    group = q.shape[1] // geometry.kv_heads
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    launch.attend_plan.cache_clear()
    with patch.object(launch, "_piece_tiles", lambda *a: piece_tiles) if piece_tiles else nullcontext():
        plan = launch.attend_plan(
            geometry, group, q.dtype == torch.bfloat16, kind, softcap != 0, 2048, EMULATED, case.slots is not None
        )
    out = torch.full((q.shape[0], 1, q.shape[1], q.shape[3]), float("nan"), dtype=q.dtype)
    rows = q.shape[0] * geometry.kv_heads * splits * group
    partial = torch.full((rows * (q.shape[3] + 66),), float("nan"))
    values = cuda_backend.attend_values(q, out, partial, case.place, mask, sinks, plan._replace(splits=splits), scale, softcap)
    wavefronts = emulate(plan.spec, "AttendArgs", cuda_backend.ATTEND_ARGS, (splits, *plan.grid[1:]), values)
    return out, wavefronts


class EmulatedKernel:
    """Stands for `jit.Kernel`: launches run on the CPU."""

    def __init__(self, spec: jit.KernelSpec, device: Any, layout_: Any) -> None:
        self.spec, self.layout = spec, layout_

    def launch(self, grid: tuple[int, int, int], stream: int, *values: Any) -> None:
        emulate(self.spec, STRUCTS[self.layout], self.layout, grid, values)


def append_emulated(case: Case, k: Tensor, v: Tensor, flags: Tensor) -> None:
    """append.cu or append_paged.cu on the CPU."""
    geometry = case.geometry
    is_bf16, has_slots = k.dtype == torch.bfloat16, case.slots is not None
    spec = launch.append_spec(geometry.head_dim, geometry.keys, geometry.values, is_bf16, has_slots)
    values = cuda_backend.append_values(k, v, case.place, flags)
    emulate(spec, "AppendArgs", cuda_backend.APPEND_ARGS, launch.append_grid(geometry), values)


def encode_emulated(case: Case, x: Tensor, which: Side, page_ids: Tensor, first_token: Tensor) -> None:
    """encode.cu on the CPU."""
    geometry = case.geometry
    codec = case.codec(which)
    spec = launch.encode_spec(geometry.head_dim, codec.codes, which == "value", x.dtype == torch.bfloat16)
    values = cuda_backend.encode_values(x, int(case.desc[1, SIDES.index(which)]), codec, page_ids, first_token, geometry)
    grid = launch.encode_grid(geometry, x.shape[0], page_ids.shape[1])
    emulate(spec, "EncodeArgs", cuda_backend.ENCODE_ARGS, grid, values)


def check_page(case: Case, which: Side, page: int, x: Tensor) -> None:
    """Assert that a page is a right encoding of x (H, P, d): statistics up to rounding, codes that are nearest."""
    layout = case.layout(which)
    block = layout.split(case.pages(which)[page].cpu()[None])[0]
    codes, scales = layout.unpack(block)
    assert torch.equal(layout.pack(codes, **scales), block), "what pads a block is zero"
    x = x.double().cpu()
    rotated = (x / case.equaliser.double().cpu()[:, None] if which == "key" else x) @ hadamard(x.shape[-1])
    if which == "key":
        mean, step = rotated.mean(-2), scales["step"].double()
        assert torch.allclose(step, mean.abs().amax(-1) / 127, rtol=2e-3)
        got = scales["mean"].double() * step[..., None]
        assert ((got - mean).abs() <= 0.51 * step[..., None] + 1e-5).all()
        rotated = rotated - got[..., None, :]
    largest = rotated.abs().amax(-2 if which == "key" else -1)
    wanted = (largest.log2() * 8 + 160).clamp(0, 255)
    assert ((scales["magnitude"].double() - wanted).abs() <= 0.51).all()
    scale = torch.exp2((scales["magnitude"].double() - 160) / 8)
    rotated = rotated / (scale[..., None, :] if which == "key" else scale[..., None]) * case.gains[SIDES.index(which)]
    centroids = case.centroids[SIDES.index(which)].double().cpu()[0]
    parts = rotated.unflatten(-1, (layout.num_subspaces, -1))  # (H, P, M, d/M)
    distance = (parts[..., None, :] - centroids).square().sum(-1)
    chosen = distance.gather(-1, codes.long()[..., None])[..., 0]
    assert float((chosen - distance.amin(-1)).max()) < 2e-5
