"""The CUDA engine: chooses a kernel for a shape, prepares its tables, checks and launches; knows no transformers.

Storage is addressed through the descriptor (state.py), so a launch's arguments do not change when another cache takes
over the same state, and a captured CUDA graph serves both. Launches go to torch's current stream; nothing is read from
the device; scratch comes from torch's allocator.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from struct import Struct
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hf_pqcache import jit, layout
from hf_pqcache.errors import NoKernelError
from hf_pqcache.pool import LayerView

EngineName = Literal["tuned", "generic", "paged", "torch"]
MAX_GROUP, MAX_HEAD_DIM, MIN_CAPABILITY = 16, 256, (8, 0)

# The structs of kernels/page.cuh, as a 64-bit compiler lays them out.
_CACHE = "3Q6iI4x"
ATTEND_ARGS = Struct(f"<{_CACHE}6Q2q3iI4f")
APPEND_ARGS = Struct(f"<{_CACHE}3Q")
ENCODE_ARGS = Struct("<5Q3q6i")

_LOG2_E = 1.4426950408889634


def _inverse(divisor: int) -> int:
    """ceil(2**32 / divisor), 0 for 1: what `divide` of kernels/page.cuh multiplies with."""
    return -(-(1 << 32) // divisor) if divisor > 1 else 0


class Choice(NamedTuple):
    """Which engine serves a shape, and why."""

    name: EngineName
    reason: str


@dataclass(frozen=True)
class Geometry:
    """The sizes of one layer's storage that a launch needs; equal for all layers of most caches.

    window_slots counts the ring only, without sinks. num_subspaces and num_bits are 0 where pages hold the model's own
    numbers, (max_pages, kv_heads, page_size, head_dim).
    """

    head_dim: int
    num_subspaces: int
    num_bits: int
    kv_heads: int
    batch: int
    page_size: int
    sink_tokens: int
    window_slots: int
    table_width: int

    @classmethod
    def of(cls, view: LayerView) -> Geometry:
        batch, kv_heads, slots, head_dim = view.window_keys.shape
        config, has_codes = view.config, view.codec.needs_centroids
        return cls(
            head_dim=head_dim,
            num_subspaces=view.num_subspaces if has_codes else 0,
            num_bits=config.num_bits if has_codes else 0,
            kv_heads=kv_heads,
            batch=batch,
            page_size=config.page_size,
            sink_tokens=config.sink_tokens,
            window_slots=slots - config.sink_tokens,
            table_width=view.page_table.shape[1],
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.head_dim, self.num_subspaces, self.num_bits

    @property
    def max_tokens(self) -> int:
        """Most tokens that a row can hold."""
        return self.sink_tokens + self.window_slots + self.table_width * self.page_size

    @property
    def is_exact(self) -> bool:
        return self.num_subspaces == 0

    @cached_property
    def tail(self) -> tuple[int, ...]:
        """The integers at the end of CacheArgs."""
        return (
            self.batch,
            self.kv_heads,
            self.table_width,
            self.page_size,
            self.sink_tokens,
            self.window_slots,
            _inverse(self.page_size // layout.TILE_TOKENS),
        )


# -- choosing --------------------------------------------------------------------------------------------------------
class _Device(NamedTuple):
    capability: tuple[int, int]
    num_sms: int
    shared_bytes: int  # most that a block may ask for


@cache
def _device(index: int) -> _Device:
    p: Any = torch.cuda.get_device_properties(index)
    return _Device((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)


def _tuned_warps(rows: int, tokens: int, capability: tuple[int, int]) -> int:
    """Warps of a tuned kernel's block that has rows for so many heads and gets so many tokens.

    Sixteen hide more of the way to memory, which pays for four heads and long sequences; twelve have more registers each,
    are joined faster, and do as well elsewhere.
    """
    return 16 if rows == 4 and tokens > 4096 and capability >= (9, 0) else 12


def tuned_shared_bytes(units: int, width: int, bits: int, key_copies: int) -> int:
    """Shared memory of a tuned kernel; kernels/attend_tuned.cuh checks when compiled that it is enough."""
    table = (1 << bits) * 256
    keys = 2 * table + 128 if units == 64 and key_copies == 2 else table
    return 1024 + max(keys + table + 128, _join_bytes(16, units * width))


def _generic_shared_bytes(head_dim: int) -> int:
    return 256 * 24 + 4 * (16 * head_dim + 32 * (head_dim + 1) + 16 * 32 + 3 * 16) + 64


def _paged_warps(head_dim: int) -> int:
    """Warps of attend_paged.cu: as many as have registers for a tile of keys, one of values and the sums."""
    return 16 if head_dim <= 64 else 12 if head_dim <= 128 else 8


def _join_bytes(warps: int, wide: int) -> int:
    """join_bytes of kernels/softmax.cuh."""
    return warps * 8 * (wide + 2) * 4 + 256 + warps * 32 * 24


def _why_not_tuned(shape: tuple[int, int, int], available: int) -> str | None:
    source = jit.tuned_shapes().get(shape)
    if source is None:
        return "no tuned kernel for head_dim={}, M={}, num_bits={}".format(*shape)
    needed = tuned_shared_bytes(*jit.table_shape(source), key_copies=1)
    if needed > available:
        return f"the tuned kernel needs {needed} bytes of shared memory and the device gives a block {available}"
    return None


def _why_no_cuda(head_dim: int, value_dim: int, group: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the cache is on {device.type}"
    if (missing := jit.why_unavailable()) is not None:
        return missing
    if torch.version.cuda is None:
        return "torch is not built for CUDA"
    if (capability := _device(device.index or 0).capability) < MIN_CAPABILITY:
        return f"compute capability {capability} is below {MIN_CAPABILITY}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"kernels take float16 or bfloat16, the model is {dtype}"
    if not 1 <= group <= MAX_GROUP:
        return f"{group} query heads for each KV head are more than {MAX_GROUP}"
    if head_dim > MAX_HEAD_DIM or head_dim % 4:
        return f"head_dim={head_dim} is above {MAX_HEAD_DIM} or no multiple of 4"
    if value_dim != head_dim:
        return f"value_dim={value_dim} differs from head_dim={head_dim}"
    return None


@cache
def _select(
    shape: tuple[int, int, int], value_dim: int, group: int, dtype: torch.dtype, device: torch.device, forced: str
) -> Choice:
    if forced not in ("", "tuned", "generic", "torch"):
        raise ValueError(f"HF_PQCACHE_KERNEL={forced!r} is none of tuned, generic, torch")
    if forced == "torch":
        return Choice("torch", "forced by HF_PQCACHE_KERNEL")
    why = _why_no_cuda(shape[0], value_dim, group, dtype, device)
    if why is not None:
        if forced:
            raise NoKernelError(f"HF_PQCACHE_KERNEL={forced}, but {why}; unset it to use plain torch")
        return Choice("torch", why)
    why = _why_not_tuned(shape, _device(device.index or 0).shared_bytes)
    if forced == "generic":
        return Choice("generic", "forced by HF_PQCACHE_KERNEL")
    if why is None:
        return Choice("tuned", "forced by HF_PQCACHE_KERNEL" if forced else f"kernels/{jit.tuned_shapes()[shape]}")
    if forced == "tuned":
        raise NoKernelError(f"HF_PQCACHE_KERNEL=tuned, but {why}; unset it to use the generic kernel")
    return Choice("generic", why)


def select(
    head_dim: int,
    value_dim: int,
    num_subspaces: int,
    num_bits: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Choice:
    """The engine for a layer: tuned, else generic, else torch. HF_PQCACHE_KERNEL forces one.

    Raises NoKernelError (PQC002) if the forced one does not serve this shape.
    """
    forced = os.environ.get("HF_PQCACHE_KERNEL", "")
    return _select((head_dim, num_subspaces, num_bits), value_dim, group, dtype, device, forced)


def select_paged(head_dim: int, value_dim: int, group: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """The engine for a layer of exact pages: paged, else torch. HF_PQCACHE_KERNEL=torch forces the latter."""
    if os.environ.get("HF_PQCACHE_KERNEL", "") == "torch":
        return Choice("torch", "forced by HF_PQCACHE_KERNEL")
    why = _why_no_cuda(head_dim, value_dim, group, dtype, device)
    if why is None and head_dim % 8:
        why = f"head_dim={head_dim} is no multiple of 8"
    return Choice("paged", "kernels/attend_paged.cu") if why is None else Choice("torch", why)


# -- preparing -------------------------------------------------------------------------------------------------------
def _table_bytes(shape: tuple[int, int, int]) -> int:
    """Bytes of one head's table in a book; 0 for shapes without a tuned kernel."""
    source = jit.tuned_shapes().get(shape)
    return 0 if source is None else (1 << jit.table_shape(source)[2]) * 256


def _table(centroids: Tensor, units: int, width: int, bits: int) -> Tensor:
    """centroids (H, M, C, d/M) -> (H, 2**bits, 128) float16, the rows of 256 bytes that tuned kernels look up."""
    num_centroids = centroids.shape[2]
    split = centroids.shape[1] // units  # codes of a unit: two codes of 4 bits make one byte, the first in the low half
    index = torch.arange(1 << bits, device=centroids.device)
    parts = [centroids[:, i::split, index // num_centroids**i % num_centroids] for i in range(split)]
    rows = torch.cat(parts, dim=-1).transpose(1, 2)  # (H, 2**bits, units, numbers)
    rows = torch.nn.functional.pad(rows, (0, width - rows.shape[-1])).flatten(2)
    if rows.shape[-1] == 64:  # half a row: a second copy, 16 banks away from the first
        rows = torch.cat([rows, rows.roll(32, dims=-1)], dim=-1)
    return rows.half().contiguous()


def make_book(centroids: Tensor) -> Tensor:
    """centroids (H, M, C, d/M) -> uint8 book of the kernels: the tables of all heads, then the centroids as float16."""
    _, subspaces, num_centroids, width = centroids.shape
    plain = centroids.half().contiguous().view(torch.uint8).flatten()
    source = jit.tuned_shapes().get((subspaces * width, subspaces, num_centroids.bit_length() - 1))
    if source is None:
        return plain
    return torch.cat([_table(centroids, *jit.table_shape(source)).view(torch.uint8).flatten(), plain])


class Prepared(NamedTuple):
    """What kernels need of one layer beside its storage; to be kept alive while the descriptor has its addresses.

    tensors: key book, value book (uint8; empty for exact pages, and before a layer has centroids) and tickets (int32,
    zero): with them the blocks of a launch find out which of them is last; they are zero again after it. Columns 2, 3 and
    6 of desc.
    """

    geometry: Geometry
    tensors: tuple[Tensor, Tensor, Tensor]


def centroids_of(book: Tensor, shape: torch.Size) -> Tensor:
    """The centroids at the end of a book as float16 of `shape` (H, M, C, d/M); no copy."""
    return book[book.numel() - 2 * shape.numel() :].view(torch.float16).view(shape)


def prepare_layer(view: LayerView, books: tuple[Tensor, Tensor] | None = None) -> Prepared:
    """Prepare a layer for the kernels; again when its tensors are replaced or its centroids change.

    books: what `make_book` made of its key and its value centroids; made here if absent.
    """
    window = view.window_keys
    batch, kv_heads = window.shape[:2]
    tickets = torch.zeros(batch + 2 * batch * kv_heads, dtype=torch.int32, device=window.device)
    if not (view.is_coded and view.codec.needs_centroids):
        none = torch.empty(0, dtype=torch.uint8, device=window.device)
        return Prepared(Geometry.of(view), (none, none, tickets))
    key_book, value_book = books or (make_book(view.key_centroids), make_book(view.value_centroids))
    return Prepared(Geometry.of(view), (key_book, value_book, tickets))


# -- launching -------------------------------------------------------------------------------------------------------
class AttendPlan(NamedTuple):
    """A kernel and its launch: what depends on shapes only."""

    spec: jit.KernelSpec
    splits: int
    grid: tuple[int, int, int]
    partial_floats: int


def num_splits(blocks: int, tokens: int, slots: int, fixed_tokens: int = 1500) -> int:
    """Parts to cut each sequence into: the fewest that nearly minimize waves * (fixed + tokens of a part).

    blocks: thread blocks without splits. slots: thread blocks the device runs at once. fixed_tokens: what a block costs
    without tokens (tables, merging), in tokens; measured on an H200.
    """
    best, best_cost = 1, float("inf")
    for splits in range(1, max(1, min(slots, tokens // 64)) + 1):
        waves = -(-blocks * splits // slots)
        cost = waves * (fixed_tokens + tokens / splits) + 4 * splits
        if cost < best_cost * 0.99:
            best, best_cost = splits, cost
    return best


@lru_cache(maxsize=4096)
def attend_plan(
    geometry: Geometry, group: int, name: str, bf16: bool, mask: int, softcap: bool, max_tokens: int, device: _Device
) -> AttendPlan:
    """The launch for sequences of at most max_tokens. mask: 0 none, 1 bool, 2 additive."""
    defines = {"PQ_BF16": int(bf16), "PQ_MASK": mask, "PQ_SOFTCAP": int(softcap)}
    blocks = geometry.batch * geometry.kv_heads
    if name == "tuned":
        source = jit.tuned_shapes()[geometry.shape]
        units, width, bits = jit.table_shape(source)
        blocks *= -(-group // 8)
        splits = num_splits(blocks, max_tokens, device.num_sms)
        # The second copy of the key table costs 1 us to load and pays where a block has many tiles.
        fits = tuned_shared_bytes(units, width, bits, 2) <= device.shared_bytes
        copies = 2 if fits and max_tokens > 1024 * splits else 1
        heads = min(-(-group // -(-group // 8)), 8)  # of one block
        rows = 2 if heads <= 2 else 4 if heads <= 4 else 8
        warps = _tuned_warps(rows, max_tokens // splits, device.capability)
        defines |= {"PQ_HEADS": rows, "PQ_KEY_COPIES": copies, "PQ_WARPS": warps}
        shared = tuned_shared_bytes(units, width, bits, copies)
        spec = jit.KernelSpec(source, "attend", warps * 32, shared, tuple(defines.items()), overlaps=True)
        row = units * width + 2
    elif name == "paged":
        head_dim, warps, wide = geometry.head_dim, _paged_warps(geometry.head_dim), -(-geometry.head_dim // 64) * 64
        defines |= {"PQ_DIM": head_dim, "PQ_WARPS": warps}
        spec = jit.KernelSpec(
            "attend_paged.cu", "attend", warps * 32, _join_bytes(warps, wide), tuple(defines.items()), overlaps=True
        )
        blocks *= -(-group // 8)
        splits = num_splits(blocks, max_tokens, device.num_sms, fixed_tokens=40000 // head_dim)
        row = wide + 2
    else:
        head_dim, num_subspaces, num_bits = geometry.shape
        defines |= {"PQ_DIM": head_dim, "PQ_SUBSPACES": num_subspaces, "PQ_BITS": num_bits}
        defines["PQ_TABLE_BYTES"] = _table_bytes(geometry.shape)
        shared = _generic_shared_bytes(head_dim)
        spec = jit.KernelSpec("attend_generic.cu", "attend", 256, shared, tuple(defines.items()))
        splits = num_splits(blocks, max_tokens, 4 * device.num_sms)
        row = head_dim + 2
    partial = geometry.batch * geometry.kv_heads * splits * group * row if splits > 1 else 0
    grid = (splits, blocks // geometry.kv_heads, geometry.kv_heads)
    return AttendPlan(spec, splits, grid, partial)


def attend_values(
    q: Tensor,
    out: Tensor,
    partial: Tensor | None,
    desc: Tensor,
    layer: int,
    counts: Tensor,
    starts: Tensor,
    page_table: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    geometry: Geometry,
    splits: int,
    scale: float,
    softcap: float,
) -> tuple[Any, ...]:
    """The values of ATTEND_ARGS."""
    group = q.shape[1] // geometry.kv_heads
    if mask is None:
        mask_values: tuple[int, ...] = (0, 0, 0, 0)
    else:
        row_stride = mask.stride(0) if mask.shape[0] > 1 else 0
        mask_values = (mask.data_ptr(), row_stride, mask.stride(3), mask.shape[3])
    scale_log2 = scale * _LOG2_E
    return (
        desc.data_ptr() + layer * desc.stride(0) * 8,
        counts.data_ptr(),
        page_table.data_ptr(),
        *geometry.tail,
        starts.data_ptr(),
        q.data_ptr(),
        out.data_ptr(),
        0 if partial is None else partial.data_ptr(),
        mask_values[0],
        0 if sinks is None else sinks.data_ptr(),
        mask_values[1],
        mask_values[2],
        mask_values[3],
        group,
        splits,
        _inverse(splits),
        scale_log2,
        1.0 / scale_log2,
        scale / softcap if softcap else 0.0,
        softcap / scale if softcap else 0.0,
    )


def _check_mask(mask: Tensor, q: Tensor) -> int:
    if mask.dim() != 4 or mask.shape[0] not in (1, q.shape[0]) or mask.shape[1] != 1 or mask.shape[2] != 1:
        raise ValueError(f"mask: expected ({q.shape[0]} or 1, 1, 1, n), got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return 1
    if mask.dtype != q.dtype:
        raise ValueError(f"mask: expected bool or {q.dtype}, got {mask.dtype}")
    return 2


def attend(
    q: Tensor,
    desc: Tensor,
    layer: int,
    counts: Tensor,
    starts: Tensor,
    page_table: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    geometry: Geometry,
    scale: float,
    softcap: float,
    max_tokens: int,
    name: str = "tuned",
) -> Tensor:
    """Attention of one query token per row over everything a layer holds: one launch.

    Args:
        q: (B, Hq, 1, d) float16 or bfloat16.
        desc: int64 (num_layers, 8), addresses; column 6 is the layer's tickets.
        counts: int32 (B, 2) of the layer, read on the device. starts: int32 (B). page_table: int32 (B, width).
        mask: None or (B or 1, 1, 1, n) of any strides, bool (True attends) or additive in q's dtype; column
            starts[r] + t is token t of row r, columns beyond n attend.
        sinks: None or (Hq) in q's dtype, logits that join the softmax and attend to nothing.
        scale: positive factor of the scores. softcap: 0, or the cap c of c * tanh(score / c).
        max_tokens: upper bound of row lengths that the host knows; fixes the launch, longer rows stay correct.
        name: "tuned" or "generic", as `select` says, or "paged" for exact pages.

    Returns:
        (B, 1, Hq, d) in q's dtype; zeros for a row that attends to nothing.
    """
    batch, heads, steps, head_dim = q.shape
    if steps != 1 or head_dim != geometry.head_dim or batch != geometry.batch or heads % geometry.kv_heads:
        raise ValueError(
            f"q: expected ({geometry.batch}, a multiple of {geometry.kv_heads}, 1, {geometry.head_dim}), got {tuple(q.shape)}"
        )
    mask_kind = 0 if mask is None else _check_mask(mask, q)
    if sinks is not None and (sinks.dtype != q.dtype or not sinks.is_contiguous()):
        sinks = sinks.to(q.dtype).contiguous()
    q = q.contiguous()
    index = q.device.index
    plan = attend_plan(
        geometry,
        heads // geometry.kv_heads,
        name,
        q.dtype == torch.bfloat16,
        mask_kind,
        softcap != 0.0,
        max_tokens,
        _device(index),
    )
    out = torch.empty((batch, 1, heads, head_dim), dtype=q.dtype, device=q.device)
    partial = torch.empty(plan.partial_floats, dtype=torch.float32, device=q.device) if plan.splits > 1 else None
    jit.load(plan.spec, index, ATTEND_ARGS).launch(
        plan.grid,
        torch._C._cuda_getCurrentRawStream(index),
        *attend_values(
            q,
            out,
            partial,
            desc,
            layer,
            counts,
            starts,
            page_table,
            mask,
            sinks,
            geometry,
            plan.splits,
            scale,
            softcap,
        ),
    )
    return out


class EncodePlan(NamedTuple):
    """An encoding kernel and the tokens that one of its blocks takes."""

    spec: jit.KernelSpec
    tokens: int


@cache
def encode_plan(shape: tuple[int, int, int], bf16: bool, source: str, is_aligned: bool = False) -> EncodePlan:
    """Plan of encode.cu or append.cu: as many warps as their centroid tables leave room for, eight at most."""
    head_dim, num_subspaces, num_bits = shape
    width = head_dim // num_subspaces
    table = (1 << num_bits) * (width + 1) * 4
    a_lane = 1 if source == "append.cu" else 8 if width <= 4 else 4 if width <= 8 else 2 if width <= 16 else 1
    tokens = 32 * a_lane
    warps = next(w for w in (8, 4, 2) if w * table + tokens * num_subspaces <= 96 * 1024 or w == 2)
    defines = {"PQ_BF16": int(bf16), "PQ_DIM": head_dim, "PQ_SUBSPACES": num_subspaces, "PQ_BITS": num_bits}
    defines |= {"PQ_TABLE_BYTES": _table_bytes(shape), "PQ_WARPS": warps, "PQ_VECTOR": int(is_aligned)}
    shared = warps * table + tokens * num_subspaces
    entry = source.removesuffix(".cu")
    spec = jit.KernelSpec(source, entry, warps * 32, shared, tuple(defines.items()), overlaps=source == "append.cu")
    return EncodePlan(spec, tokens)


def append_spec(shape: tuple[int, int, int], bf16: bool) -> jit.KernelSpec:
    """append.cu, or append_paged.cu for exact pages, where bits are copied as they are."""
    if shape[1]:
        return encode_plan(shape, bf16, "append.cu").spec
    return _copying_spec(shape[0])


@cache
def _copying_spec(head_dim: int) -> jit.KernelSpec:
    return jit.KernelSpec("append_paged.cu", "append", 256, 0, (("PQ_DIM", head_dim),), overlaps=True)


def append_values(
    k: Tensor,
    v: Tensor,
    desc: Tensor,
    layer: int,
    counts: Tensor,
    page_table: Tensor,
    flags: Tensor,
    geometry: Geometry,
) -> tuple[Any, ...]:
    """The values of APPEND_ARGS."""
    return (
        desc.data_ptr() + layer * desc.stride(0) * 8,
        counts.data_ptr(),
        page_table.data_ptr(),
        *geometry.tail,
        k.data_ptr(),
        v.data_ptr(),
        flags.data_ptr(),
    )


def append_grid(geometry: Geometry) -> tuple[int, int, int]:
    return geometry.batch * geometry.kv_heads * 2 * (-(-geometry.page_size // 32)), 1, 1


def append(
    k: Tensor,
    v: Tensor,
    desc: Tensor,
    layer: int,
    counts: Tensor,
    page_table: Tensor,
    flags: Tensor,
    geometry: Geometry,
) -> None:
    """Store one token's k and v (B, H, 1, d) of every row and advance counts (B, 2): one launch.

    When the window has become a page too long, that page is encoded into page_table[row, coded / page_size], or copied
    there if the geometry says exact pages. If there is no such page (-1, or the table is too narrow) the row stays as it
    was, counts included, and flags[0] |= 1.
    """
    expected = (geometry.batch, geometry.kv_heads, 1, geometry.head_dim)
    if tuple(k.shape) != expected or tuple(v.shape) != expected:
        raise ValueError(f"k, v: expected {expected}, got {tuple(k.shape)} and {tuple(v.shape)}")
    k, v = k.contiguous(), v.contiguous()
    index = k.device.index
    jit.load(append_spec(geometry.shape, k.dtype == torch.bfloat16), index, APPEND_ARGS).launch(
        append_grid(geometry),
        torch._C._cuda_getCurrentRawStream(index),
        *append_values(k, v, desc, layer, counts, page_table, flags, geometry),
    )


def encode_values(
    x: Tensor, pages: Tensor, book: Tensor, page_ids: Tensor, first_token: Tensor, kind: str, geometry: Geometry
) -> tuple[Any, ...]:
    """The values of ENCODE_ARGS."""
    return (
        x.data_ptr(),
        pages.data_ptr(),
        book.data_ptr() + geometry.kv_heads * _table_bytes(geometry.shape),
        page_ids.data_ptr(),
        first_token.data_ptr(),
        x.stride(0),
        x.stride(1),
        x.stride(2),
        x.shape[0],
        x.shape[1],
        x.shape[2],
        page_ids.shape[1],
        geometry.page_size,
        int(kind == "value"),
    )


def is_aligned(x: Tensor) -> bool:
    """Whether every vector of x (R, H, T, d) can be read 8 bytes at a time."""
    return x.data_ptr() % 8 == 0 and all(stride % 4 == 0 for stride in x.stride()[:3]) and x.shape[3] % 4 == 0


def encode_grid(geometry: Geometry, rows: int, pages_per_row: int, plan: EncodePlan) -> tuple[int, int, int]:
    return rows * geometry.kv_heads * -(-pages_per_row * geometry.page_size // plan.tokens), 1, 1


def encode(
    x: Tensor,
    pages: Tensor,
    book: Tensor,
    page_ids: Tensor,
    first_token: Tensor,
    order_kind: Literal["key", "value"],
    geometry: Geometry,
) -> None:
    """Encode whole pages of x: tokens first_token[r] + j * page_size .. of row r become page page_ids[r, j].

    No temporary memory. One launch.

    Args:
        x: (R, H, T, d) float16 or bfloat16 with a dense last dimension; R need not be the cache's batch.
        pages: uint8 (max_pages, H, bytes), written in page layout.
        book: what `prepare_layer` made of the centroids.
        page_ids: int32 (R, n) on x's device; -1 skips a page. All its tokens must lie in x.
        first_token: int32 (R) on x's device, indices into T.
    """
    if x.dim() != 4 or x.shape[1] != geometry.kv_heads or x.shape[3] != geometry.head_dim or x.stride(3) != 1:
        raise ValueError(
            f"x: expected (R, {geometry.kv_heads}, T, {geometry.head_dim}) with a dense last dimension, "
            f"got {tuple(x.shape)} of strides {x.stride()}"
        )
    for what, tensor, shape in (
        ("page_ids", page_ids, (x.shape[0], page_ids.shape[-1])),
        ("first_token", first_token, x.shape[:1]),
    ):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != tuple(shape) or not tensor.is_contiguous():
            raise ValueError(f"{what}: expected contiguous int32 {tuple(shape)}, got {tensor.dtype} {tuple(tensor.shape)}")
    if page_ids.numel() == 0:
        return
    index = x.device.index
    plan = encode_plan(geometry.shape, x.dtype == torch.bfloat16, "encode.cu", is_aligned(x))
    jit.load(plan.spec, index, ENCODE_ARGS).launch(
        encode_grid(geometry, x.shape[0], page_ids.shape[1], plan),
        torch._C._cuda_getCurrentRawStream(index),
        *encode_values(x, pages, book, page_ids, first_token, order_kind, geometry),
    )


def encode_pages(view: LayerView, which: Literal["key", "value"], x: Tensor, pages: Tensor) -> None:
    """Write x (H, n * page_size, d) as codes into the n pages of a prepared layer numbered in `pages` (n) int32."""
    prepared: Prepared = view.kernels
    store, book = (view.key_pages, prepared.tensors[0]) if which == "key" else (view.value_pages, prepared.tensors[1])
    first = torch.zeros(1, dtype=torch.int32, device=x.device)
    encode(x[None], store, book, pages[None], first, which, prepared.geometry)


def specs(shape: tuple[int, int, int], capability: tuple[int, int], shared_bytes: int) -> list[jit.KernelSpec]:
    """The kernels that a layer of (head_dim, M, num_bits) uses on such a device: to attend, to append, to encode."""
    device = _Device(capability, 132, shared_bytes)
    name = "tuned" if _why_not_tuned(shape, shared_bytes) is None else "generic"
    geometry = Geometry(*shape, kv_heads=8, batch=1, page_size=64, sink_tokens=4, window_slots=192, table_width=1000)
    attending = attend_plan(geometry, 4, name, False, 0, False, 4096, device).spec
    return [attending, *(encode_plan(shape, False, source).spec for source in ("append.cu", "encode.cu"))]
