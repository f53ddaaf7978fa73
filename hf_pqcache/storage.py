"""The host's side of a cache: which rows hold how much, which pages they own, what each layer stores; knows no transformers.

All rows of a cache advance together, one position at a time; a row begins at its own start, after its left padding,
which is never stored. From there on a row counts its own tokens, so rows may hold different numbers of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_pqcache import engine, torch_engine
from hf_pqcache.codebook import Codebook, LayerCodebook
from hf_pqcache.config import PQConfig
from hf_pqcache.errors import CacheOutOfMemoryError, PagesExhaustedError, WindowOverflowError
from hf_pqcache.pool import LayerView, PageAllocator, PageTable
from hf_pqcache.state import FLAG_PAGES_EXHAUSTED, DeviceState

Learner = Callable[[Tensor, Tensor, PQConfig], LayerCodebook]


@contextmanager
def _out_of_memory_as_pqc004(what: str) -> Any:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise CacheOutOfMemoryError(
            f"the device has no memory left for {what}; lower max_pages, use fewer bits, or free memory. ({error})"
        ) from error


class Storage:
    """Everything that the layers of one cache share.

    Args:
        config: shape of the cache.
        codebook: centroids of every compressed layer, or None to learn them from the first tokens.
        num_layers: layers of the model, compressed or not.
        learner: makes the codebook of a layer from its keys and values (H, N, d); used without a codebook only.
    """

    def __init__(self, config: PQConfig, codebook: Codebook | None, num_layers: int, learner: Learner) -> None:
        self.config = config
        self.codebook = codebook
        self.num_layers = num_layers
        self.learner = learner
        self.allocator = PageAllocator(config.max_pages)
        self.table = PageTable(self.allocator, 0)
        self.starts: list[int] = []
        self.states: dict[torch.device, DeviceState] = {}
        self.views: dict[int, LayerView] = {}
        self.num_tokens: dict[int, int] = {}
        self.learned: dict[int, LayerCodebook] = {}
        self._high: dict[int, list[int]] = {}  # most tokens a row ever held: older window slots have been reused
        self._padding_known = 0  # positions up to which left padding has been looked at
        self.is_stale = False  # compiled steps advanced the device's lengths unseen by the host
        self._unread_steps = 0

    # -- sizes ---------------------------------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        return len(self.table.rows)

    @property
    def window_slots(self) -> int:
        """Slots of the exact window; without a codebook it holds all tokens needed to learn one."""
        if self.codebook is not None:
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
        """Positions that `layer` has seen, left padding included."""
        if self.is_stale:
            self._refresh()
        return self.num_tokens.get(layer, 0)

    def row_lengths(self, layer: int) -> list[int]:
        """Tokens that each row holds in `layer`."""
        return [max(0, self.tokens(layer) - start) for start in self.starts]

    def state(self, layer: int) -> DeviceState:
        return self.states[self.views[layer].window_keys.device]

    def _refresh(self) -> None:
        """Read the lengths that compiled steps have advanced on the device."""
        self.is_stale, self._unread_steps = False, 0
        for state in self.states.values():
            counts, flags = state.counts.tolist(), int(state.flags[0])
            for layer in state.views:
                row = max(range(self.batch), key=lambda r: self.num_tokens[layer] - self.starts[r])
                self.num_tokens[layer] = max(self.num_tokens[layer], counts[layer][row][0] + self.starts[row])
                self._note_high(layer)
            if flags & FLAG_PAGES_EXHAUSTED:
                state.flags.zero_()
                raise PagesExhaustedError(
                    "a compiled step found no reserved page for its tokens; they are lost. Call the cache's "
                    "get_mask_sizes() before every step, as generate does, and build it with a larger max_pages"
                )

    def _note_high(self, layer: int) -> None:
        high = self._high.setdefault(layer, [0] * self.batch)
        self._high[layer] = [max(a, b) for a, b in zip(high, self.row_lengths(layer), strict=True)]

    # -- making room ---------------------------------------------------------------------------------------------
    @torch.inference_mode(False)
    def open(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Allocate the storage of a layer whose first tokens are keys, values (B, H, T, d).

        Raises CacheOutOfMemoryError, ValueError if the codebook was made for other shapes.
        """
        batch, num_heads, _, key_dim = keys.shape
        if not self.table.rows:
            self.table = PageTable(self.allocator, batch)
            self.starts = [0] * batch
        if batch != self.batch:
            raise ValueError(f"the cache holds {self.batch} sequences and was given {batch}; call reset() first")
        num_subspaces = self.config.subspaces(key_dim, values.shape[3])
        slots = self.config.sink_tokens + self.window_slots
        with _out_of_memory_as_pqc004("the exact window"):
            window_keys = keys.new_zeros(batch, num_heads, slots, key_dim)
            window_values = values.new_zeros(batch, num_heads, slots, values.shape[3])
            state = self._device_state(window_keys, window_values)
            view = LayerView(
                config=self.config.replace(num_subspaces=num_subspaces),
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
            )
        if self.codebook is not None:
            self._give_centroids(view, self.codebook.layers[layer], layer)
        engine.publish(state, layer, view)
        self.views[layer] = view
        self.num_tokens[layer] = 0
        self._high[layer] = [0] * batch

    def _device_state(self, window_keys: Tensor, window_values: Tensor) -> DeviceState:
        """The state of the device where the windows of a layer lie; the first layer there stands for the shape of all."""
        device = window_keys.device
        if device not in self.states:
            shape = (self.config, window_keys.shape[1:], window_values.shape[3], window_keys.dtype)
            state = DeviceState(self.num_layers, self.batch, self.config.max_pages, device, shape)
            state.set_starts(self.starts)
            state.sync_table(self.table)
            self.states[device] = state
        return self.states[device]

    @torch.inference_mode(False)
    def _give_centroids(self, view: LayerView, book: LayerCodebook, layer: int) -> None:
        """Make a layer coded: its centroids and its share of the page pool."""
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
        device = view.window_keys.device
        with _out_of_memory_as_pqc004(f"a pool of {self.config.max_pages} pages"):
            pages = [
                torch.empty(
                    self.config.max_pages,
                    w.shape[1],
                    view.config.code_bytes(w.shape[3]),
                    dtype=torch.uint8,
                    device=device,
                )
                for w in (view.window_keys, view.window_values)
            ]
        view.key_pages, view.value_pages = pages
        view.codebook, view.is_coded = book, True  # `publish` brings the centroids to the device

    def reserve(self, layer: int, tokens: int) -> None:
        """Own the pages that `tokens` positions of `layer` need, for every row or none. Raises PagesExhaustedError."""
        view, size = self.views[layer], self.config.page_size
        self.table.reserve([view.coded_tokens(max(0, tokens - start)) // size for start in self.starts])
        for state in self.states.values():
            state.sync_table(self.table)

    def before_step(self, layer: int) -> None:
        """Between two decode steps: own the page that the coming one may fill, without reading the device if possible.

        Compiled steps are counted, and lengths read once per page of them.
        """
        self._unread_steps += 1
        if layer not in self.views or not (self.is_stale and self._unread_steps < self.config.page_size // 2):
            self.reserve_ahead(layer)

    def reserve_ahead(self, layer: int) -> None:
        """Own the pages of the next page_size tokens, or of the next one only where the pool is that short."""
        if layer not in self.views:
            return
        tokens = self.tokens(layer)
        for other, view in self.views.items():  # what compiled steps have gathered may be enough to learn from
            if self.tokens(other) == tokens:
                self.learn_if_due(other, view.window_keys[:, :, :0], view.window_values[:, :, :0])
        try:
            self.reserve(layer, tokens + self.config.page_size)
        except PagesExhaustedError:
            self.reserve(layer, tokens + 1)

    # -- storing -------------------------------------------------------------------------------------------------
    def note_padding(self, layer: int, padding: Sequence[int]) -> None:
        """Skip the leading padding[r] of the new positions for every row r that holds nothing yet.

        The first layer to store a position decides for all.
        """
        first = self.tokens(layer)
        if self._padding_known > first:
            return
        self.starts = [
            first + pad if start == first or first == 0 else start for start, pad in zip(self.starts, padding, strict=True)
        ]
        for state in self.states.values():
            state.set_starts(self.starts)

    def learn_if_due(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Without a codebook: learn the layer's once enough tokens are there, from them and the new ones (B, H, T, d)."""
        view = self.views[layer]
        if view.is_coded:
            return
        lengths, first, count = self.row_lengths(layer), self.tokens(layer), keys.shape[2]
        new_lengths = [max(0, first + count - start) for start in self.starts]
        if sum(new_lengths) < self.learn_tokens:
            if max(new_lengths) > self.config.sink_tokens + view.window_slots:
                raise WindowOverflowError(
                    f"{max(new_lengths)} tokens without a codebook do not fit the exact window of {view.window_slots}; "
                    f"pass a codebook, or lower learn_tokens={self.learn_tokens}"
                )
            return
        sides = []
        for window, new in ((view.window_keys, keys), (view.window_values, values)):
            parts = [
                torch.cat([window[row][:, torch_engine.window_slots(view, 0, length)], new[row, :, count - tail :]], dim=1)
                for row, length in enumerate(lengths)
                if (tail := new_lengths[row] - length) >= 0
            ]
            sides.append(torch.cat(parts, dim=1))
        book = self.learner(sides[0], sides[1], view.config)
        self._give_centroids(view, book, layer)
        self.learned[layer] = book
        engine.publish(self.state(layer), layer, view)
        self.reserve(layer, first)
        for row, length in enumerate(lengths):
            engine.encode_window(view, row, length)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store keys, values (B, H, T, d), the newest positions of `layer`, left padding skipped."""
        view, first, count = self.views[layer], self.tokens(layer), keys.shape[2]
        self.reserve(layer, first + count)
        for row, length in enumerate(self.row_lengths(layer)):
            skip = min(max(0, self.starts[row] - first), count)
            engine.append_row(view, row, keys[row, :, skip:], values[row, :, skip:], length)
        self.set_tokens(layer, first + count)
        self._padding_known = max(self._padding_known, first + count)

    def set_tokens(self, layer: int, tokens: int) -> None:
        """Record that `layer` holds `tokens` positions, on the host and on its device."""
        self.num_tokens[layer] = tokens
        self._note_high(layer)
        self.views[layer].set_lengths(self.row_lengths(layer))

    def advance(self, layer: int, count: int) -> None:
        """Record `count` positions that an op has stored and counted on the device itself."""
        self.num_tokens[layer] += count
        self._padding_known = max(self._padding_known, self.num_tokens[layer])
        self._note_high(layer)

    # -- taking away ---------------------------------------------------------------------------------------------
    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` positions. Tokens that fall back into the window are restored from their codes."""
        counts = [0] * self.batch
        for layer, view in self.views.items():
            old = self.row_lengths(layer)
            new = [min(length, max(0, tokens - start)) for length, start in zip(old, self.starts, strict=True)]
            for row, length in enumerate(new):
                first = self.config.sink_tokens + view.coded_tokens(length)
                last = min(length, self.config.sink_tokens + view.coded_tokens(old[row]))
                last = min(last, max(first, self._high[layer][row] - view.window_slots))
                if last > first:
                    torch_engine.restore_window(view, row, first, last)
                counts[row] = max(counts[row], view.coded_tokens(length) // self.config.page_size)
            if tokens < self.tokens(layer):
                high = self._high[layer]
                self.set_tokens(layer, tokens)
                self._high[layer] = high
        self.table.truncate(counts)
        self.starts = [min(start, tokens) for start in self.starts]
        self._padding_known = min(self._padding_known, tokens)
        self._publish()

    def reset(self) -> None:
        """Forget all tokens; storage and addresses stay, codebooks that were learnt from the tokens go."""
        self.table.truncate([0] * self.batch)
        self.starts = [0] * self.batch
        self._padding_known, self.is_stale, self._unread_steps = 0, False, 0
        for layer in self.views:
            self._high[layer] = [0] * self.batch
            self.set_tokens(layer, 0)
        for state in self.states.values():
            state.flags.zero_()
        for layer in self.learned:
            self.views[layer].is_coded = False
        self.learned.clear()
        self._publish()

    def select_rows(self, indices: Sequence[int]) -> None:
        """Row i becomes a copy of row indices[i]. Pages are shared by count; only the exact windows are copied."""
        written = [0] * self.batch
        for layer, view in self.views.items():
            for row, length in enumerate(self.row_lengths(layer)):
                written[row] = max(written[row], view.coded_tokens(length) // self.config.page_size)
        same_size = len(indices) == self.batch
        self.table.truncate(written)
        self.table.select(indices)
        self.starts = [self.starts[i] for i in indices]
        self._high = {layer: [high[i] for i in indices] for layer, high in self._high.items()}
        if not same_size:
            self.states = {}
        for layer, view in self.views.items():
            rows = torch.tensor(list(indices), device=view.window_keys.device)
            keys, values = view.window_keys[rows], view.window_values[rows]
            if same_size:  # addresses stay: a captured graph may hold them
                view.window_keys.copy_(keys)
                view.window_values.copy_(values)
            else:
                state = self._device_state(keys, values)
                view.window_keys, view.window_values = keys, values
                view.counts, view.starts, view.page_table = state.counts[layer], state.starts, state.page_table
                engine.publish(state, layer, view)
            view.set_lengths(self.row_lengths(layer))
        self._publish()

    def _publish(self) -> None:
        for state in self.states.values():
            state.set_starts(self.starts)
            state.sync_table(self.table)

    def clone(self) -> Storage:
        """An independent copy: same contents, own pages, own addresses."""
        if self.is_stale:
            self._refresh()
        new = Storage(self.config, self.codebook, self.num_layers, self.learner)
        new.table = PageTable(new.allocator, self.batch)
        copies: dict[int, int] = {}
        for row, pages in enumerate(self.table.rows):
            for page in pages:
                if page in copies:
                    new.allocator.share([copies[page]])
                else:
                    copies[page] = new.allocator.allocate(1)[0]
                new.table.rows[row].append(copies[page])
        new.starts, new._padding_known = list(self.starts), self._padding_known
        new.learned = dict(self.learned)
        for layer, view in self.views.items():
            state = new._device_state(view.window_keys, view.window_values)
            twin = dataclasses.replace(
                view,
                key_pages=torch.empty_like(view.key_pages),
                value_pages=torch.empty_like(view.value_pages),
                window_keys=view.window_keys.clone(),
                window_values=view.window_values.clone(),
                counts=state.counts[layer],
                starts=state.starts,
                page_table=state.page_table,
            )
            if copies and view.is_coded:
                old, here = torch.tensor([list(copies), list(copies.values())], device=view.key_pages.device)
                twin.key_pages[here], twin.value_pages[here] = view.key_pages[old], view.value_pages[old]
            engine.publish(state, layer, twin)
            new.views[layer] = twin
            new.set_tokens(layer, self.tokens(layer))
            new._high[layer] = list(self._high[layer])
        new._publish()
        return new

    def out_of_memory_guard(self, what: str) -> AbstractContextManager[None]:
        """Turns the device's out-of-memory error into CacheOutOfMemoryError (PQC004)."""
        return _out_of_memory_as_pqc004(what)
