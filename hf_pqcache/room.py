"""What the layers of a cache own, pools, page table, windows and counts, and how it is made; stores no token itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_pqcache import engine, parallel
from hf_pqcache.codebook import Codebook, LayerCodebook
from hf_pqcache.config import PQConfig
from hf_pqcache.errors import CacheOutOfMemoryError, PagesExhaustedError
from hf_pqcache.offload import Offload
from hf_pqcache.pages import CODED, PageCodec
from hf_pqcache.pool import LayerView, PageAllocator, PageTable
from hf_pqcache.state import FLAG_PAGES_EXHAUSTED, DeviceState

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
            f"there is no memory left for {what}; lower max_pages, use fewer bits, or free memory. ({error})"
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
    ) -> None:
        self.config = config
        self.codebook = codebook
        self.num_layers = num_layers
        self.learner = learner
        self.codec = codec
        self.tp_rank = tp_rank
        self.allocator = PageAllocator(config.max_pages)
        self.offload = Offload(self.allocator.references) if offload else None
        self.table = PageTable(self.allocator, 0)
        self.starts: list[int] = []
        self.states: dict[torch.device, DeviceState] = {}
        self.views: dict[int, LayerView] = {}
        self._positions: dict[int, list[int]] = {}  # of each row in each layer, left padding included
        self.learned: dict[int, LayerCodebook] = {}
        self._reused: dict[int, list[int]] = {}  # each row's tokens before this one have lost their window slot
        self._padding_known = 0  # positions up to which left padding has been looked at
        self.are_rows_independent = False  # sequences that advance each by itself
        self.is_stale = False  # compiled steps advanced the device's lengths unseen by the host
        self._unread_steps = 0

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
        """Most tokens that a single row can hold."""
        return self.config.sink_tokens + self.config.max_pages * self.config.page_size + self.config.window_slots

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
        self.is_stale, self._unread_steps = False, 0
        for state in self.states.values():
            counts, flags = state.counts.tolist(), int(state.flags[0])
            for layer in state.views:
                rows = zip(self._positions[layer], counts[layer], self.starts, strict=True)
                self._count(layer, [max(position, length + start) for position, (length, _), start in rows])
            if flags & FLAG_PAGES_EXHAUSTED:
                state.flags.zero_()
                raise PagesExhaustedError(
                    "a compiled step found no reserved page for its tokens; they are lost. Call the cache's "
                    "get_mask_sizes() before every step, as generate does, and build it with a larger max_pages"
                )

    def _count(self, layer: int, positions: list[int]) -> None:
        """Record on the host what each row holds in `layer`."""
        slots = self.views[layer].window_slots
        self._positions[layer] = positions
        self._reused[layer] = [
            max(old, length - slots) for old, length in zip(self._reused[layer], self._lengths_at(positions), strict=True)
        ]

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
                key_pages=keys.new_empty(0, dtype=torch.uint8),
                value_pages=keys.new_empty(0, dtype=torch.uint8),
                key_centroids=keys.new_empty(num_heads, 0, dtype=torch.float16),
                value_centroids=keys.new_empty(num_heads, 0, dtype=torch.float16),
                window_keys=window_keys,
                window_values=window_values,
                counts=state.counts[layer],
                starts=state.starts,
                page_table=state.page_table,
                is_coded=False,
                codec=self.codec,
            )
            if book is not None or not self.codec.needs_centroids:
                self._give_pages(layer, view, book)
            engine.publish(state, layer, view)
        self.views[layer] = view
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
        return parallel.local_part(self.codebook.layers[layer], num_heads, layer, self.tp_rank)

    def _device_state(self, window_keys: Tensor, window_values: Tensor) -> DeviceState:
        """The state of the device where the windows of a layer lie; the first layer there stands for the shape of all."""
        device = window_keys.device
        if device not in self.states:
            state = self._new_state(self.batch, window_keys, window_values)
            state.set_starts(self.starts)
            state.sync_table(self.table)
            self.states[device] = state
        return self.states[device]

    def _new_state(self, batch: int, window_keys: Tensor, window_values: Tensor) -> DeviceState:
        shape = (self.config, type(self.codec), window_keys.shape[1:], window_values.shape[3], window_keys.dtype)
        return DeviceState(self.num_layers, batch, self.config.max_pages, window_keys.device, shape)

    @torch.inference_mode(False)
    def _give_pages(self, layer: int, view: LayerView, book: LayerCodebook | None) -> None:
        """Let a layer write pages: its share of the page pool and, where pages hold codes, its centroids."""
        if book is not None:
            self._check_book(layer, view, book)
        windows = view.window_keys, view.window_values
        with out_of_memory_as_pqc004(f"a pool of {self.config.max_pages} pages"):
            if self.offload is None:
                pages = [self.codec.new_pages(w, view.config, view.num_subspaces) for w in windows]
            else:
                like = [self.codec.new_pages(w.to("meta"), view.config, view.num_subspaces) for w in windows]
                view.host = self.offload.open(layer, view.device, like)
                pages = view.host.staging
        view.key_pages, view.value_pages = pages
        view.codebook, view.is_coded = book, True  # `publish` brings the centroids to the device

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
        """Own the pages that `tokens` positions of `layer` need, for every row or none. Raises PagesExhaustedError."""
        self._reserve_rows(layer, [max(0, tokens - start) for start in self.starts])

    def _reserve_rows(self, layer: int, lengths: Sequence[int]) -> None:
        """Own the pages that lengths[r] tokens of row r need in `layer`, for every row or none.

        A page that the row is about to write and shares with another becomes a copy of its own. That happens only if the
        row was copied while `layer` was behind others, which had written the page already.
        """
        view, size = self.views[layer], self.config.page_size
        counts = [view.coded_tokens(length) // size for length in lengths]
        shared: list[tuple[int, int]] = []
        leaving: Counter[int] = Counter()
        for row, old in enumerate(self.row_lengths(layer)):
            pages = self.table.rows[row]
            for i in range(view.coded_tokens(old) // size, min(counts[row], len(pages))):
                if self.allocator.references(pages[i]) - leaving[pages[i]] > 1:
                    leaving[pages[i]] += 1
                    shared.append((row, i))
        staged: list[tuple[LayerView, Tensor, Tensor]] = []
        for other in self.views.values() if shared else ():
            if other.is_coded:
                sources = torch.tensor([self.table.rows[r][i] for r, i in shared], device=other.key_pages.device)
                other.bring()
                staged.append((other, other.key_pages[sources], other.value_pages[sources]))
        new = self.table.reserve(counts, shared)
        for other, keys, values in staged:
            other.bring()
            ids = torch.tensor(new, device=keys.device)
            other.key_pages.index_copy_(0, ids, keys)
            other.value_pages.index_copy_(0, ids, values)
            other.keep(new)
        for state in self.states.values():
            state.sync_table(self.table)

    def reserve_pages(self, row: int, count: int) -> None:
        """Own at least `count` pages for one row."""
        self.table.reserve([count if r == row else 0 for r in range(self.batch)])
        for state in self.states.values():
            state.sync_table(self.table)

    # -- telling the devices -----------------------------------------------------------------------------------
    def _publish(self) -> None:
        for state in self.states.values():
            state.set_starts(self.starts)
            state.sync_table(self.table)

    def _publish_lengths(self, layer: int) -> None:
        self.views[layer].set_lengths(self.row_lengths(layer))

    def out_of_memory_guard(self, what: str) -> AbstractContextManager[None]:
        """Turns the device's out-of-memory error into CacheOutOfMemoryError (PQC004)."""
        return out_of_memory_as_pqc004(what)
