"""What the layers of a cache own, pages, page table, windows and counts, and how it is made; stores no token itself."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_pqcache.backends import dispatch
from hf_pqcache.codebook import tensor_parallel
from hf_pqcache.codebook.codebook import Codebook, LayerCodebook
from hf_pqcache.config import PQConfig
from hf_pqcache.errors import CacheOutOfMemoryError, PagesExhaustedError
from hf_pqcache.pages.block_pool import LayerView, PageAllocator, PageTable
from hf_pqcache.pages.codec import CODED, PageCodec
from hf_pqcache.pages.device_state import FLAG_PAGES_EXHAUSTED, DeviceState
from hf_pqcache.pages.offload import Offload
from hf_pqcache.pages.slabs import PageStore

#: Tokens that page tables have room for at first where nobody says how long sequences get.
DEFAULT_TOKENS = 32768

Learner = Callable[[Tensor, Tensor, PQConfig], LayerCodebook]


@contextmanager
def out_of_memory_as_pqc004(what: str) -> Any:
    try:
        yield
    except RuntimeError as error:
        # The CPU and pinned memory have no error class of their own.
        says_so = any(words in str(error) for words in ("out of memory", "can't allocate memory"))
        if not says_so and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise CacheOutOfMemoryError(
            f"there is no memory left for {what}; use fewer bits or sequences, offload=True, or free memory. ({error})"
        ) from error


class Room:
    """Everything that the layers of one cache share; `Storage` fills it.

    Args:
        config: shape of the cache.
        codebook: centroids of every compressed layer, or None to learn them from the first tokens.
        num_layers: layers of the model, compressed or not.
        learner: makes the codebook of a layer from its keys and values (H, N, d); used without a codebook only.
        codec: what pages hold.
        tp_rank: this process's rank among those that share the KV heads; None asks torch.distributed if it matters.
        offload: whether pages lie in host memory, see offload.py.
        expected_tokens: of a sequence; memory is made for as many at first, and tables.
        max_positions: of the model; page tables have room for as many at first.
    """

    def __init__(
        self,
        config: PQConfig,
        codebook: Codebook | None,
        num_layers: int,
        learner: Learner,
        codec: PageCodec = CODED,
        tp_rank: int | None = None,
        offload: bool = False,
        expected_tokens: int | None = None,
        max_positions: int | None = None,
    ) -> None:
        self.config = config
        self.codebook = codebook
        self.num_layers = num_layers
        self.learner = learner
        self.codec = codec
        self.tp_rank = tp_rank
        self.expected_tokens, self.max_positions = expected_tokens, max_positions
        self.allocator = PageAllocator(0 if expected_tokens is None else config.pages_of(expected_tokens))
        self.offload = Offload(self.allocator.references) if offload else None
        self._own(PageTable(self.allocator, 0, config.max_pages))
        self._stores: dict[int, PageStore] = {}
        #: Pages that a row has room for in the tables of devices; it doubles when a row gets longer.
        self.table_width = config.fitting_pages(expected_tokens or max_positions or DEFAULT_TOKENS)
        self.starts: list[int] = []
        self.states: dict[torch.device, DeviceState] = {}
        self.views: dict[int, LayerView] = {}
        self._positions: dict[int, list[int]] = {}  # of each row in each layer, left padding included
        self.learned: dict[int, LayerCodebook] = {}
        self._reused: dict[int, list[int]] = {}  # each row's tokens before this one have lost their window slot
        self._padding_known = 0  # positions up to which left padding has been looked at
        self.are_rows_independent = False  # sequences that advance each by itself
        self.is_stale = False  # compiled steps advanced the device's lengths unseen by the host
        self._unread_steps = self._unread_appends = 0

    def _own(self, table: PageTable) -> None:
        self.table = table
        # Copies of a cache share pages: one that goes must leave its own to the others.
        weakref.finalize(self, table.clear).atexit = False

    # -- sizes ---------------------------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        return len(self.table.rows)

    @property
    def window_slots(self) -> int:
        """Slots of the exact window; without a codebook it holds all tokens needed to learn one."""
        if self.codebook is not None or not self.codec.needs_centroids:
            return self.config.window_slots
        return max(self.config.window_slots, self.learn_tokens + self.config.page_size)

    @property
    def learn_tokens(self) -> int:
        return self.config.learn_tokens or 4 * self.config.num_centroids

    @property
    def max_tokens(self) -> int:
        """Most tokens that a single row can hold before the tables of devices grow."""
        return self.config.sink_tokens + self.table_width * self.config.page_size + self.config.window_slots

    def tokens(self, layer: int) -> int:
        """Positions that `layer` has seen, left padding included; those of the longest row where rows differ."""
        return max(self.positions(layer), default=0)

    def positions(self, layer: int) -> list[int]:
        """Positions of each row in `layer`, left padding included."""
        if self.is_stale:
            self._refresh()
        return self._positions.get(layer) or [0] * self.batch

    def row_lengths(self, layer: int) -> list[int]:
        """Tokens that each row holds in `layer`."""
        return self._lengths_at(self.positions(layer))

    def _lengths_at(self, positions: Sequence[int]) -> list[int]:
        return [max(0, position - start) for position, start in zip(positions, self.starts, strict=True)]

    def state(self, layer: int) -> DeviceState:
        return self.states[self.views[layer].device]

    def device_position(self, layer: int) -> Tensor:
        """int32 () on the device: positions that `layer` has seen, compiled steps included."""
        state = self.state(layer)
        return state.counts[layer, 0, 0] + state.starts[0]

    def _refresh(self) -> None:
        """Read the lengths that compiled steps have advanced on the device."""
        self.is_stale, self._unread_steps, self._unread_appends = False, 0, 0
        flags = 0
        for state in self.states.values():
            counts, raised = state.counts.tolist(), int(state.flags[0])
            for layer in state.views:
                rows = zip(self._positions[layer], counts[layer], self.starts, strict=True)
                self._count(layer, [max(position, length + start) for position, (length, _), start in rows])
            if raised:
                state.flags.zero_()
                flags |= raised
        if flags & FLAG_PAGES_EXHAUSTED:
            raise PagesExhaustedError(
                "a compiled step found no reserved page for its tokens; they are lost. Call the cache's "
                "get_mask_sizes() before every step, as generate does"
            )

    def _count(self, layer: int, positions: list[int]) -> None:
        """Record on the host what each row holds in `layer`."""
        slots = self.views[layer].window_slots
        self._positions[layer] = positions
        self._reused[layer] = [
            max(old, length - slots) for old, length in zip(self._reused[layer], self._lengths_at(positions), strict=True)
        ]

    # -- memory ------------------------------------------------------------------------------------------------------
    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers together."""
        return sum(view.store.page_bytes for view in self.views.values() if view.is_coded)

    def _fixed_bytes(self) -> dict[str, int]:
        """What takes memory whatever number of tokens there is: exact windows, codebooks and tables."""
        windows = codebooks = 0
        for view in self.views.values():
            windows += view.window_keys.nbytes + view.window_values.nbytes
            # With kernels, a side's book holds its look-up table and its centroids.
            books = (view.key_centroids, view.value_centroids) if view.kernels is None else view.kernels.tensors
            codebooks += sum(book.nbytes for book in books)
        tables = sum(state.nbytes for state in self.states.values())
        return {"codebooks": codebooks, "window": windows, "tables": tables}

    def bytes_used(self) -> dict[str, int]:
        """Bytes that the cache's tokens need, by kind; `staging` is what the device holds of pages on the host."""
        pages = self.table.num_used * self.page_bytes
        staged = sum(view.store.staged_page_bytes for view in self.views.values() if view.is_coded)
        return {"pages": pages, "staging": self.table.num_used * staged, **self._fixed_bytes()}

    def bytes_reserved(self) -> dict[str, int]:
        """Bytes that are allocated, on devices and on the host."""
        stores = self._stores.values()
        device = sum(store.reserved_bytes for store in stores) + sum(self._fixed_bytes().values())
        return {"device": device, "host": sum(store.host_bytes for store in stores)}

    def bytes_fp16(self) -> int:
        """Bytes that an uncompressed cache of two bytes a number takes for the same tokens."""
        windows = {layer: (view.window_keys, view.window_values) for layer, view in self.views.items()}
        return 2 * sum(sum(self.row_lengths(i)) * sum(w.shape[1] * w.shape[3] for w in sides) for i, sides in windows.items())

    # -- making room ---------------------------------------------------------------------------------------------
    @torch.inference_mode(False)
    def open(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Allocate the storage of a layer whose tokens are like keys, values (..., H, T, d), for all rows there are.

        Raises CacheOutOfMemoryError, ValueError if the codebook was made for other shapes.
        """
        num_heads, key_dim, value_dim = keys.shape[-3], keys.shape[-1], values.shape[-1]
        batch, config, num_subspaces = self.batch, self.config, 0
        if self.codec.needs_centroids:
            num_subspaces = self.config.subspaces(key_dim, value_dim)
            config = config.replace(num_subspaces=num_subspaces)
        book = self._book(layer, num_heads)
        slots = self.config.sink_tokens + self.window_slots
        with out_of_memory_as_pqc004("the exact window"):
            window_keys = keys.new_zeros(batch, num_heads, slots, key_dim)
            window_values = values.new_zeros(batch, values.shape[-3], slots, value_dim)
            state = self._device_state(window_keys, window_values)
            view = LayerView(
                config=config,
                num_subspaces=num_subspaces,
                key_centroids=keys.new_empty(num_heads, 0, dtype=torch.float16),
                value_centroids=keys.new_empty(num_heads, 0, dtype=torch.float16),
                window_keys=window_keys,
                window_values=window_values,
                counts=state.counts[layer],
                starts=state.starts,
                page_table=state.page_table[layer],
                table=self.table,
                is_coded=False,
                codec=self.codec,
            )
            if book is not None or not self.codec.needs_centroids:
                self._give_pages(layer, view, book)
            dispatch.publish(state, layer, view)
        self.views[layer] = view
        state.sync_table(self.table)
        self._positions[layer], self._reused[layer] = [0] * batch, [0] * batch

    def check_rows_advance_together(self) -> None:
        """Raises ValueError in a cache whose rows are sequences that advance each by itself."""
        if self.are_rows_independent:
            raise ValueError(
                "the cache holds sequences made by allocate_sequence; use append_tokens, fork_sequence and crop_sequence "
                "for them, or reset() the cache before generate"
            )

    def _book(self, layer: int, num_heads: int) -> LayerCodebook | None:
        """The centroids of a layer's heads here, None where they are learnt or not needed. Raises ValueError without any."""
        if self.codebook is None:
            return None
        if layer not in self.codebook.layers:
            raise ValueError(
                f"the codebook has no centroids for layer {layer}, only for layers {sorted(self.codebook.layers)}; calibrate "
                "one for this model"
            )
        return tensor_parallel.local_part(self.codebook.layers[layer], num_heads, layer, self.tp_rank)

    def _device_state(self, window_keys: Tensor, window_values: Tensor) -> DeviceState:
        """The state of the device where the windows of a layer lie; the first layer there stands for the shape of all."""
        device = window_keys.device
        if device not in self.states:
            state = self._new_state(self.batch, window_keys, window_values)
            state.set_starts(self.starts)
            self.states[device] = state
        return self.states[device]

    def _new_state(self, batch: int, window_keys: Tensor, window_values: Tensor) -> DeviceState:
        shape = (self.config, type(self.codec), window_keys.shape[1:], window_values.shape[3], window_keys.dtype)
        state = DeviceState(self.num_layers, batch, self.table_width, window_keys.device, shape)
        own = weakref.WeakMethod(self._before_append)
        state.before_append = lambda layer, lengths: None if (call := own()) is None else call(layer, lengths)
        return state

    @torch.inference_mode(False)
    def _give_pages(self, layer: int, view: LayerView, book: LayerCodebook | None) -> None:
        """Let a layer write pages: memory for those there are and, where pages hold codes, its centroids."""
        if book is not None:
            self._check_book(layer, view, book)
        if layer not in self._stores:
            with out_of_memory_as_pqc004("pages"):
                self._stores[layer] = self._attached(self._new_store(view))
        view.pages = self._stores[layer]
        view.codebook, view.is_coded = book, True  # `publish` brings the centroids to the device

    def _new_store(self, view: LayerView) -> PageStore:
        windows = (view.window_keys, view.window_values)
        keys, values = (self.codec.spec(w, view.config, view.num_subspaces) for w in windows)
        num_heads, together = view.window_keys.shape[1], self.codec.tokens_together
        max_id = min((1 << 31) // num_heads, (1 << 32) // (num_heads * self.config.page_size // together))
        if self.offload is not None:
            return self.offload.new_store(keys, values, view.device, max_id)
        return PageStore(keys, values, view.device, max_id)

    def _attached(self, store: PageStore) -> PageStore:
        self.allocator.attach(store)
        return store

    def _check_book(self, layer: int, view: LayerView, book: LayerCodebook) -> None:
        for name, centroids, window in (
            ("key", book.keys, view.window_keys),
            ("value", book.values, view.window_values),
        ):
            num_heads, head_dim = window.shape[1], window.shape[3]
            expected = (num_heads, view.num_subspaces, self.config.num_centroids, head_dim // view.num_subspaces)
            if tuple(centroids.shape) != expected:
                raise ValueError(
                    f"layer {layer}: the codebook's {name} centroids have shape {tuple(centroids.shape)} but the model's "
                    f"{num_heads} KV heads of {head_dim} need {expected}; calibrate a codebook for this model"
                )

    def reserve(self, layer: int, tokens: int) -> None:
        """Own the pages that `tokens` positions of `layer` need, for every row or none.

        Raises PagesExhaustedError, CacheOutOfMemoryError.
        """
        self._reserve_rows(layer, [max(0, tokens - start) for start in self.starts])

    def _reserve_rows(self, layer: int, lengths: Sequence[int], *, may_widen: bool = True) -> None:
        """Own the pages that lengths[r] tokens of row r need in `layer`, for every row or none.

        A page that the row is about to write and shares with another becomes a copy of its own. That happens only if the
        row was copied while `layer` was behind others, which had written the page already.
        """
        view, size = self.views[layer], self.config.page_size
        counts = [view.coded_tokens(length) // size for length in lengths]
        if max(counts, default=0) > self.table_width:
            self.table.require(sum(self.table.missing(counts)))  # nothing changes, tables neither, where pages are short
            self._widen_tables(max(counts), may_widen)
        shared: list[tuple[int, int]] = []
        leaving: Counter[int] = Counter()
        for row, old in enumerate(self.row_lengths(layer)):
            pages = self.table.rows[row]
            for i in range(view.coded_tokens(old) // size, min(counts[row], len(pages))):
                if self.allocator.references(pages[i]) - leaving[pages[i]] > 1:
                    leaving[pages[i]] += 1
                    shared.append((row, i))
        sources = [self.table.rows[row][place] for row, place in shared]
        with out_of_memory_as_pqc004("more pages"):
            new = self.table.reserve(counts, shared)
        for other in self.views.values() if shared else ():
            if other.is_coded:
                other.store.prefetch()
                other.store.copy_pages(sources, new)
                other.store.write_back(new)
        self._sync_tables()

    def reserve_pages(self, row: int, count: int) -> None:
        """Own at least `count` pages for one row."""
        if count > self.table_width:
            self.table.require(count - len(self.table.rows[row]))
            self._widen_tables(count)
        with out_of_memory_as_pqc004("more pages"):
            self.table.reserve([count if r == row else 0 for r in range(self.batch)])
        self._sync_tables()

    def _owns(self, layer: int, tokens: int) -> bool:
        """Whether every row has the pages that `tokens` positions of `layer` need."""
        return self._rows_own(layer, self._lengths_at([tokens] * self.batch))

    def _rows_own(self, layer: int, lengths: Sequence[int]) -> bool:
        """Whether every row has the pages that lengths[r] tokens need in `layer`."""
        view, size = self.views[layer], self.config.page_size
        return all(view.coded_tokens(n) // size <= len(row) for n, row in zip(lengths, self.table.rows, strict=True))

    def _before_append(self, layer: int, lengths: Sequence[int] | None) -> None:
        """The op is about to store one more token of every row of `layer`, which then hold `lengths` (None: not read)."""
        raise NotImplementedError

    # -- telling the devices -----------------------------------------------------------------------------------
    def _publish(self) -> None:
        for state in self.states.values():
            state.set_starts(self.starts)
        self._sync_tables()

    def _sync_tables(self) -> None:
        for state in self.states.values():
            state.sync_table(self.table)

    def _widen_tables(self, pages: int, may_widen: bool = True) -> None:
        """Room for longer rows: new tables, at least twice as wide, for which compiled code is compiled once more."""
        if not may_widen:  # in the middle of compiled code, which goes on with the old ones
            raise PagesExhaustedError(
                f"page tables have room for {self.max_tokens} tokens, and nobody said before this step that there would be "
                "more; build the cache with expected_tokens=, or call its get_mask_sizes() before every step"
            )
        self.table_width = max(2 * self.table_width, pages)
        views = self.views.items()
        with out_of_memory_as_pqc004("longer page tables"):
            states = {view.device: self._new_state(self.batch, view.window_keys, view.window_values) for _, view in views}
        for device, state in states.items():
            state.choices, state.calls = self.states[device].choices, self.states[device].calls
            state.set_starts(self.starts)
        self._use_states(states)

    def _use_states(self, states: dict[torch.device, DeviceState]) -> None:
        """Address everything by new tensors; lengths are yet to be published."""
        self.states = states
        for layer, view in self.views.items():
            state = states[view.device]
            view.counts, view.starts, view.page_table = state.counts[layer], state.starts, state.page_table[layer]
            dispatch.publish(state, layer, view)
            self._publish_lengths(layer)

    def _publish_lengths(self, layer: int) -> None:
        self.views[layer].set_lengths(self.row_lengths(layer))

    def out_of_memory_guard(self, what: str) -> AbstractContextManager[None]:
        """Turns the device's out-of-memory error into CacheOutOfMemoryError (PQC004)."""
        return out_of_memory_as_pqc004(what)
