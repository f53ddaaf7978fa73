"""How a CUDA kernel is compiled and launched for given sizes; touches no tensor, and does not choose the kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import ceil
from typing import Any, NamedTuple

import torch

from hf_pqcache.backends import jit
from hf_pqcache.codebook.cells import CELLS, has_cells
from hf_pqcache.config import CodeShape
from hf_pqcache.pages import layout
from hf_pqcache.pages.layer_kv import LayerView


def inverse(divisor: int) -> int:
    """ceil(2**32 / divisor), 0 for 1: what `divide` of kernels/page.cuh multiplies with."""
    return -(-(1 << 32) // divisor) if divisor > 1 else 0


@dataclass(frozen=True)
class Geometry:
    """The sizes of one layer's storage that a launch needs; equal for all layers of most caches.

    batch: rows of the launch, which may be fewer than the layer has windows, or more.
    window_slots counts the ring only, without sinks. keys and values are None where pages hold the model's own numbers,
    (kv_heads, page_size, head_dim) a side. page_stride: bytes from the page of one id to that of the next.
    """

    head_dim: int
    keys: CodeShape | None
    values: CodeShape | None
    kv_heads: int
    batch: int
    page_size: int
    page_stride: int
    sink_tokens: int
    window_slots: int
    table_width: int

    @classmethod
    def of(cls, view: LayerView) -> Geometry:
        batch, kv_heads, slots, head_dim = view.window_keys.shape
        config = view.config
        return cls(
            head_dim=head_dim,
            keys=view.key_codec.codes,
            values=view.value_codec.codes,
            kv_heads=kv_heads,
            batch=batch,
            page_size=config.page_size,
            page_stride=view.store.page_bytes,
            sink_tokens=config.sink_tokens,
            window_slots=slots - config.sink_tokens,
            table_width=view.page_table.shape[1],
        )

    @lru_cache(maxsize=1024)  # noqa: B019 - as `tail`
    def of_batch(self, batch: int) -> Geometry:
        """The same for a launch of so many rows."""
        return replace(self, batch=batch)

    @property
    def max_tokens(self) -> int:
        """Most tokens that a row can hold."""
        return self.sink_tokens + self.window_slots + self.table_width * self.page_size

    @property
    def is_exact(self) -> bool:
        return self.keys is None

    @property
    def tiles_per_page(self) -> int:
        return self.page_size // layout.TILE_TOKENS

    @lru_cache(maxsize=64)  # noqa: B019 - few geometries, which are hashed anyway
    def tail(self, piece_tiles: int = 1) -> tuple[int, ...]:
        """The numbers of CacheArgs after its pointers."""
        return (
            self.page_stride,
            self.batch,
            self.kv_heads,
            self.table_width,
            self.page_size,
            self.sink_tokens,
            self.window_slots,
            inverse(self.tiles_per_page),
            inverse(self.tiles_per_page // piece_tiles),
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


class TableShape(NamedTuple):
    """How a side's codes are looked up, as `Table` of kernels/attend_warp.cuh: units of so many numbers, padded, and bits."""

    units: int
    width: int
    bits: int

    @classmethod
    def of(cls, head_dim: int, codes: CodeShape) -> TableShape:
        units, bits = layout.units_of(*codes)
        return cls(units, max(2, 1 << (head_dim // units - 1).bit_length()), bits)

    @property
    def steps(self) -> int:
        """Products of 16 numbers that a token takes."""
        return -(-self.units * self.width // 16)


_MAX_PIECE = 4


def coded_shared_bytes(geometry: Geometry, warps: int, piece: int) -> int:
    """Shared memory of attend_codes.cu, which checks when compiled that it is enough."""
    keys, values = (TableShape.of(geometry.head_dim, codes) for codes in _sides(geometry))
    centroids = sum(2 * geometry.head_dim // codes.num_subspaces << codes.num_bits for codes in _sides(geometry))
    warp = keys.steps * 64 + piece * 32 + 4 * geometry.head_dim
    used = (1 << max(keys.bits, values.bits)) * 256 + -(-keys.steps // 2) * 512 + 64 + centroids + warps * warp
    return 1024 + max(used, _join_bytes(warps, geometry.head_dim))


def _sides(geometry: Geometry) -> tuple[CodeShape, CodeShape]:
    if geometry.keys is None or geometry.values is None:
        raise ValueError("pages of exact tokens have no codes")
    return geometry.keys, geometry.values


class CodedBlock(NamedTuple):
    """What attend_codes.cu is compiled for: warps of a block, tiles of a page that a warp takes at a time, tiles of codes that
    it holds in registers."""

    warps: int
    piece: int
    held: int


def _coded_block(geometry: Geometry, tokens: int) -> CodedBlock:
    """The block that gets so many tokens; kernels/NOTES.md has the measurements.

    Twelve warps leave registers for two tiles of codes on their way. Eight, with a whole piece on its way, do as well for long
    codes in long sequences; long vectors take these registers for their sums.
    """
    sides = [TableShape.of(geometry.head_dim, codes) for codes in _sides(geometry)]
    words = sum(side.units * side.bits // 64 for side in sides)  # of a tile's codes in a lane
    has_long_vectors = max(side.steps for side in sides) > 8
    warps = 8 if has_long_vectors or (words > 12 and tokens > 1024) else 12
    piece = _piece_tiles(geometry, tokens, warps)
    held = 1 if has_long_vectors else piece if warps == 8 else 2 - piece % 2
    return CodedBlock(warps, piece, held)


def _piece_tiles(geometry: Geometry, tokens: int, warps: int) -> int:
    """Tiles of a page that a warp takes at a time, of a block with so many tokens: the fewest rounds of all its warps.

    A piece costs what one and a half tiles do before its first tile.
    """
    tiles = max(1, tokens // layout.TILE_TOKENS)
    choices = [n for n in range(1, _MAX_PIECE + 1) if geometry.tiles_per_page % n == 0]
    return min(choices, key=lambda n: (ceil(ceil(tiles / n) / warps) * (n + 1.5), n))


def _paged_warps(head_dim: int) -> int:
    """Warps of attend_paged.cu: as many as have registers for a tile of keys, one of values and the sums."""
    return 16 if head_dim <= 64 else 12 if head_dim <= 128 else 8


def _join_bytes(warps: int, head_dim: int) -> int:
    """Join::BYTES of kernels/softmax.cuh."""
    wide = -(-head_dim // 32) * 32
    return warps * 8 * (wide + 18) * 4 + 64 + max(warps * 32 * 24, 8 * wide * 4)


# -- launches --------------------------------------------------------------------------------------------------------
class AttendPlan(NamedTuple):
    """A kernel and its launch: what depends on shapes only."""

    spec: jit.KernelSpec
    splits: int
    piece_tiles: int
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


#: Splits whose parts the last block of a head has on their way at a time, as Join::merge_splits of kernels/softmax.cuh.
_JOINED_TOGETHER = 8


def _coded_splits(geometry: Geometry, blocks: int, group: int, tokens: int, slots: int) -> int:
    """`num_splits` for attend_codes.cu, or fewer where every warp still has one piece or one tile of the window.

    A sixteenth of the device is left for the next launch to begin on; where the heads of a block leave its threads no second
    team to join splits, they are joined at once.
    """
    most = num_splits(blocks, tokens, slots)
    fewer = [num_splits(blocks, tokens, slots - slots // 16)]
    if min(group, 8) * geometry.head_dim > 512 and tokens <= 2048:
        fewer.insert(0, _JOINED_TOGETHER)
    window_tiles = ceil((geometry.sink_tokens + geometry.window_slots) / layout.TILE_TOKENS)
    for splits in fewer:
        warps, piece, _ = _coded_block(geometry, tokens // splits)
        pieces = ceil(tokens / splits / layout.TILE_TOKENS / piece)
        if splits < most and pieces + ceil(window_tiles / splits) <= warps:
            return splits
    return most


@lru_cache(maxsize=4096)
def attend_plan(
    geometry: Geometry,
    group: int,
    bf16: bool,
    mask: int,
    softcap: bool,
    max_tokens: int,
    device: Device,
    has_slots: bool = False,
) -> AttendPlan:
    """The launch for sequences of at most max_tokens. mask: 0 none, 1 bool, 2 additive. has_slots: see `Place`."""
    head_dim, wide = geometry.head_dim, -(-geometry.head_dim // 32) * 32
    defines = {"PQ_BF16": int(bf16), "PQ_MASK": mask, "PQ_SOFTCAP": int(softcap), "PQ_DIM": head_dim}
    defines["PQ_SLOTS"] = int(has_slots)
    blocks = geometry.batch * geometry.kv_heads * -(-group // 8)
    if geometry.is_exact:
        warps, wide = _paged_warps(head_dim), -(-head_dim // 64) * 64
        source, shared = "attend_paged.cu", _join_bytes(warps, wide)
        splits, piece = num_splits(blocks, max_tokens, device.num_sms, fixed_tokens=40000 // head_dim), 1
    else:
        keys, values = _sides(geometry)
        source = "attend_codes.cu"
        defines |= {"PQ_KEY_M": keys.num_subspaces, "PQ_KEY_BITS": keys.num_bits}
        defines |= {"PQ_VALUE_M": values.num_subspaces, "PQ_VALUE_BITS": values.num_bits}
        splits = _coded_splits(geometry, blocks, group, max_tokens, device.num_sms)
        block = _coded_block(geometry, max_tokens // splits)
        warps, piece, shared = block.warps, block.piece, coded_shared_bytes(geometry, block.warps, block.piece)
        defines |= {"PQ_PIECE": piece, "PQ_HELD": block.held}
    defines["PQ_WARPS"] = warps
    spec = jit.KernelSpec(source, "attend", warps * 32, shared, tuple(defines.items()), overlaps=True)
    partial = geometry.batch * geometry.kv_heads * splits * group * (wide + 2) if splits > 1 else 0
    return AttendPlan(spec, splits, piece, (splits, blocks // geometry.kv_heads, geometry.kv_heads), partial)


ENCODE_WARPS = 8


def encode_shared_bytes(head_dim: int, *sides: CodeShape) -> int:
    """Shared memory of encode.cu and append.cu, which check when compiled that it is enough."""
    wide = -(-head_dim // 32) * 32

    def table(codes: CodeShape) -> int:
        number, width = 1 << codes.num_bits, head_dim // codes.num_subspaces
        return number * (width + 1) * 4 + number * width * 2 + (4 * CELLS**2 if has_cells(width, codes.num_bits) else 16)

    tokens = 64 * (head_dim + 1) * 4 + 32
    return max(map(table, sides)) + tokens + (3 * ENCODE_WARPS * wide + 2 * wide + ENCODE_WARPS) * 4


@cache
def encode_spec(head_dim: int, codes: CodeShape, is_value: bool, bf16: bool) -> jit.KernelSpec:
    """encode.cu for one side of a prompt."""
    defines = {"PQ_BF16": int(bf16), "PQ_DIM": head_dim, "PQ_M": codes.num_subspaces, "PQ_BITS": codes.num_bits}
    shared = encode_shared_bytes(head_dim, codes)
    return jit.KernelSpec("encode.cu", "encode", ENCODE_WARPS * 32, shared, (*defines.items(), ("PQ_VALUE", int(is_value))))


@cache
def append_spec(
    head_dim: int, keys: CodeShape | None, values: CodeShape | None, bf16: bool, has_slots: bool = False
) -> jit.KernelSpec:
    """append.cu, or append_paged.cu for exact pages, where bits are copied as they are."""
    defines = {"PQ_DIM": head_dim, "PQ_SLOTS": int(has_slots)}
    if keys is None or values is None:
        return jit.KernelSpec("append_paged.cu", "append", 256, _TEAM_BYTES, tuple(defines.items()), overlaps=True)
    defines |= {"PQ_BF16": int(bf16), "PQ_KEY_M": keys.num_subspaces, "PQ_KEY_BITS": keys.num_bits}
    defines |= {"PQ_VALUE_M": values.num_subspaces, "PQ_VALUE_BITS": values.num_bits}
    shared = _TEAM_BYTES + encode_shared_bytes(head_dim, keys, values)
    return jit.KernelSpec("append.cu", "append", ENCODE_WARPS * 32, shared, tuple(defines.items()), overlaps=True)


#: As kernels/append.cuh, of a team.
_TEAM_ROWS = 128
_TEAM_BYTES = (4 * _TEAM_ROWS + _TEAM_ROWS // 32) * 4 + 16

#: Blocks of an append, unless a page has more parts: two for each multiprocessor of an H100. More would wait for others to
#: leave them shared memory.
_MOST_APPEND_BLOCKS = 264


def append_grid(geometry: Geometry) -> tuple[int, int, int]:
    """(blocks of a team of rows, teams): a block for each part of a page of every row, as long as these are few."""
    teams = -(-geometry.batch // _TEAM_ROWS)
    parts = geometry.kv_heads * 2 * -(-geometry.tiles_per_page // 2)
    return min(geometry.batch * parts, max(_MOST_APPEND_BLOCKS // teams, parts)), teams, 1


def encode_grid(geometry: Geometry, rows: int, pages_per_row: int) -> tuple[int, int, int]:
    return rows * geometry.kv_heads * pages_per_row, 1, 1
