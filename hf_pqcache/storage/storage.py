"""The host's side of a cache: which rows hold how much, which pages they own, what each layer stores; knows no transformers.

A row is one sequence. Under `generate` all rows advance together, one position at a time; a row begins at its own
start, after its left padding, which is never stored. Sequences that are handled one by one (sequences.py) all start at
0 and advance each by itself. Either way a row counts its own tokens.

Whatever raises leaves the storage as it was: what may fail, allocating above all, comes before what changes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_pqcache.backends import dispatch, torch_backend
from hf_pqcache.errors import CacheOutOfMemoryError, PagesExhaustedError, WindowOverflowError
from hf_pqcache.pages.block_pool import LayerView
from hf_pqcache.pages.device_state import DeviceState
from hf_pqcache.pages.slabs import PageStore, Which
from hf_pqcache.storage.layers import Room, out_of_memory_as_pqc004

#: Keys and values (H, T, d) that a row is about to get.
NewTokens = dict[int, tuple[Tensor, Tensor]]


class Storage(Room):
    """The rows of a cache: how they grow, shrink, move and are copied. Made as `Room` is."""

    # -- between steps --------------------------------------------------------------------------------------------
    def set_batch(self, batch: int) -> None:
        """Hold `batch` rows from now on. Raises ValueError if there are tokens of another number of rows."""
        if batch == self.batch:
            return
        if any(self.tokens(layer) for layer in self.views):
            raise ValueError(
                f"the cache holds {self.batch} sequences, not {batch}; batch_repeat_interleave() and batch_select_indices() "
                "change their number and keep their tokens, reset() forgets them"
            )
        self.select_rows([None] * batch)

    def before_step(self, layer: int) -> None:
        """Between two decode steps: own the page that the coming one may fill, without reading the device if possible.

        Steps are counted; the device's lengths are read when so many could have filled the pages there are.
        """
        self._unread_steps += 1
        if layer in self.views and not (self.is_stale and self._has_room_for(layer, self._unread_steps)):
            self.reserve_ahead(layer)
            self._unread_steps = 1

    def _has_room_for(self, layer: int, steps: int) -> bool:
        """Whether compiled steps, `steps` since lengths were read, surely have pages, and nothing to learn meanwhile."""
        if not all(view.is_coded for view in self.views.values()):
            return steps < self.config.page_size // 2
        return self._owns(layer, max(self._positions[layer], default=0) + steps)

    def reserve_ahead(self, layer: int) -> None:
        """Own the pages of the next page_size tokens, or of the next one only where there are no more."""
        if layer not in self.views:
            return
        tokens = self.tokens(layer)
        for other, view in self.views.items():  # what compiled steps have gathered may be enough to learn from
            if not view.is_coded and self.tokens(other) == tokens:
                self.learn_if_due(other, view.window_keys[:, :, :0], view.window_values[:, :, :0])
        try:
            self.reserve(layer, tokens + self.config.page_size)
        except (PagesExhaustedError, CacheOutOfMemoryError):
            self.reserve(layer, tokens + 1)

    def _before_append(self, layer: int, lengths: Sequence[int] | None) -> None:
        """The op is about to store one more token of every row of `layer`, which then hold `lengths` (None: not read).

        Whoever compiles a model by himself may call no `get_mask_sizes` between steps.
        """
        if lengths is not None:
            if not self._rows_own(layer, lengths):
                self._reserve_rows(layer, lengths, may_widen=False)
            return
        self._unread_appends += layer == min(self.views)
        if not self.is_stale:
            has_room = self._owns(layer, max(self._positions[layer], default=0) + 1)
        else:
            has_room = self._has_room_for(layer, max(self._unread_steps, self._unread_appends))
        if not has_room:
            self._reserve_rows(layer, [length + 1 for length in self.row_lengths(layer)], may_widen=False)
            self._unread_appends = 1  # the one that is about to be

    # -- storing -------------------------------------------------------------------------------------------------
    def wants_padding(self, first: int) -> bool:
        """Whether it is not yet known which of the positions from `first` on are left padding, and some row may have any.

        The first layer to store a position decides for all.
        """
        return self._padding_known <= first and (first == 0 or first in self.starts)

    def note_padding(self, layer: int, padding: Sequence[int]) -> None:
        """Skip the leading padding[r] of the new positions for every row r that holds nothing yet."""
        first = self.tokens(layer)
        self.starts = [
            first + pad if start == first or first == 0 else start for start, pad in zip(self.starts, padding, strict=True)
        ]
        for state in self.states.values():
            state.set_starts(self.starts)

    def learn_if_due(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Without a codebook: learn the layer's once enough tokens are there, from them and the new ones (B, H, T, d)."""
        if not self.views[layer].is_coded:
            self._learn_if_due(layer, self._new_tokens(layer, keys, values))

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store keys, values (B, H, T, d), the newest positions of `layer` in all rows, left padding skipped."""
        end = self.tokens(layer) + keys.shape[2]
        self._append(layer, self._new_tokens(layer, keys, values), [end] * self.batch)
        self._padding_known = max(self._padding_known, end)

    def append_row(self, layer: int, row: int, keys: Tensor, values: Tensor) -> None:
        """Store keys, values (H, T, d), the newest tokens of one row in `layer`."""
        ends = list(self.positions(layer))
        ends[row] += keys.shape[1]
        self._append(layer, {row: (keys, values)}, ends)

    def advance(self, layer: int, count: int) -> None:
        """Record `count` positions that an op has stored and counted on the device itself."""
        before = self._positions[layer]
        self._count(layer, [position + count for position in before])
        self._unread_appends = 0
        self._write_back(layer, before)
        self._padding_known = max(self._padding_known, self.tokens(layer))

    def _new_tokens(self, layer: int, keys: Tensor, values: Tensor) -> NewTokens:
        """What each row gets of keys, values (B, H, T, d): all but its left padding."""
        first, count = self.tokens(layer), keys.shape[2]
        skips = [min(max(0, start - first), count) for start in self.starts]
        return {row: (keys[row, :, skip:], values[row, :, skip:]) for row, skip in enumerate(skips)}

    def _append(self, layer: int, new: NewTokens, positions: list[int]) -> None:
        view, lengths = self.views[layer], self.row_lengths(layer)
        with self._pages_given_back_on_failure():
            if not view.is_coded:
                self._learn_if_due(layer, new)
            self._reserve_rows(layer, self._lengths_at(positions))
            for row, (keys, values) in new.items():
                dispatch.encode_row(view, row, keys, values, lengths[row])
            self._write_back(layer, self._positions[layer], positions)
        for row, (keys, values) in new.items():
            dispatch.keep_row(view, row, keys, values, lengths[row])
        self._count(layer, positions)
        self._publish_lengths(layer)

    @torch.no_grad()
    def _learn_if_due(self, layer: int, new: NewTokens) -> None:
        view, lengths = self.views[layer], self.row_lengths(layer)
        added = [new[row][0].shape[1] if row in new else 0 for row in range(self.batch)]
        longest = max(length + more for length, more in zip(lengths, added, strict=True))
        if sum(lengths) + sum(added) < self.learn_tokens:
            if longest > self.config.sink_tokens + view.window_slots:
                raise WindowOverflowError(
                    f"{longest} tokens without a codebook do not fit the exact window of {view.window_slots}; "
                    f"pass a codebook, or lower learn_tokens={self.learn_tokens}"
                )
            return
        sides: tuple[tuple[Which, int], ...] = (("key", 0), ("value", 1))
        samples = [
            torch.cat(
                [torch_backend.read_window(view, which, row, 0, length) for row, length in enumerate(lengths)]
                + [tokens[i] for tokens in new.values()],
                dim=1,
            )
            for which, i in sides
        ]
        book = self.learner(samples[0], samples[1], view.config)
        before = dataclasses.replace(view)
        try:
            self._give_pages(layer, view, book)
            dispatch.publish(self.state(layer), layer, view)
            with self._pages_given_back_on_failure():
                self._reserve_rows(layer, lengths)
                for row, length in enumerate(lengths):
                    dispatch.encode_window(view, row, length)
                self._write_back(layer, self.starts)
        except BaseException:
            vars(view).update(vars(before))
            self.state(layer).add_view(layer, view, () if view.kernels is None else view.kernels.tensors)
            raise
        self.learned[layer] = book
        self._publish_lengths(layer)

    def _write_back(self, layer: int, before: Sequence[int], after: Sequence[int] | None = None) -> None:
        """The rows' pages between positions `before` and `after` (None: those there are) have just been written."""
        view = self.views[layer]
        if self.offload is None:
            return
        counts = [
            [view.coded_tokens(length) // self.config.page_size for length in self._lengths_at(positions)]
            for positions in (before, self._positions[layer] if after is None else after)
        ]
        pages = [page for row, a, b in zip(self.table.rows, *counts, strict=True) for page in row[a:b]]
        if pages:
            view.store.write_back(pages)

    @contextmanager
    def _pages_given_back_on_failure(self) -> Any:
        owned = [len(pages) for pages in self.table.rows]
        try:
            yield
        except BaseException:
            self.table.truncate(owned)
            self._publish()
            raise

    # -- another dtype -------------------------------------------------------------------------------------------------
    def fit_dtypes(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values in dtypes that also hold what `layer` has, which it then has in these dtypes, without loss.

        As torch.cat does it for DynamicCache: what was stored under autocast goes on in float32.
        """
        view = self.views[layer]
        held = view.window_keys.dtype, view.window_values.dtype
        wanted = torch.promote_types(held[0], keys.dtype), torch.promote_types(held[1], values.dtype)
        if wanted != held:
            self._promote(layer, *wanted)
        return keys.to(wanted[0]), values.to(wanted[1])

    @torch.inference_mode(False)
    def _promote(self, layer: int, key_dtype: torch.dtype, value_dtype: torch.dtype) -> None:
        view = self.views[layer]
        with out_of_memory_as_pqc004("tokens of another dtype"):
            new = dataclasses.replace(
                view, window_keys=view.window_keys.to(key_dtype), window_values=view.window_values.to(value_dtype)
            )
            if layer in self._stores and not self.codec.needs_centroids:
                new.pages = self._rewritten(self._stores[layer], self._new_store(new))
        if new.pages is not view.pages and new.pages is not None:
            if self.allocator.num_tables == 1:
                self.allocator.detach(self._stores[layer])
            self._stores[layer] = new.pages
        vars(view).update(vars(new))
        state = self.state(layer)
        state.choices = {key: choice for key, choice in state.choices.items() if key[0] != layer}
        dispatch.publish(state, layer, view)
        self._publish()

    def _rewritten(self, old: PageStore, new: PageStore) -> PageStore:
        """`new` with memory for all pages, and this cache's as `old` has them."""
        self.allocator.attach(new)
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

    # -- taking away ---------------------------------------------------------------------------------------------
    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` positions. Tokens that fall back into the window are restored from their pages."""
        ends = {layer: [min(p, tokens) for p in self.positions(layer)] for layer in self.views}
        self._shorten(ends, range(self.batch))
        self.starts = [min(start, tokens) for start in self.starts]
        self._padding_known = min(self._padding_known, tokens)
        self._publish()

    def crop_row(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of one row."""
        end = self.starts[row] + length
        ends = {layer: list(self.positions(layer)) for layer in self.views}
        for positions in ends.values():
            positions[row] = min(positions[row], end)
        self._shorten(ends, [row])
        self._publish()

    @property
    def is_uneven(self) -> bool:
        """Whether some layers hold more positions than others, as in the middle of a forward pass."""
        return len({self.tokens(layer) for layer in self.views}) > 1

    def roll_back(self, most: int | None = None) -> int:
        """Keep the positions that all layers hold, `most` at most, and no page more -> their number."""
        complete = min((self.tokens(layer) for layer in self.views), default=0)
        complete = complete if most is None else min(complete, most)
        self.crop(complete)
        return complete

    def _shorten(self, positions: dict[int, list[int]], rows: Sequence[int]) -> None:
        """Take `rows` back to the given positions of each layer; they keep no page that this leaves unwritten."""
        pages = [0 if row in rows else len(owned) for row, owned in enumerate(self.table.rows)]
        restored: list[tuple[LayerView, Which, int, int, Tensor]] = []
        sides: tuple[Which, ...] = ("key", "value")
        for layer, view in self.views.items():
            old, new = self.row_lengths(layer), self._lengths_at(positions[layer])
            for row in rows:
                coded = view.coded_tokens(new[row])
                pages[row] = max(pages[row], coded // self.config.page_size)
                first = self.config.sink_tokens + coded
                last = min(new[row], self.config.sink_tokens + view.coded_tokens(old[row]), self._reused[layer][row])
                if first < last:
                    restored += [(view, w, row, first, torch_backend.coded_tokens(view, w, row, first, last)) for w in sides]
        for item in restored:
            torch_backend.write_window(*item)
        for layer, ends in positions.items():
            self._reused[layer] = [min(a, b) for a, b in zip(self._reused[layer], self._lengths_at(ends), strict=True)]
            self._count(layer, ends)
            self._publish_lengths(layer)
        self.table.truncate(pages)

    def reset(self) -> None:
        """Forget all tokens; storage and addresses stay, codebooks that were learnt from the tokens go."""
        self.table.truncate([0] * self.batch)
        self.starts = [0] * self.batch
        self._padding_known, self.is_stale, self._unread_steps, self._unread_appends = 0, False, 0, 0
        for layer in self.views:
            self._positions[layer], self._reused[layer] = [0] * self.batch, [0] * self.batch
            self._publish_lengths(layer)
        for state in self.states.values():
            state.flags.zero_()
        for layer in self.learned:
            self.views[layer].is_coded = False
        self.learned.clear()
        self._publish()

    # -- rearranging ---------------------------------------------------------------------------------------------
    @torch.inference_mode(False)
    def select_rows(self, indices: Sequence[int | None]) -> None:
        """Row i becomes a copy of row indices[i], or an empty row. Pages are shared by count; only windows are copied."""
        if len(indices) == self.batch:
            moved = [(i, j) for i, j in enumerate(indices) if j is not None and i != j]
            commit = self._stage_moved_windows(moved)
        else:
            commit = self._stage_new_windows(indices)
        written = self._written_pages()
        copied = Counter(indices)  # rows with copies share what is written, not what was reserved to be
        self.table.truncate([n if copied[r] > 1 else len(self.table.rows[r]) for r, n in enumerate(written)])
        self.table.select(indices)
        self.starts = _pick(self.starts, indices)
        for counts in (self._positions, self._reused):
            for layer, numbers in counts.items():
                counts[layer] = _pick(numbers, indices)
        commit()
        for layer in self.views:
            self._publish_lengths(layer)
        self._publish()

    def copy_row(self, source: int, target: int) -> None:
        """Make the empty row `target` a copy of row `source`, which shares its pages."""
        pages = self._written_pages()[source]
        for view in self.views.values():
            view.window_keys[target].copy_(view.window_keys[source])
            view.window_values[target].copy_(view.window_values[source])
        self.table.copy(source, target, pages)
        self.starts[target] = self.starts[source]
        for counts in (self._positions, self._reused):
            for numbers in counts.values():
                numbers[target] = numbers[source]
        for layer in self.views:
            self._publish_lengths(layer)
        self._publish()

    def free_row(self, row: int) -> None:
        """Make a row empty; pages that no other one shares are free at once."""
        self.table.truncate([0 if r == row else len(pages) for r, pages in enumerate(self.table.rows)])
        self.starts[row] = 0
        for layer in self.views:
            self._positions[layer][row] = self._reused[layer][row] = 0
            self._publish_lengths(layer)
        self._publish()

    def _written_pages(self) -> list[int]:
        """How many of its pages each row has written in some layer; it may own more, reserved ahead."""
        written = [0] * self.batch
        for layer, view in self.views.items():
            pages = [view.coded_tokens(length) // self.config.page_size for length in self.row_lengths(layer)]
            written = [max(a, b) for a, b in zip(written, pages, strict=True)]
        return written

    def _stage_moved_windows(self, moved: Sequence[tuple[int, int]]) -> Callable[[], None]:
        """Read the windows that move to other rows; what is returned writes them. Addresses stay: graphs hold them."""
        staged: list[tuple[Tensor, Tensor, Tensor]] = []
        for view in self.views.values() if moved else ():
            targets, sources = torch.tensor(moved, device=view.device).unbind(1)
            staged += [(w, targets, w[sources]) for w in (view.window_keys, view.window_values)]

        def commit() -> None:
            for window, targets, rows in staged:
                window.index_copy_(0, targets, rows)

        return commit

    def _stage_new_windows(self, indices: Sequence[int | None]) -> Callable[[], None]:
        """Make windows and device counters for another number of rows; what is returned puts them into use."""
        kept = [(i, j) for i, j in enumerate(indices) if j is not None]
        staged: dict[int, list[Tensor]] = {}
        states: dict[torch.device, DeviceState] = {}
        with out_of_memory_as_pqc004("the exact windows"):
            for layer, view in self.views.items():
                staged[layer] = []
                for old in (view.window_keys, view.window_values):
                    window = old.new_zeros(len(indices), *old.shape[1:])
                    if kept:
                        targets, sources = torch.tensor(kept, device=old.device).unbind(1)
                        window.index_copy_(0, targets, old[sources])
                    staged[layer].append(window)
                if old.device not in states:
                    states[old.device] = self._new_state(len(indices), view.window_keys, view.window_values)

        def commit() -> None:
            for layer, (keys, values) in staged.items():
                self.views[layer].window_keys, self.views[layer].window_values = keys, values
            self._use_states(states)

        return commit

    def clone(self) -> Storage:
        """An independent copy: same contents, own windows and tables; pages are shared by count, as they never change."""
        if self.is_stale:
            self._refresh()
        new = Storage(
            self.config, self.codebook, self.num_layers, self.learner, self.codec, self.tp_rank, self.offload is not None,
            self.expected_tokens, self.max_positions,
        )  # fmt: skip
        new.table_width = self.table_width
        if self._stores:
            new._share_pages(self)
        else:
            new.table.rows = [[] for _ in self.table.rows]
        with out_of_memory_as_pqc004("a copy's own pages"):  # those that are promised but not yet written
            new.table.reserve([len(row) for row in self.table.rows])
        new.starts, new._padding_known = list(self.starts), self._padding_known
        new.are_rows_independent = self.are_rows_independent
        new.learned = dict(self.learned)
        for layer, view in self.views.items():
            state = new._device_state(view.window_keys, view.window_values)
            twin = dataclasses.replace(
                view,
                window_keys=view.window_keys.clone(),
                window_values=view.window_values.clone(),
                counts=state.counts[layer],
                starts=state.starts,
                page_table=state.page_table[layer],
                table=new.table,
            )
            dispatch.publish(state, layer, twin)
            new.views[layer] = twin
            new._positions[layer], new._reused[layer] = list(self._positions[layer]), list(self._reused[layer])
            new._publish_lengths(layer)
        new._publish()
        return new

    def _share_pages(self, other: Storage) -> None:
        """Have the pages of another cache of the same shape, whose memory both use from now on."""
        self.allocator, self.offload, self._stores = other.allocator, other.offload, dict(other._stores)
        self._own(other.table.twin(other._written_pages()))


def _pick(numbers: Sequence[int], indices: Sequence[int | None]) -> list[int]:
    return [0 if i is None else numbers[i] for i in indices]
