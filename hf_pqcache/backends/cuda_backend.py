"""The CUDA backend: checks what it is given and launches kernels; knows no transformers.

Storage is addressed through `layer_ptrs` (pages/device_state.py), so a launch's arguments do not change when another cache
takes over the same state, and a captured CUDA graph serves both. Launches go to torch's current stream; nothing is read from
the device; scratch comes from torch's allocator.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_pqcache.backends import jit, launch
from hf_pqcache.backends.launch import Geometry
from hf_pqcache.codebook.cells import cells, has_cells
from hf_pqcache.config import Side
from hf_pqcache.pages.codec import CodedPages, PageCodec
from hf_pqcache.pages.layer_kv import LayerView

# The structs of kernels/page.cuh, as a 64-bit compiler lays them out.
_CACHE = "4Qq6i2I"
ATTEND_ARGS = Struct(f"<{_CACHE}6Q2q3iI4f")
APPEND_ARGS = Struct(f"<{_CACHE}3Q")
ENCODE_ARGS = Struct("<7Q4q5if")

_LOG2_E = 1.4426950408889634


class Prepared(NamedTuple):
    """What kernels need of one layer beside its storage; to be kept alive while `layer_ptrs` has its address.

    tickets: int32, zero: with them the blocks of a launch find out which of them is last; zero again after it.
    cells: of keys and of values, see `cells`; None where codes are searched without.
    """

    geometry: Geometry
    tickets: Tensor
    cells: tuple[Tensor | None, Tensor | None]


def prepare_layer(view: LayerView, max_batch: int = 0) -> Prepared:
    """Prepare a layer for the kernels; again when its tensors are replaced.

    max_batch: rows of the largest launch, if they are more than the layer has windows.
    """
    windows, kv_heads = view.window_keys.shape[:2]
    tickets = torch.zeros(max(windows, max_batch) * (1 + 2 * kv_heads), dtype=torch.int32, device=view.device)
    return Prepared(Geometry.of(view), tickets, (cells_of(view.key_codec), cells_of(view.value_codec)))


def cells_of(codec: PageCodec) -> Tensor | None:
    """The cells by which kernels search the codec's centroids, if they do."""
    if not isinstance(codec, CodedPages) or not has_cells(codec.centroids.shape[2], codec.codes.num_bits):
        return None
    return cells(codec.centroids)


class Place(NamedTuple):
    """Where one layer's storage is: what every launch over it is told.

    Attributes:
        layer_ptrs: int64 (num_layers, columns), addresses, see pages/device_state.py. layer: its row of them.
        seq_lens: int32 (B, 2) of the layer, read on the device. left_pad: int32 (B). page_table: int32 (B, width).
        geometry: its batch is B, of this launch: `Geometry.of_batch`.
        slots: int32 (B), the window that each row has, read on the device; None where row r has window r.
    """

    layer_ptrs: Tensor
    layer: int
    seq_lens: Tensor
    left_pad: Tensor
    page_table: Tensor
    geometry: Geometry
    slots: Tensor | None = None

    def values(self, piece_tiles: int = 1) -> tuple[int, ...]:
        """The values of CacheArgs."""
        return (
            self.layer_ptrs.data_ptr() + self.layer * self.layer_ptrs.stride(0) * 8,
            self.seq_lens.data_ptr(),
            self.page_table.data_ptr(),
            0 if self.slots is None else self.slots.data_ptr(),
            *self.geometry.tail(piece_tiles),
        )

    def check(self) -> None:
        """Raises ValueError where slots are not those of the launch's rows."""
        slots, batch = self.slots, self.geometry.batch
        if slots is not None and (slots.dtype != torch.int32 or slots.shape != (batch,) or not slots.is_contiguous()):
            raise ValueError(f"slots: expected contiguous int32 ({batch},), got {slots.dtype} {tuple(slots.shape)}")


# -- launching -------------------------------------------------------------------------------------------------------
def attend_values(
    q: Tensor,
    out: Tensor,
    partial: Tensor | None,
    place: Place,
    mask: Tensor | None,
    sinks: Tensor | None,
    plan: launch.AttendPlan,
    scale: float,
    softcap: float,
) -> tuple[Any, ...]:
    """The values of ATTEND_ARGS."""
    group = q.shape[1] // place.geometry.kv_heads
    if mask is None:
        mask_values: tuple[int, ...] = (0, 0, 0, 0)
    else:
        row_stride = mask.stride(0) if mask.shape[0] > 1 else 0
        mask_values = (mask.data_ptr(), row_stride, mask.stride(3), mask.shape[3])
    scale_log2 = scale * _LOG2_E
    return (
        *place.values(plan.piece_tiles),
        place.left_pad.data_ptr(),
        q.data_ptr(),
        out.data_ptr(),
        0 if partial is None else partial.data_ptr(),
        mask_values[0],
        0 if sinks is None else sinks.data_ptr(),
        mask_values[1],
        mask_values[2],
        mask_values[3],
        group,
        plan.splits,
        launch.inverse(plan.splits),
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
    place: Place,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    max_tokens: int,
) -> Tensor:
    """Attention of one query token per row over everything a layer holds: one launch.

    Args:
        q: (B, Hq, 1, d) float16 or bfloat16.
        mask: None or (B or 1, 1, 1, n) of any strides, bool (True attends) or additive in q's dtype; column
            left_pad[r] + t is token t of row r, columns beyond n attend.
        sinks: None or (Hq) in q's dtype, logits that join the softmax and attend to nothing.
        scale: positive factor of the scores. softcap: 0, or the cap c of c * tanh(score / c).
        max_tokens: upper bound of row lengths that the host knows; fixes the launch, longer rows stay correct.

    Returns:
        (B, 1, Hq, d) in q's dtype; zeros for a row that attends to nothing.
    """
    geometry = place.geometry
    batch, heads, steps, head_dim = q.shape
    if steps != 1 or head_dim != geometry.head_dim or batch != geometry.batch or heads % geometry.kv_heads:
        raise ValueError(
            f"q: expected ({geometry.batch}, a multiple of {geometry.kv_heads}, 1, {geometry.head_dim}), got {tuple(q.shape)}"
        )
    place.check()
    mask_kind = 0 if mask is None else _check_mask(mask, q)
    if sinks is not None and (sinks.dtype != q.dtype or not sinks.is_contiguous()):
        sinks = sinks.to(q.dtype).contiguous()
    q = q.contiguous()
    index = q.device.index
    plan = launch.attend_plan(
        geometry,
        heads // geometry.kv_heads,
        q.dtype == torch.bfloat16,
        mask_kind,
        softcap != 0.0,
        max_tokens,
        launch.device_of(index),
        place.slots is not None,
    )
    out = torch.empty((batch, 1, heads, head_dim), dtype=q.dtype, device=q.device)
    partial = torch.empty(plan.partial_floats, dtype=torch.float32, device=q.device) if plan.splits > 1 else None
    jit.load(plan.spec, index, ATTEND_ARGS).launch(
        plan.grid,
        torch._C._cuda_getCurrentRawStream(index),
        *attend_values(q, out, partial, place, mask, sinks, plan, scale, softcap),
    )
    return out


def append_values(k: Tensor, v: Tensor, place: Place, flags: Tensor) -> tuple[Any, ...]:
    """The values of APPEND_ARGS."""
    return (*place.values(), k.data_ptr(), v.data_ptr(), flags.data_ptr())


def append(k: Tensor, v: Tensor, place: Place, flags: Tensor) -> None:
    """Store one token's k and v (B, H, 1, d) of every row and advance seq_lens (B, 2): one launch.

    When the window has become a page too long, that page is encoded into page_table[row, coded / page_size], or copied
    there if the geometry says exact pages. If there is no such page (-1, or the table is too narrow) the row stays as it
    was, seq_lens included, and flags[0] |= 1.
    """
    geometry = place.geometry
    expected = (geometry.batch, geometry.kv_heads, 1, geometry.head_dim)
    if tuple(k.shape) != expected or tuple(v.shape) != expected:
        raise ValueError(f"k, v: expected {expected}, got {tuple(k.shape)} and {tuple(v.shape)}")
    k, v = k.contiguous(), v.contiguous()
    index = k.device.index
    place.check()
    spec = launch.append_spec(
        geometry.head_dim, geometry.keys, geometry.values, k.dtype == torch.bfloat16, place.slots is not None
    )
    jit.load(spec, index, APPEND_ARGS).launch(
        launch.append_grid(geometry),
        torch._C._cuda_getCurrentRawStream(index),
        *append_values(k, v, place, flags),
    )


def encode_values(
    x: Tensor, pages: int, codec: CodedPages, page_ids: Tensor, first_token: Tensor, geometry: Geometry
) -> tuple[Any, ...]:
    """The values of ENCODE_ARGS."""
    found = cells_of(codec)
    return (
        x.data_ptr(),
        pages,
        codec.centroids.data_ptr(),
        0 if found is None else found.data_ptr(),
        codec.equaliser.data_ptr(),
        page_ids.data_ptr(),
        first_token.data_ptr(),
        x.stride(0),
        x.stride(1),
        x.stride(2),
        geometry.page_stride,
        x.shape[0],
        x.shape[1],
        x.shape[2],
        page_ids.shape[1],
        geometry.page_size,
        codec.gain,
    )


def encode(x: Tensor, pages: int, codec: CodedPages, page_ids: Tensor, first_token: Tensor, geometry: Geometry) -> None:
    """Encode whole pages of x: tokens first_token[r] + j * page_size .. of row r become page page_ids[r, j].

    No temporary memory. One launch.

    Args:
        x: (R, H, T, d) float16 or bfloat16 with a dense last dimension; R need not be the cache's batch.
        pages: address of the page of id 0 of that side; pages are written as `layout` says.
        codec: the side, its centroids float16 (1, C, d/M) contiguous.
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
    spec = launch.encode_spec(geometry.head_dim, codec.codes, codec.layout.which == "value", x.dtype == torch.bfloat16)
    jit.load(spec, index, ENCODE_ARGS).launch(
        launch.encode_grid(geometry, x.shape[0], page_ids.shape[1]),
        torch._C._cuda_getCurrentRawStream(index),
        *encode_values(x, pages, codec, page_ids, first_token, geometry),
    )


def encode_pages(view: LayerView, which: Side, x: Tensor, pages: Tensor) -> None:
    """Write x (H, n * page_size, d) as codes into the n pages of a prepared layer whose ids are in `pages` (n) int32."""
    codec, prepared = view.codec(which), view.kernels
    assert isinstance(codec, CodedPages)
    first = torch.zeros(1, dtype=torch.int32, device=x.device)
    encode(x[None], view.bases[which == "value"], codec, pages[None], first, prepared.geometry)
