"""The CUDA engine: prepares a layer's tables, checks what it is given and launches kernels; knows no transformers.

Storage is addressed through the descriptor (state.py), so a launch's arguments do not change when another cache takes
over the same state, and a captured CUDA graph serves both. Launches go to torch's current stream; nothing is read from
the device; scratch comes from torch's allocator.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hf_pqcache.backends import jit, launch
from hf_pqcache.backends.launch import Geometry
from hf_pqcache.pages.layer_kv import LayerView

# The structs of kernels/page.cuh, as a 64-bit compiler lays them out.
_CACHE = "3Q6iI4x"
ATTEND_ARGS = Struct(f"<{_CACHE}6Q2q3iI4f")
APPEND_ARGS = Struct(f"<{_CACHE}3Q")
ENCODE_ARGS = Struct("<5Q3q6i")

_LOG2_E = 1.4426950408889634


# -- preparing -------------------------------------------------------------------------------------------------------
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

    tensors: key book, value book (uint8; empty for exact pages, zeros before a layer has centroids) and tickets (int32,
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

    books: what `make_book` made of its key and its value centroids; made here if absent, of zeros before there are any.
    """
    window = view.window_keys
    batch, kv_heads = window.shape[:2]
    tickets = torch.zeros(batch + 2 * batch * kv_heads, dtype=torch.int32, device=window.device)
    geometry = Geometry.of(view)
    if geometry.is_exact:
        none = torch.empty(0, dtype=torch.uint8, device=window.device)
        return Prepared(geometry, (none, none, tickets))
    if books is None:
        sides = [view.key_centroids, view.value_centroids]
        if not view.is_coded:  # kernels copy their tables before they know that no token is coded
            shape = (kv_heads, view.num_subspaces, 1 << geometry.num_bits, geometry.head_dim // view.num_subspaces)
            sides = [torch.zeros(shape, dtype=torch.float16, device=window.device) for _ in sides]
        books = make_book(sides[0]), make_book(sides[1])
    return Prepared(geometry, (*books, tickets))


# -- launching -------------------------------------------------------------------------------------------------------
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
        launch.inverse(splits),
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
    plan = launch.attend_plan(
        geometry,
        heads // geometry.kv_heads,
        name,
        q.dtype == torch.bfloat16,
        mask_kind,
        softcap != 0.0,
        max_tokens,
        launch.device_of(index),
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
    jit.load(launch.append_spec(geometry.shape, k.dtype == torch.bfloat16), index, APPEND_ARGS).launch(
        launch.append_grid(geometry),
        torch._C._cuda_getCurrentRawStream(index),
        *append_values(k, v, desc, layer, counts, page_table, flags, geometry),
    )


def encode_values(
    x: Tensor, pages: int, book: Tensor, page_ids: Tensor, first_token: Tensor, kind: str, geometry: Geometry
) -> tuple[Any, ...]:
    """The values of ENCODE_ARGS."""
    return (
        x.data_ptr(),
        pages,
        book.data_ptr() + geometry.kv_heads * launch.table_bytes(geometry.shape),
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


def encode(
    x: Tensor,
    pages: int,
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
        pages: address of the page of id 0 of that side, uint8 (H, bytes), written in page layout.
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
    plan = launch.encode_plan(geometry.shape, x.dtype == torch.bfloat16, "encode.cu", is_aligned(x))
    jit.load(plan.spec, index, ENCODE_ARGS).launch(
        launch.encode_grid(geometry, x.shape[0], page_ids.shape[1], plan),
        torch._C._cuda_getCurrentRawStream(index),
        *encode_values(x, pages, book, page_ids, first_token, order_kind, geometry),
    )


def encode_pages(view: LayerView, which: Literal["key", "value"], x: Tensor, pages: Tensor) -> None:
    """Write x (H, n * page_size, d) as codes into the n pages of a prepared layer whose ids are in `pages` (n) int32."""
    prepared: Prepared = view.kernels
    side = 0 if which == "key" else 1
    first = torch.zeros(1, dtype=torch.int32, device=x.device)
    encode(x[None], view.bases[side], prepared.tensors[side], pages[None], first, which, prepared.geometry)
