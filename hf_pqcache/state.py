"""What the kernels address of one cache on one device: counters, tables, addresses; knows no transformers."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_pqcache.pool import LayerView, PageTable

#: Columns of a layer's row in the descriptor: what a kernel reads rather than is told, so that a captured graph keeps
#: working when another cache of the same shape takes over the same state, and when a layer learns its centroids.
DESC_KEY_PAGES, DESC_VALUE_PAGES, DESC_KEY_BOOK, DESC_VALUE_BOOK, DESC_WINDOW_KEYS, DESC_WINDOW_VALUES = range(6)
DESC_TICKETS, DESC_RECENT_TOKENS, DESC_COLUMNS = 6, 7, 8

_NEVER = 1 << 30  # recent tokens of a layer without centroids: nothing leaves its window

#: flags[0] bits that a kernel raises when it could not store a token, read by the host between steps.
FLAG_PAGES_EXHAUSTED = 1

_IDLE: dict[Hashable, list[dict[str, Tensor]]] = defaultdict(list)
_STATES: weakref.WeakValueDictionary[int, DeviceState] = weakref.WeakValueDictionary()


def descriptor_row(view: LayerView, books: Sequence[Tensor] = ()) -> list[int]:
    """The 8 numbers that kernels read of a layer. books: its key book, value book and tickets, if it has kernels."""
    row = [0] * DESC_COLUMNS
    row[DESC_KEY_PAGES], row[DESC_VALUE_PAGES] = view.key_pages.data_ptr(), view.value_pages.data_ptr()
    row[DESC_WINDOW_KEYS], row[DESC_WINDOW_VALUES] = view.window_keys.data_ptr(), view.window_values.data_ptr()
    if books:
        row[DESC_KEY_BOOK], row[DESC_VALUE_BOOK], row[DESC_TICKETS] = (book.data_ptr() for book in books)
    row[DESC_RECENT_TOKENS] = view.config.extended_residual if view.is_coded else _NEVER
    return row


def _retire(key: Hashable, tensors: dict[str, Tensor]) -> None:
    _IDLE[key].append(tensors)


class DeviceState:
    """Tensors with stable addresses, shared by the layers of a cache that live on one device.

    The tensors of a cache that is gone are taken over by the next one of the same shape, so that compiled code and
    captured CUDA graphs serve both.

    Attributes:
        counts: int32 (num_layers, batch, 2), tokens of each row in each layer, and how many of them are codes.
        starts: int32 (batch), left padding of each row.
        page_table: int32 (batch, width), -1 where unused.
        desc: int64 (num_layers, 8), addresses; also the key by which ops find this state.
        flags: int32 (4).
        views: what each compressed layer of this device holds.
        choices: the engine chosen for attention, and why, of each (layer, query heads per KV head) seen.
        calls: how often an (operation, engine) ran from the host; replays of a captured graph do not pass here.
    """

    def __init__(self, num_layers: int, batch: int, width: int, device: torch.device, shape: Hashable = None) -> None:
        """`shape` is what else a captured graph has fixed: only a state of an equal one is taken over."""
        key = (num_layers, batch, width, str(device), shape)
        if _IDLE[key]:
            tensors = _IDLE[key].pop()
        else:
            # Normal tensors even under inference_mode: a later run outside of it must be able to write them.
            with torch.inference_mode(False):
                tensors = {
                    "counts": torch.zeros(num_layers, batch, 2, dtype=torch.int32, device=device),
                    "starts": torch.zeros(batch, dtype=torch.int32, device=device),
                    "page_table": torch.full((batch, width), -1, dtype=torch.int32, device=device),
                    "desc": torch.zeros(num_layers, DESC_COLUMNS, dtype=torch.int64, device=device),
                    "flags": torch.zeros(4, dtype=torch.int32, device=device),
                }
            for tensor in tensors.values():
                torch._dynamo.mark_static_address(tensor, guard=False)
        self.counts = tensors["counts"].zero_()
        self.starts = tensors["starts"].zero_()
        self.page_table = tensors["page_table"].fill_(-1)
        self.desc = tensors["desc"].zero_()
        self.flags = tensors["flags"].zero_()
        self.device = device
        self.views: dict[int, LayerView] = {}
        self.choices: dict[tuple[int, int], Any] = {}
        self.calls: Counter[tuple[str, str]] = Counter()
        self._table_version = -1
        _STATES[self.desc.data_ptr()] = self
        weakref.finalize(self, _retire, key, tensors)

    def add_view(self, layer: int, view: LayerView, books: Sequence[Tensor] = ()) -> None:
        """Register the storage of one layer and publish its row; `books` as in `descriptor_row`."""
        self.views[layer] = view
        self.desc[layer].copy_(torch.tensor(descriptor_row(view, books), dtype=torch.int64), non_blocking=True)

    def sync_table(self, table: PageTable) -> None:
        """Copy the page table to the device if it has changed since the last copy."""
        if self._table_version != table.version:
            self.page_table.copy_(table.to_tensor(self.page_table.shape[1]))
            self._table_version = table.version

    def set_starts(self, starts: list[int]) -> None:
        self.starts.copy_(torch.tensor(starts, dtype=torch.int32), non_blocking=True)


def state_of(desc: Tensor) -> DeviceState:
    """The state that `desc` belongs to; its address identifies it, so nothing is read from the device."""
    return _STATES[desc.data_ptr()]
