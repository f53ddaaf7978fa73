"""How a CUDA kernel is compiled and launched for given sizes; touches no tensor, and does not choose the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from hf_pqcache.backends import jit
from hf_pqcache.pages import layout
from hf_pqcache.pages.layer_kv import LayerView


def inverse(divisor: int) -> int:
    """ceil(2**32 / divisor), 0 for 1: what `divide` of kernels/page.cuh multiplies with."""
    return -(-(1 << 32) // divisor) if divisor > 1 else 0


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
            inverse(self.page_size // layout.TILE_TOKENS),
        )


# -- the device and a block on it ------------------------------------------------------------------------------------
class Device(NamedTuple):
    capability: tuple[int, int]
    num_sms: int
    shared_bytes: int  # most that a block may ask for


@cache
def device_of(index: int) -> Device:
    p: Any = torch.cuda.get_device_properties(index)
    return Device((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)


def tuned_shared_bytes(units: int, width: int, bits: int, key_copies: int, staging_warps: int = 0) -> int:
    """Shared memory of a tuned kernel; kernels/attend_tuned.cuh checks when compiled that it is enough."""
    table = (1 << bits) * 256
    keys = 2 * table + 128 if units == 64 and key_copies == 2 else table
    stages = staging_warps * 2 * layout.TILE_TOKENS * units * bits // 8
    return 1024 + max(keys + table + 128, _join_bytes(16, units * width)) + stages


class TunedBlock(NamedTuple):
    """What a tuned kernel is compiled for: warps of a block, copies of the key table, codes by way of shared memory or not."""

    warps: int
    key_copies: int
    is_staged: bool
    shared_bytes: int


def _tuned_block(table_shape: tuple[int, int, int], rows: int, tokens: int, mask: int, device: Device) -> TunedBlock:
    """The block that has rows for so many heads and gets so many tokens; kernels/NOTES.md has the measurements.

    Sixteen warps hide more of the way to memory, which pays for four heads and fewer and long sequences; twelve have more
    registers each, are joined faster, and do as well elsewhere. Two heads need those registers, unless the codes are staged and
    leave theirs free and no mask has to be added.
    """
    units, width, bits = table_shape

    def shared_bytes(key_copies: int, staging_warps: int = 0) -> int:
        return tuned_shared_bytes(units, width, bits, key_copies, staging_warps)

    # The second copy of the key table costs 1 us to load and pays where a block has many tiles.
    key_copies = 2 if tokens > 1024 and shared_bytes(2) <= device.shared_bytes else 1
    is_long = tokens > 4096 and rows <= 4 and device.capability >= (9, 0)
    is_staged = is_long and units == 64 and bits == 8 and shared_bytes(key_copies, 16) <= device.shared_bytes
    has_registers = rows == 4 or (is_staged and mask != 2)
    warps = 16 if is_long and has_registers else 12
    return TunedBlock(warps, key_copies, is_staged, shared_bytes(key_copies, warps if is_staged else 0))


def _generic_shared_bytes(head_dim: int) -> int:
    return 256 * 24 + 4 * (16 * head_dim + 32 * (head_dim + 1) + 16 * 32 + 3 * 16) + 64


def _paged_warps(head_dim: int) -> int:
    """Warps of attend_paged.cu: as many as have registers for a tile of keys, one of values and the sums."""
    return 16 if head_dim <= 64 else 12 if head_dim <= 128 else 8


def _join_bytes(warps: int, wide: int) -> int:
    """join_bytes of kernels/softmax.cuh."""
    return warps * 8 * (wide + 2) * 4 + 256 + warps * 32 * 24


# -- launches --------------------------------------------------------------------------------------------------------
def table_bytes(shape: tuple[int, int, int]) -> int:
    """Bytes of one head's table in a book; 0 for shapes without a tuned kernel."""
    source = jit.tuned_shapes().get(shape)
    return 0 if source is None else (1 << jit.table_shape(source)[2]) * 256


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
    geometry: Geometry, group: int, name: str, bf16: bool, mask: int, softcap: bool, max_tokens: int, device: Device
) -> AttendPlan:
    """The launch for sequences of at most max_tokens. mask: 0 none, 1 bool, 2 additive."""
    defines = {"PQ_BF16": int(bf16), "PQ_MASK": mask, "PQ_SOFTCAP": int(softcap)}
    blocks = geometry.batch * geometry.kv_heads
    if name == "tuned":
        source = jit.tuned_shapes()[geometry.shape]
        table_shape = jit.table_shape(source)
        blocks *= -(-group // 8)
        splits = num_splits(blocks, max_tokens, device.num_sms)
        heads = min(-(-group // -(-group // 8)), 8)  # of one block
        rows = 2 if heads <= 2 else 4 if heads <= 4 else 8
        block = _tuned_block(table_shape, rows, max_tokens // splits, mask, device)
        defines |= {"PQ_HEADS": rows, "PQ_KEY_COPIES": block.key_copies, "PQ_WARPS": block.warps}
        defines["PQ_STAGED"] = int(block.is_staged)
        threads = block.warps * 32
        spec = jit.KernelSpec(source, "attend", threads, block.shared_bytes, tuple(defines.items()), overlaps=True)
        row = table_shape[0] * table_shape[1] + 2
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
        defines["PQ_TABLE_BYTES"] = table_bytes(geometry.shape)
        shared = _generic_shared_bytes(head_dim)
        spec = jit.KernelSpec("attend_generic.cu", "attend", 256, shared, tuple(defines.items()))
        splits = num_splits(blocks, max_tokens, 4 * device.num_sms)
        row = head_dim + 2
    partial = geometry.batch * geometry.kv_heads * splits * group * row if splits > 1 else 0
    grid = (splits, blocks // geometry.kv_heads, geometry.kv_heads)
    return AttendPlan(spec, splits, grid, partial)


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
    defines |= {"PQ_TABLE_BYTES": table_bytes(shape), "PQ_WARPS": warps, "PQ_VECTOR": int(is_aligned)}
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


def append_grid(geometry: Geometry) -> tuple[int, int, int]:
    return geometry.batch * geometry.kv_heads * 2 * (-(-geometry.page_size // 32)), 1, 1


def encode_grid(geometry: Geometry, rows: int, pages_per_row: int, plan: EncodePlan) -> tuple[int, int, int]:
    return rows * geometry.kv_heads * -(-pages_per_row * geometry.page_size // plan.tokens), 1, 1
