"""What the layers of a cache store, and where: pages, exact windows, the tables of their devices; counts no token."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_pqcache.backends import dispatch, torch_backend
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.pages.block_pool import PageAllocator, PageTable
from hf_pqcache.pages.codec import CodedPages, ExactPages, PageCodec, max_page_id
from hf_pqcache.pages.device_state import DeviceState
from hf_pqcache.pages.layer_kv import LayerView
from hf_pqcache.pages.offload import Offload
from hf_pqcache.pages.slabs import PageStore
from hf_pqcache.storage.memory import out_of_memory_as_pqc004

#: Tokens that page tables have room for at first where nobody says how long sequences get.
DEFAULT_TOKENS = 32768
#: (numbers of a key, numbers of a value) -> codebook.
BookOf = Callable[[int, int], Codebook]


class Layers:
    """Everything that the layers of one cache own.

    Args:
        config: shape of the cache.
        num_layers: layers of the model, compressed or not.
        book_of: the codebook of a layer, by the numbers of a key and of a value; None where pages hold exact tokens.
        offload: whether pages lie in host memory, see offload.py.
        expected_tokens: of a sequence; memory is made for as many at first, and tables.
        max_positions: of the model; page tables have room for as many at first.

    Attributes:
        views: what each layer that has had tokens stores.
        stores: the pages of each layer.
        table: which pages each sequence has; the same in all layers.
        states: what the kernels of each device address.
        table_width: pages that a sequence has room for in the tables of devices; it doubles when one gets longer.
    """

    def __init__(
        self,
        config: PQConfig,
        num_layers: int,
        book_of: BookOf | None,
        offload: bool = False,
        expected_tokens: int | None = None,
        max_positions: int | None = None,
    ) -> None:
        self.config, self.num_layers, self.book_of = config, num_layers, book_of
        self.expected_tokens, self.max_positions = expected_tokens, max_positions
        self.allocator = PageAllocator(0 if expected_tokens is None else config.pages_of(expected_tokens))
        self.offload = Offload(self.allocator.references) if offload else None
        self._own(PageTable(self.allocator, 0, config.max_pages))
        self.table_width = config.fitting_pages(expected_tokens or max_positions or DEFAULT_TOKENS)
        self.stores: dict[int, PageStore] = {}
        self.states: dict[torch.device, DeviceState] = {}
        self.views: dict[int, LayerView] = {}
        self._before_append: Callable[[int, Sequence[int] | None], None] = lambda layer, lengths: None

    def _own(self, table: PageTable) -> None:
        self.table = table
        # Copies of a cache share pages: one that goes must leave its own to the others.
        weakref.finalize(self, table.allocator.forget, table).atexit = False

    def twin(self, written: Sequence[int]) -> Layers:
        """The same layers with windows and tables of their own; each sequence shares its first written[i] pages by count.

        Raises PagesExhaustedError, CacheOutOfMemoryError.
        """
        new = Layers(
            self.config, self.num_layers, self.book_of, self.offload is not None, self.expected_tokens, self.max_positions,
        )  # fmt: skip
        new.table_width = self.table_width
        if self.stores:
            new.allocator, new.offload, new.stores = self.allocator, self.offload, dict(self.stores)
            new._own(self.table.twin(written))
        else:
            new.table.rows = [[] for _ in self.table.rows]
        with out_of_memory_as_pqc004("a copy's own pages"):  # those that are promised but not yet written
            new.table.reserve([len(row) for row in self.table.rows])
        for layer, view in self.views.items():
            windows: dict[str, Any] = {"window_keys": view.window_keys.clone(), "window_values": view.window_values.clone()}
            new._add(layer, dataclasses.replace(view, **windows, key_codec=view.key_codec.twin(), table=new.table))
        return new

    def call_before_append(self, hook: Callable[[int, Sequence[int] | None], None]) -> None:
        """`hook` is called as `DeviceState.before_append` says."""
        self._before_append = hook
        for state in self.states.values():
            state.before_append = hook

    # -- sizes -------------------------------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        return len(self.table.rows)

    @property
    def max_tokens(self) -> int:
        """Most tokens that a sequence can hold before the tables of devices grow."""
        return self.config.sink_tokens + self.table_width * self.config.page_size + self.config.window_slots

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers together."""
        return sum(view.store.page_bytes for view in self.views.values())

    def state(self, layer: int) -> DeviceState:
        return self.states[self.views[layer].device]

    def device_position(self, layer: int) -> Tensor:
        """int32 () on the device: positions that `layer` has seen, compiled steps included."""
        state = self.state(layer)
        return state.seq_lens[layer, 0, 0] + state.left_pad[0] + state.ahead[layer]

    # -- opening a layer ---------------------------------------------------------------------------------------------
    @torch.inference_mode(False)
    def open(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Make room for a layer whose tokens are like keys, values (..., H, T, d), for all sequences there are.

        Raises CacheOutOfMemoryError, ValueError if the codebook does not cut such keys and values.
        """
        config, size = self.config, self.config.page_size
        slots = config.sink_tokens + config.window_slots
        with out_of_memory_as_pqc004("a layer's pages and window"):
            codecs: tuple[PageCodec, PageCodec] = (ExactPages.like(keys, size), ExactPages.like(values, size))
            if self.book_of is not None:
                book = self.book_of(keys.shape[-1], values.shape[-1])
                codecs = CodedPages.like(keys, "key", size, book), CodedPages.like(values, "value", size, book)
            if layer not in self.stores:
                self.stores[layer] = self._attached(self._new_store(*codecs, keys.device))
            view = LayerView(
                config=config,
                key_codec=codecs[0],
                value_codec=codecs[1],
                window_keys=keys.new_zeros(self.batch, keys.shape[-3], slots, keys.shape[-1]),
                window_values=values.new_zeros(self.batch, values.shape[-3], slots, values.shape[-1]),
                store=self.stores[layer],
                table=self.table,
            )
            self._add(layer, view)

    def _new_store(self, keys: PageCodec, values: PageCodec, device: torch.device) -> PageStore:
        max_id = max_page_id(keys, self.config.page_size)
        if self.offload is not None:
            return self.offload.new_store(keys.spec, values.spec, device, max_id)
        return PageStore(keys.spec, values.spec, device, max_id)

    def _attached(self, store: PageStore) -> PageStore:
        self.allocator.attach(store)
        return store

    # -- another dtype -------------------------------------------------------------------------------------------------
    @torch.inference_mode(False)
    def promote(self, layer: int, key_dtype: torch.dtype, value_dtype: torch.dtype) -> None:
        """Let a layer's windows and exact pages have other dtypes, which hold what they have without loss."""
        view = self.views[layer]
        with out_of_memory_as_pqc004("tokens of another dtype"):
            new = dataclasses.replace(
                view, window_keys=view.window_keys.to(key_dtype), window_values=view.window_values.to(value_dtype)
            )
            if not view.has_codes:
                size = self.config.page_size
                new.key_codec, new.value_codec = (ExactPages.like(w, size) for w in (new.window_keys, new.window_values))
                new.store = self._rewritten(self.stores[layer], self._new_store(new.key_codec, new.value_codec, view.device))
        if new.store is not view.store:
            if self.allocator.num_tables == 1:
                self.allocator.detach(self.stores[layer])
            self.stores[layer] = new.store
        vars(view).update(vars(new))
        state = self.state(layer)
        state.choices = {key: choice for key, choice in state.choices.items() if key[0] != layer}
        dispatch.publish(state, layer, view)

    def _rewritten(self, old: PageStore, new: PageStore) -> PageStore:
        """`new` with memory for all pages, and this cache's as `old` has them."""
        self._attached(new)
        pages = sorted({page for row in self.table.rows for page in row})
        for i in range(0, len(pages), torch_backend.PAGES_PER_CHUNK):
            chunk = pages[i : i + torch_backend.PAGES_PER_CHUNK]
            old.prefetch()
            sides = [old.read("key", chunk), old.read("value", chunk)]
            new.prefetch()
            new.write("key", chunk, sides[0].to(new.keys.dtype))
            new.write("value", chunk, sides[1].to(new.values.dtype))
            new.write_back(chunk)
        return new

    # -- other sequences -----------------------------------------------------------------------------------------------
    def stage_windows(self, indices: Sequence[int | None]) -> Callable[[], None]:
        """Read or make windows of which number i is a copy of indices[i], or empty; what is returned puts them into use.

        While the number of sequences stays, addresses do: graphs hold them.
        """
        if len(indices) != self.batch:
            return self._stage_new_windows(indices)
        moved = [(i, j) for i, j in enumerate(indices) if j is not None and i != j]
        staged: list[tuple[Tensor, Tensor, Tensor]] = []
        for view in self.views.values() if moved else ():
            targets, sources = torch.tensor(moved, device=view.device).unbind(1)
            staged += [(w, targets, w[sources]) for w in (view.window_keys, view.window_values)]

        def commit() -> None:
            for window, targets, rows in staged:
                window.index_copy_(0, targets, rows)

        return commit

    def _stage_new_windows(self, indices: Sequence[int | None]) -> Callable[[], None]:
        """Make windows and device counters for another number of sequences."""
        kept = [(i, j) for i, j in enumerate(indices) if j is not None]
        staged: dict[int, list[Tensor]] = {}
        with out_of_memory_as_pqc004("the exact windows"):
            for layer, view in self.views.items():
                staged[layer] = []
                for old in (view.window_keys, view.window_values):
                    window = old.new_zeros(len(indices), *old.shape[1:])
                    if kept:
                        targets, sources = torch.tensor(kept, device=old.device).unbind(1)
                        window.index_copy_(0, targets, old[sources])
                    staged[layer].append(window)
            states = self._new_states(len(indices), self.table_width)

        def commit() -> None:
            for layer, (keys, values) in staged.items():
                self.views[layer].window_keys, self.views[layer].window_values = keys, values
            self._use_states(states)

        return commit

    def widen_tables(self, pages: int) -> None:
        """Room for longer sequences: new tables, at least twice as wide, for which compiled code is compiled once more."""
        width = max(2 * self.table_width, pages)
        with out_of_memory_as_pqc004("longer page tables"):
            states = self._new_states(self.batch, width)
        self.table_width = width
        self._use_states(states)

    # -- telling the devices -------------------------------------------------------------------------------------------
    def sync_tables(self) -> None:
        for state in self.states.values():
            state.sync_table(self.table)

    def _add(self, layer: int, view: LayerView) -> None:
        """Register a layer with its device; lengths are yet to be published."""
        if view.device not in self.states:
            self.states[view.device] = self._new_state(self.batch, self.table_width, view)
        self._address(self.states[view.device], layer, view)
        self.views[layer] = view

    def _new_state(self, batch: int, width: int, view: LayerView) -> DeviceState:
        """The state of a device; its first layer stands for the shape of all."""
        pages = (view.key_codec.spec, view.value_codec.spec)  # with the config they say how tokens are coded
        shape = (self.config, pages, view.window_keys.shape[1:], view.window_values.shape[3], view.window_keys.dtype)
        state = DeviceState(self.num_layers, batch, width, view.device, shape)
        state.before_append = self._before_append
        return state

    def _new_states(self, batch: int, width: int) -> dict[torch.device, DeviceState]:
        first = {view.device: view for view in reversed(self.views.values())}
        return {device: self._new_state(batch, width, view) for device, view in first.items()}

    def _use_states(self, states: dict[torch.device, DeviceState]) -> None:
        """Address everything by new tensors; lengths are yet to be published."""
        for device, state in states.items():
            state.choices, state.calls = self.states[device].choices, self.states[device].calls
        self.states = states
        for layer, view in self.views.items():
            self._address(states[view.device], layer, view)

    @staticmethod
    def _address(state: DeviceState, layer: int, view: LayerView) -> None:
        view.seq_lens, view.left_pad, view.page_table = state.seq_lens[layer], state.left_pad, state.page_table[layer]
        dispatch.publish(state, layer, view)
