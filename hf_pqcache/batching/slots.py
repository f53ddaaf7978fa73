"""What the layers of a model store for the requests of a batching engine: blocks of pages, a window for each; no transformers.

A *block* holds one page of every layer, one after the other, so that a request needs one list of blocks for all layers. A
*slot* is a request's place in the exact windows. Pages, windows and what fills and reads them are those of `generate`: a
layer is a `LayerView` whose rows are slots.

Letters in shapes: L layers, S slots, H KV heads, d head_dim, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_pqcache.backends import cuda_backend, dispatch, store, torch_backend
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.codebook.normalise import EQUALISER_TOKENS
from hf_pqcache.config import PQConfig, Side
from hf_pqcache.pages.codec import CodedPages, ExactPages, PageCodec, max_page_id
from hf_pqcache.pages.device_state import PTR_COLUMNS, layer_row
from hf_pqcache.pages.layer_kv import LayerView
from hf_pqcache.pages.slabs import MAX_SLAB, PageStore, Slab


class BlockLists:
    """The host's side of the page tables: `rows[slot]` are the blocks of the request there. Stands for a `PageTable`."""

    def __init__(self, num_slots: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(num_slots)]


class SlotLayers:
    """Pages and windows of all layers; a request is a slot, a length, its coded tokens and its blocks.

    Args:
        config: page_size, sinks and window.
        book: codebook of all layers; None keeps exact tokens in pages.
        num_layers, num_heads, head_dim, dtype, device: of the model's keys and values.
        group: query heads for each KV head.
        num_slots: requests that may have a window at once. One more is made, where padded rows of a CUDA graph write.
        table_width: most blocks of a request.

    Attributes:
        windows: model dtype (L, 2, S + 1, H, sink_tokens + window_slots, d), keys then values.
        page_table: int32 (S + 1, table_width) on the device, the ids by which kernels find a slot's pages.
    """

    def __init__(
        self,
        config: PQConfig,
        book: Codebook | None,
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        group: int,
        dtype: torch.dtype,
        device: torch.device,
        num_slots: int,
        table_width: int,
    ) -> None:
        self.config, self.book, self.num_layers, self.num_slots = config, book, num_layers, num_slots
        slots = config.sink_tokens + config.window_slots
        like = torch.empty(num_heads, 1, head_dim, dtype=dtype, device=device)
        self._codecs = [_codecs(like, config.page_size, book) for _ in range(num_layers)]
        self._stores = [PageStore(key.spec, value.spec, device) for key, value in self._codecs]
        self.windows = torch.zeros(num_layers, 2, num_slots + 1, num_heads, slots, head_dim, dtype=dtype, device=device)
        self.page_table = torch.full((num_slots + 1, table_width), -1, dtype=torch.int32, device=device)
        self.lists = BlockLists(num_slots + 1)
        self.views: list[LayerView] = []
        self._group = group

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of one layer, keys and values."""
        return self._stores[0].page_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.page_bytes

    @property
    def window_token_bytes(self) -> int:
        """Bytes of one exact token of one slot, all layers."""
        layers, sides, _, heads, _, head_dim = self.windows.shape
        return layers * sides * heads * head_dim * self.windows.element_size()

    @property
    def max_id(self) -> int:
        """How many pages kernels can tell apart."""
        return max_page_id(self._codecs[0][0], self.config.page_size)

    def attach(self, memory: Tensor) -> None:
        """Let blocks lie in `memory`, uint8 (number of blocks, block_bytes), dense."""
        for layer, (key_codec, value_codec) in enumerate(self._codecs):
            pages, paged = memory[:, layer * self.page_bytes : (layer + 1) * self.page_bytes], self._stores[layer]
            for number, part in enumerate(pages.split(MAX_SLAB)):
                paged.add(number, Slab(*_sides(part, paged), part.nbytes))
            view = LayerView(
                config=self.config,
                key_codec=key_codec,
                value_codec=value_codec,
                window_keys=self.windows[layer, 0],
                window_values=self.windows[layer, 1],
                store=paged,
                page_table=self.page_table,
                table=self.lists,  # type: ignore[arg-type]
            )
            self.views.append(view)
        if self.backend.name != "torch":
            for view in self.views:
                view.kernels, view.bases = cuda_backend.prepare_layer(view), view.store.bases
        rows = torch.tensor([layer_row(view) for view in self.views], dtype=torch.int64)
        self.layer_ptrs = rows.view(self.num_layers, PTR_COLUMNS).to(self.windows.device)

    @property
    def backend(self) -> dispatch.Choice:
        """Which backend serves decode steps, and why."""
        view = self.views[0]
        dims, codes = (view.window_keys.shape[3], view.window_values.shape[3]), (view.key_codec.codes, view.value_codec.codes)
        return dispatch.select(dims, codes, self._group, view.window_keys.dtype, view.device)

    @property
    def is_equalised(self) -> bool:
        return all(view.is_equalised or not view.has_codes for view in self.views)

    def forget_equalisers(self) -> None:
        """To be called when no page is left: the next pages may be of other keys."""
        for view in self.views:
            view.is_equalised = False

    @property
    def equalisers(self) -> Tensor | None:
        """A copy of those of all layers on the host, float32 (L, H, d); None without codes, or before there are any."""
        codecs = [view.key_codec for view in self.views if view.is_equalised and isinstance(view.key_codec, CodedPages)]
        if len(codecs) < self.num_layers:
            return None
        return torch.stack([codec.equaliser for codec in codecs]).cpu()

    def equalise_as(self, equalisers: Tensor) -> None:
        """To be called while there is no page; `equalisers` as above."""
        for view, equaliser in zip(self.views, equalisers, strict=True):
            if isinstance(view.key_codec, CodedPages):
                view.key_codec.equaliser.copy_(equaliser)
                view.is_equalised = True

    def are_finite(self, blocks: Tensor) -> bool:
        """Whether blocks uint8 (n, block_bytes) that others have made decode to finite numbers."""
        pages = blocks.split(self.page_bytes, dim=1)
        return all(
            codec.are_finite(side)
            for own, codecs, paged in zip(pages, self._codecs, self._stores, strict=True)
            for side, codec in zip(_sides(own, paged), codecs, strict=True)
        )

    # -- one request -------------------------------------------------------------------------------------------------
    def coded_after(self, coded: int, length: int) -> int:
        """How many tokens of a request are in pages once it holds `length`, of which `coded` have been before.

        More than `PQConfig.coded_tokens` where it began with the pages of a prefix.
        """
        return max(coded, self.config.coded_tokens(length))

    def use_blocks(self, slot: int, blocks: Sequence[int]) -> None:
        """Tell which blocks a slot's request has; before `store`, `append` and `tokens`."""
        self.lists.rows[slot] = list(blocks)
        if self.views[0].kernels is not None and blocks:
            ids = torch.tensor(blocks, dtype=torch.int32) * self.num_layers
            self.page_table[slot, : len(blocks)].copy_(ids, non_blocking=True)

    def store(self, layer: int, slot: int, keys: Tensor, values: Tensor, length: int, coded: int) -> None:
        """Store new tokens keys, values (H, T, d) of a request that holds `length`, of which `coded` in pages."""
        view = self.views[layer]
        store.write_pages(view, slot, keys, values, length, coded)
        store.write_recent_window(view, slot, keys, values, length)

    def tokens(self, layer: int, which: Side, slot: int, length: int, coded: int) -> Tensor:
        """All `length` tokens of a request, exact or decoded -> (H, length, d)."""
        return torch_backend.row_tokens(self.views[layer], which, slot, length, coded)

    def equalise_by_window(self, slot: int, coded: int) -> None:
        """A page is about to be made of a window by a kernel, which cannot make an equaliser: make it of that page."""
        size = min(self.config.page_size, EQUALISER_TOKENS)
        first = self.config.sink_tokens + coded
        for view in self.views:
            if view.has_codes and not view.is_equalised:
                view.equalise(torch_backend.read_window(view, "key", slot, first, first + size))

    def copy_window(self, source: int, target: int) -> None:
        self.windows[:, :, target] = self.windows[:, :, source]

    def sinks(self, slot: int) -> Tensor:
        """A copy of a request's first tokens, (L, 2, H, sink_tokens, d)."""
        return self.windows[:, :, slot, :, : self.config.sink_tokens].clone()

    def write_sinks(self, slot: int, sinks: Tensor) -> None:
        self.windows[:, :, slot, :, : self.config.sink_tokens] = sinks

    @property
    def no_sinks(self) -> Tensor:
        """Of nobody, in the shape of `sinks`."""
        return torch.zeros_like(self.windows[:, :, 0, :, : self.config.sink_tokens])

    @property
    def nbytes(self) -> int:
        """Of windows and tables, without blocks."""
        tables: list[Any] = [self.windows, self.page_table, self.layer_ptrs]
        return sum(t.nbytes for t in tables)


def _sides(pages: Tensor, store: PageStore) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer's pages uint8 (n, page_bytes), as their codecs have them."""
    sides, at = [], 0
    for spec in (store.keys, store.values):
        side = pages[:, at : at + spec.nbytes]
        sides.append(side.view(spec.dtype).unflatten(1, spec.shape))
        at += spec.padded_nbytes
    return sides[0], sides[1]


def _codecs(like: Tensor, page_size: int, book: Codebook | None) -> tuple[PageCodec, PageCodec]:
    """For keys and for values like (H, T, d). Raises ValueError if the codebook does not cut them."""
    if book is None:
        return ExactPages.like(like, page_size), ExactPages.like(like, page_size)
    return CodedPages.like(like, "key", page_size, book), CodedPages.like(like, "value", page_size, book)
