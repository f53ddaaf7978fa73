"""Random layers, the float64 reference, and kernels run on the CPU; shared by the tests of the kernels."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_pqcache.backends import cuda_backend, jit, launch
from hf_pqcache.codebook import pq
from hf_pqcache.config import PQConfig
from hf_pqcache.pages import layout
from hf_pqcache.pages.codec import CODED, EXACT
from hf_pqcache.pages.device_state import layer_row
from hf_pqcache.pages.layer_kv import LayerView
from hf_pqcache.pages.slabs import PageSpec, PageStore, Slab

HERE = Path(__file__).parent
#: The shared memory and multiprocessors of the device that is emulated: an H200.
#: With one SM a plan splits nothing, so that its tokens are those of a block.
EMULATED = launch.Device((9, 0), 1, 232448)


STRUCTS = {
    cuda_backend.ATTEND_ARGS: "AttendArgs",
    cuda_backend.APPEND_ARGS: "AppendArgs",
    cuda_backend.ENCODE_ARGS: "EncodeArgs",
}


@dataclass
class Case:
    """A layer with random contents and all that a call of its kernels takes."""

    view: LayerView
    geometry: launch.Geometry
    desc: Tensor
    kept: tuple[Tensor, ...]  # books and tickets, addressed by desc

    @property
    def key_pages(self) -> Tensor:
        return self.view.store.slabs[0].keys

    @property
    def value_pages(self) -> Tensor:
        return self.view.store.slabs[0].values

    @property
    def tickets(self) -> Tensor:
        return self.kept[2]


def make_case(
    head_dim: int,
    num_subspaces: int,
    num_bits: int,
    lengths: list[int],
    kv_heads: int = 1,
    page_size: int = 64,
    sink_tokens: int = 4,
    recent: int = 24,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    extra_slots: int = 0,
    starts: list[int] | None = None,
    is_coded: bool = True,
) -> Case:
    """Rows of the given lengths; unused window slots, unused pages and table entries are poisoned.

    num_subspaces = num_bits = 0: pages of exact tokens. is_coded=False: a layer that has yet to learn its centroids, without
    pages; its rows must fit the recent window.
    """
    batch = len(lengths)
    codec = CODED if num_subspaces else EXACT
    config = PQConfig(
        num_subspaces=num_subspaces or 64,
        num_bits=num_bits or 8,
        page_size=page_size,
        sink_tokens=sink_tokens,
        extended_residual=recent,
    )
    pages_of = [config.coded_tokens(n) // page_size for n in lengths]
    assert is_coded or not any(pages_of)
    max_pages = sum(pages_of) + 2
    width = max(pages_of) + 2
    order = torch.randperm(max_pages)
    table = torch.full((batch, width), -1, dtype=torch.int32)
    used = 0
    for row, n in enumerate(pages_of):
        table[row, :n] = order[used : used + n]
        used += n
    page_bytes = page_size * num_subspaces * num_bits // 8

    def pages() -> Tensor:
        if not is_coded:
            return torch.empty(0, dtype=torch.uint8)
        if codec is EXACT:
            pool = torch.full((max_pages, kv_heads, page_size, head_dim), float("nan"), dtype=dtype)
            pool[order[:used]] = torch.randn(used, kv_heads, page_size, head_dim).to(dtype)
            return pool
        return torch.randint(0, 256, (max_pages, kv_heads, page_bytes), dtype=torch.uint8)

    def centroids() -> Tensor:
        if codec is EXACT or not is_coded:
            return torch.empty(0)
        return torch.randn(kv_heads, num_subspaces, 1 << num_bits, head_dim // num_subspaces).half()

    slots = config.window_slots + extra_slots
    windows = []
    for _ in range(2):
        window = torch.full((batch, kv_heads, sink_tokens + slots, head_dim), float("nan"), dtype=dtype)
        for row, n in enumerate(lengths):
            held = window_tokens(config, n, slots)
            window[row, :, [slot for slot, _ in held]] = torch.randn(kv_heads, len(held), head_dim).to(dtype)
        windows.append(window)
    sides = [pages().to(device) for _ in range(2)]
    store = PageStore(*[PageSpec(tuple(side.shape[1:]), side.dtype) for side in sides], torch.device(device))
    store.add(0, Slab(*sides, 0))  # ids in the page table are the numbers of pages in this one slab
    view = LayerView(
        config=config,
        num_subspaces=num_subspaces,
        pages=store,
        key_centroids=centroids().to(device),
        value_centroids=centroids().to(device),
        window_keys=windows[0].to(device),
        window_values=windows[1].to(device),
        seq_lens=torch.tensor([[n, config.coded_tokens(n)] for n in lengths], dtype=torch.int32, device=device),
        left_pad=torch.tensor(starts or [0] * batch, dtype=torch.int32, device=device),
        page_table=table.to(device),
        is_coded=is_coded,
        codec=codec,
    )
    geometry, kept = cuda_backend.prepare_layer(view)
    desc = torch.zeros(2, 8, dtype=torch.int64)
    desc[1] = torch.tensor(layer_row(view, kept))  # layer 1 of 2: layer 0 must not be read
    return Case(view, geometry, desc.to(device), kept)


def window_tokens(config: PQConfig, length: int, slots: int) -> list[tuple[int, int]]:
    """(slot, token) of everything that a row's window holds."""
    sinks, coded = config.sink_tokens, config.coded_tokens(length)
    held = [(t, t) for t in range(min(length, sinks))]
    return held + [(sinks + (t - sinks) % slots, t) for t in range(sinks + coded, length)]


def exact(case: Case, row: int, which: str) -> Tensor:
    """All keys or values of a row in float64: (H, length, d), on the CPU."""
    view, length = case.view, int(case.view.lengths[row])
    config = view.config
    pages, centroids, window = (
        (case.key_pages, view.key_centroids, view.window_keys)
        if which == "key"
        else (case.value_pages, view.value_centroids, view.window_values)
    )
    out = torch.zeros(window.shape[1], length, window.shape[3], dtype=torch.float64)
    for slot, token in window_tokens(config, length, view.window_slots):
        out[:, token] = window[row, :, slot].double().cpu()
    coded = config.coded_tokens(length)
    if not coded:
        return out
    ids = view.page_table[row, : coded // config.page_size].long()
    if case.geometry.is_exact:
        decoded = pages[ids].transpose(0, 1).flatten(1, 2).double().cpu()
    else:
        order_of = layout.key_order if which == "key" else layout.value_order
        order = order_of(config.page_size, view.num_subspaces, config.num_bits)
        codes = layout.unpack_pages(pages[ids].cpu(), order, view.num_subspaces, config.num_bits)
        decoded = pq.decode(codes.transpose(0, 1).flatten(1, 2), centroids.cpu(), dtype=torch.float64)
    out[:, config.sink_tokens : config.sink_tokens + coded] = decoded
    return out


def reference(case: Case, q: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Attention in float64, (B, 1, Hq, d) on the CPU."""
    batch, heads, _, head_dim = q.shape
    kv_heads = case.geometry.kv_heads
    out = torch.zeros(batch, 1, heads, head_dim, dtype=torch.float64)
    for row in range(batch):
        keys, values = exact(case, row, "key"), exact(case, row, "value")
        length, start = keys.shape[1], int(case.view.left_pad[row])
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
def _library(spec: jit.KernelSpec, struct: str) -> Any:
    """The emulated kernel as a shared library; built once for a spec and a state of the sources."""
    sources = "".join(p.read_text() for p in sorted(HERE.glob("emulator.*")))
    key = hashlib.sha256(f"{spec}{jit.sources_digest()}{sources}".encode()).hexdigest()[:20]
    target = Path(tempfile.gettempdir()) / "hf_pqcache_emulator" / f"{key}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}-{id(spec)}")
        command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{HERE}", f"-I{jit.SOURCES}", *spec.options]
        command += [f'-DPQ_SOURCE="{spec.source}"', f"-DPQ_ARGS={struct}", f"-DPQ_ENTRY={spec.entry}"]
        subprocess.run([*command, "-o", str(partial), str(HERE / "emulator.cpp")], check=True)
        partial.rename(target)
    library = ctypes.CDLL(str(target))
    library.emulate.restype = ctypes.c_double
    return library


def emulate(spec: jit.KernelSpec, struct: str, layout_: Any, grid: tuple[int, int, int], values: tuple[Any, ...]) -> float:
    """Run a kernel on the CPU. Returns the shared-memory wavefronts for each conflict-free one of the look-ups."""
    packed = layout_.pack(*values)
    result = _library(spec, struct).emulate(packed, len(packed), *grid, spec.threads, spec.shared_bytes)
    if result < 0:
        raise RuntimeError({-1: "the struct's size differs", -2: "threads wait for each other forever"}[int(result)])
    return float(result)


def attend_emulated(
    case: Case,
    q: Tensor,
    name: str,
    splits: int,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 0.1,
    softcap: float = 0.0,
    planned_tokens: int = 2048,
) -> tuple[Tensor, float]:
    """(output, wavefronts for each look-up) of an attention kernel run on the CPU; output and scratch are poisoned.

    planned_tokens: what a block is planned for, whatever it gets: the plan chooses its warps and how codes come.
    """
    geometry = case.geometry
    group = q.shape[1] // geometry.kv_heads
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2
    plan = launch.attend_plan(geometry, group, name, q.dtype == torch.bfloat16, kind, softcap != 0, planned_tokens, EMULATED)
    out = torch.full((q.shape[0], 1, q.shape[1], q.shape[3]), float("nan"), dtype=q.dtype)
    rows = q.shape[0] * geometry.kv_heads * splits * group
    partial = torch.full((rows * (2 * max(q.shape[3], 32) + 8),), float("nan"))
    values = cuda_backend.attend_values(
        q, out, partial, case.desc, 1, case.view.seq_lens, case.view.left_pad, case.view.page_table, mask, sinks,
        geometry, splits, scale, softcap,
    )  # fmt: skip
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
    spec = launch.append_spec(case.geometry.shape, k.dtype == torch.bfloat16)
    view = case.view
    values = cuda_backend.append_values(k, v, case.desc, 1, view.seq_lens, view.page_table, flags, case.geometry)
    emulate(spec, "AppendArgs", cuda_backend.APPEND_ARGS, launch.append_grid(case.geometry), values)


def encode_emulated(case: Case, x: Tensor, which: str, page_ids: Tensor, first_token: Tensor) -> None:
    """encode.cu on the CPU."""
    plan = launch.encode_plan(case.geometry.shape, x.dtype == torch.bfloat16, "encode.cu", cuda_backend.is_aligned(x))
    pages, book = (case.key_pages, case.kept[0]) if which == "key" else (case.value_pages, case.kept[1])
    values = cuda_backend.encode_values(x, pages.data_ptr(), book, page_ids, first_token, which, case.geometry)
    grid = launch.encode_grid(case.geometry, x.shape[0], page_ids.shape[1], plan)
    emulate(plan.spec, "EncodeArgs", cuda_backend.ENCODE_ARGS, grid, values)


def page_codes(case: Case, which: str, page: int) -> Tensor:
    """Codes of a page: (H, page_size, M) on the CPU."""
    view, config = case.view, case.view.config
    pages = case.key_pages if which == "key" else case.value_pages
    order_of = layout.key_order if which == "key" else layout.value_order
    order = order_of(config.page_size, view.num_subspaces, config.num_bits)
    return layout.unpack_pages(pages[page].cpu(), order, view.num_subspaces, config.num_bits)


def excess_distance(case: Case, which: str, page: int, x: Tensor) -> float:
    """How much farther than the nearest the chosen centroids of a page are from x (H, page_size, d), relative."""
    centroids = (case.view.key_centroids if which == "key" else case.view.value_centroids).double().cpu()
    parts = x.double().cpu().unflatten(-1, (centroids.shape[1], -1)).transpose(1, 2)  # (H, M, page_size, d/M)
    distance = (parts[:, :, :, None] - centroids[:, :, None]).square().sum(-1)
    chosen = page_codes(case, which, page).long().transpose(1, 2)[..., None]
    return float((distance.gather(-1, chosen)[..., 0] - distance.amin(-1)).max() / distance.max())
