"""What the kernels address of one cache on one device: counters, tables, addresses; knows no transformers."""

from __future__ import annotations

import struct
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_pqcache.pages.block_pool import PageTable
from hf_pqcache.pages.codec import CodedPages
from hf_pqcache.pages.layer_kv import LayerView

#: Columns of a layer's row of `layer_ptrs`: what a kernel reads rather than is told, so that a captured graph keeps
#: working when another cache of the same shape takes over the same state. kernels/page.cuh has it as `struct Layer`.
PTR_COLUMNS = 12

#: flags[0] bits that a kernel raises when it could not store a token, read by the host between steps.
FLAG_PAGES_EXHAUSTED = 1

_STATES: weakref.WeakValueDictionary[int, DeviceState] = weakref.WeakValueDictionary()


def layer_row(view: LayerView) -> list[int]:
    """The numbers that kernels read of a layer, `struct Layer` of kernels/page.cuh; 0 for what it has not."""
    coded = [codec for codec in (view.key_codec, view.value_codec) if isinstance(codec, CodedPages)]
    of_codes = [*(codec.centroids.data_ptr() for codec in coded), coded[0].equaliser.data_ptr()] if coded else [0, 0, 0]
    gains = struct.unpack("<q", struct.pack("<2f", *(codec.gain for codec in coded))) if coded else [0]
    windows = [view.window_keys.data_ptr(), view.window_values.data_ptr()]
    tickets = 0 if view.kernels is None else view.kernels.tickets.data_ptr()
    cells = (None, None) if view.kernels is None else view.kernels.cells
    of_cells = [0 if found is None else found.data_ptr() for found in cells]
    return [*view.store.bases, *of_codes, *windows, tickets, view.config.extended_residual, *gains, *of_cells]


class _IdleTensors:
    """Tensors of caches that are gone, for the next ones of the same shape; so many of them and no more."""

    MOST = 8

    def __init__(self) -> None:
        self._idle: deque[tuple[Hashable, dict[str, Tensor]]] = deque(maxlen=self.MOST)
        self._taking = threading.Lock()

    def put(self, key: Hashable, tensors: dict[str, Tensor]) -> None:
        """Waits for nobody: the garbage collector calls it, and may run in the middle of `take`."""
        self._idle.append((key, tensors))

    def take(self, key: Hashable) -> dict[str, Tensor] | None:
        """The last that were put under this key; None if there are none."""
        passed, found = [], None
        with self._taking:
            while self._idle and found is None:
                newest = self._idle.pop()
                if newest[0] == key:
                    found = newest[1]
                else:
                    passed.append(newest)
            self._idle.extend(reversed(passed))
        return found

    def __len__(self) -> int:
        return len(self._idle)


_IDLE = _IdleTensors()


class DeviceState:
    """Tensors with stable addresses, shared by the layers of a cache that live on one device.

    The tensors of a cache that is gone are taken over by the next one of the same shape, so that compiled code and
    captured CUDA graphs serve both.

    Attributes:
        seq_lens: int32 (num_layers, batch, 2), tokens of each row in each layer, and how many of them are in pages.
        left_pad: int32 (batch), left padding of each row.
        ahead: int32 (num_layers), how much further than its tokens a layer's positions are: its prompt was pruned.
        page_table: int32 (num_layers, batch, width), the ids by which each layer's kernels find the rows' pages; -1 where
            unused, and in layers without kernels.
        layer_ptrs: int64 (num_layers, PTR_COLUMNS), addresses; also the key by which ops find this state.
        flags: int32 (4).
        views: what each compressed layer of this device holds.
        choices: the backend chosen for attention, and why, of each (layer, query heads per KV head) seen.
        calls: how often an (operation, backend) ran from the host; replays of a captured graph do not pass here.
        before_append: called by the op with (layer, lengths or None) before it stores one more token of every row: the
            pages must be there.
    """

    def __init__(self, num_layers: int, batch: int, width: int, device: torch.device, shape: Hashable = None) -> None:
        """`shape` is what else a captured graph has fixed: only a state of an equal one is taken over."""
        key = (num_layers, batch, width, str(device), shape)
        tensors = _IDLE.take(key)
        if tensors is None:
            # Normal tensors even under inference_mode: a later run outside of it must be able to write them.
            with torch.inference_mode(False):
                tensors = {
                    "seq_lens": torch.zeros(num_layers, batch, 2, dtype=torch.int32, device=device),
                    "left_pad": torch.zeros(batch, dtype=torch.int32, device=device),
                    "ahead": torch.zeros(num_layers, dtype=torch.int32, device=device),
                    "page_table": torch.full((num_layers, batch, width), -1, dtype=torch.int32, device=device),
                    "layer_ptrs": torch.zeros(num_layers, PTR_COLUMNS, dtype=torch.int64, device=device),
                    "flags": torch.zeros(4, dtype=torch.int32, device=device),
                }
            for tensor in tensors.values():
                torch._dynamo.mark_static_address(tensor, guard=False)
        self.seq_lens = tensors["seq_lens"].zero_()
        self.left_pad = tensors["left_pad"].zero_()
        self.ahead = tensors["ahead"].zero_()
        self.page_table = tensors["page_table"].fill_(-1)
        self.layer_ptrs = tensors["layer_ptrs"].zero_()
        self.flags = tensors["flags"].zero_()
        self.device = device
        self.width = width
        self.views: dict[int, LayerView] = {}
        self.choices: dict[tuple[int, int], Any] = {}
        self.calls: Counter[tuple[str, str]] = Counter()
        self.before_append: Callable[[int, Sequence[int] | None], None] = lambda layer, lengths: None
        self._rows = [[0] * PTR_COLUMNS for _ in range(num_layers)]  # of layer_ptrs
        self._synced: Hashable = None
        self._columns = 0  # of the page table that are not all -1
        _STATES[self.layer_ptrs.data_ptr()] = self
        weakref.finalize(self, _IDLE.put, key, tensors)

    @property
    def nbytes(self) -> int:
        counters = (self.seq_lens, self.left_pad, self.ahead, self.flags)
        return sum(t.nbytes for t in (*counters, self.page_table, self.layer_ptrs))

    def add_view(self, layer: int, view: LayerView) -> None:
        """Register the storage of one layer and publish its row."""
        self.views[layer] = view
        self._synced = None
        self._publish_rows()

    def _publish_rows(self) -> None:
        """Bring addresses that have changed to the device, in one copy."""
        rows = [list(row) for row in self._rows]
        for layer, view in self.views.items():
            rows[layer] = layer_row(view)
            view.bases = view.store.bases
        if rows != self._rows:
            self._rows = rows
            self.layer_ptrs.copy_(torch.tensor(rows, dtype=torch.int64), non_blocking=True)

    def sync_table(self, table: PageTable) -> None:
        """Bring the page table, and where pages lie, to the device if either has changed since the last time."""
        version = (table.version, table.allocator.version)
        if version == self._synced:
            return
        self._synced = version
        read_by_kernels = {layer: view.store for layer, view in self.views.items() if view.kernels is not None}
        if not read_by_kernels:
            return
        self._publish_rows()
        used = max(map(len, table.rows), default=0)
        columns = max(self._columns, used)
        pages = table.to_array(columns)
        ids = np.full((self.page_table.shape[0], *pages.shape), -1, dtype=np.int32)
        for layer, store in read_by_kernels.items():
            ids[layer] = store.device_ids(pages)
        self.page_table[:, :, :columns].copy_(torch.from_numpy(ids))
        self._columns = used

    def set_left_pad(self, left_pad: Sequence[int]) -> None:
        self.left_pad.copy_(torch.tensor(left_pad, dtype=torch.int32), non_blocking=True)

    def set_ahead(self, ahead: Mapping[int, int]) -> None:
        """By layer; 0 for those that are not named."""
        numbers = [ahead.get(layer, 0) for layer in range(len(self.ahead))]
        self.ahead.copy_(torch.tensor(numbers, dtype=torch.int32), non_blocking=True)


def state_of(layer_ptrs: Tensor) -> DeviceState:
    """The state that `layer_ptrs` belong to; their address identifies it, so nothing is read from the device."""
    return _STATES[layer_ptrs.data_ptr()]
