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
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_pqcache import engine, parallel, torch_engine
from hf_pqcache.codebook import Codebook, LayerCodebook
from hf_pqcache.config import PQConfig
from hf_pqcache.errors import CacheOutOfMemoryError, PagesExhaustedError, WindowOverflowError
from hf_pqcache.offload import Offload
from hf_pqcache.pages import CODED, PageCodec, Which
from hf_pqcache.pool import LayerView, PageAllocator, PageTable
from hf_pqcache.state import FLAG_PAGES_EXHAUSTED, DeviceState

Learner = Callable[[Tensor, Tensor, PQConfig], LayerCodebook]
#: Keys and values (H, T, d) that a row is about to get.
NewTokens = dict[int, tuple[Tensor, Tensor]]


@contextmanager
def _out_of_memory_as_pqc004(what: str) -> Any:
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


class Storage:
    """Everything that the layers of one cache share.

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
        return self.states[self.views[layer].window_keys.device]

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
        with _out_of_memory_as_pqc004("the exact window"):
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

    def set_batch(self, batch: int) -> None:
        """Hold `batch` rows from now on. Raises ValueError if there are tokens of another number of rows."""
        if batch == self.batch:
            return
        if any(self.tokens(layer) for layer in self.views):
            raise ValueError(f"the cache holds {self.batch} sequences, not {batch}; call reset() first")
        self.select_rows([None] * batch)

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
        with _out_of_memory_as_pqc004(f"a pool of {self.config.max_pages} pages"):
            if self.offload is None:
                pages = [self.codec.new_pages(w, view.config, view.num_subspaces) for w in windows]
            else:
                like = [self.codec.new_pages(w.to("meta"), view.config, view.num_subspaces) for w in windows]
                view.host = self.offload.open(layer, view.window_keys.device, like)
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
            if not view.is_coded and self.tokens(other) == tokens:
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
        self._keep(layer, before)
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
                engine.encode_row(view, row, keys, values, lengths[row])
            self._keep(layer, self._positions[layer], positions)
        for row, (keys, values) in new.items():
            engine.keep_row(view, row, keys, values, lengths[row])
        self._count(layer, positions)
        self._publish_lengths(layer)

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
                [torch_engine.read_window(view, which, row, 0, length) for row, length in enumerate(lengths)]
                + [tokens[i] for tokens in new.values()],
                dim=1,
            )
            for which, i in sides
        ]
        book = self.learner(samples[0], samples[1], view.config)
        before = dataclasses.replace(view)
        try:
            self._give_pages(layer, view, book)
            engine.publish(self.state(layer), layer, view)
            with self._pages_given_back_on_failure():
                self._reserve_rows(layer, lengths)
                for row, length in enumerate(lengths):
                    engine.encode_window(view, row, length)
                self._keep(layer, self.starts)
        except BaseException:
            vars(view).update(vars(before))
            self.state(layer).add_view(layer, view, () if view.kernels is None else view.kernels.tensors)
            raise
        self.learned[layer] = book
        self._publish_lengths(layer)

    def _keep(self, layer: int, before: Sequence[int], after: Sequence[int] | None = None) -> None:
        """The rows' pages between positions `before` and `after` (None: those there are) have just been written."""
        view = self.views[layer]
        if view.host is None:
            return
        counts = [
            [view.coded_tokens(length) // self.config.page_size for length in self._lengths_at(positions)]
            for positions in (before, self._positions[layer] if after is None else after)
        ]
        view.keep([page for row, a, b in zip(self.table.rows, *counts, strict=True) for page in row[a:b]])

    @contextmanager
    def _pages_given_back_on_failure(self) -> Any:
        owned = [len(pages) for pages in self.table.rows]
        try:
            yield
        except BaseException:
            self.table.truncate(owned)
            self._publish()
            raise

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
                    restored += [(view, w, row, first, torch_engine.coded_tokens(view, w, row, first, last)) for w in sides]
        for item in restored:
            torch_engine.write_window(*item)
        for layer, ends in positions.items():
            self._reused[layer] = [min(a, b) for a, b in zip(self._reused[layer], self._lengths_at(ends), strict=True)]
            self._count(layer, ends)
            self._publish_lengths(layer)
        self.table.truncate(pages)

    def reset(self) -> None:
        """Forget all tokens; storage and addresses stay, codebooks that were learnt from the tokens go."""
        self.table.truncate([0] * self.batch)
        self.starts = [0] * self.batch
        self._padding_known, self.is_stale, self._unread_steps = 0, False, 0
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
            targets, sources = torch.tensor(moved, device=view.window_keys.device).unbind(1)
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
        with _out_of_memory_as_pqc004("the exact windows"):
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
            self.states = states
            for layer, (keys, values) in staged.items():
                view, state = self.views[layer], states[keys.device]
                view.window_keys, view.window_values = keys, values
                view.counts, view.starts, view.page_table = state.counts[layer], state.starts, state.page_table
                engine.publish(state, layer, view)

        return commit

    def _publish(self) -> None:
        for state in self.states.values():
            state.set_starts(self.starts)
            state.sync_table(self.table)

    def _publish_lengths(self, layer: int) -> None:
        self.views[layer].set_lengths(self.row_lengths(layer))

    def clone(self) -> Storage:
        """An independent copy: same contents, own pages, own addresses."""
        if self.is_stale:
            self._refresh()
        new = Storage(
            self.config, self.codebook, self.num_layers, self.learner, self.codec, self.tp_rank, self.offload is not None
        )
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
        new.are_rows_independent = self.are_rows_independent
        new.learned = dict(self.learned)
        for layer, view in self.views.items():
            state = new._device_state(view.window_keys, view.window_values)
            twin = dataclasses.replace(
                view,
                key_pages=view.key_pages.new_empty(0),
                value_pages=view.value_pages.new_empty(0),
                window_keys=view.window_keys.clone(),
                window_values=view.window_values.clone(),
                counts=state.counts[layer],
                starts=state.starts,
                page_table=state.page_table,
                host=None,
            )
            if view.is_coded:
                new._give_pages(layer, twin, view.codebook)
            if copies and view.is_coded:
                old, here = torch.tensor([list(copies), list(copies.values())], device=view.key_pages.device)
                view.bring()
                twin.bring()
                twin.key_pages[here], twin.value_pages[here] = view.key_pages[old], view.value_pages[old]
                twin.keep(list(copies.values()))
            engine.publish(state, layer, twin)
            new.views[layer] = twin
            new._positions[layer], new._reused[layer] = list(self._positions[layer]), list(self._reused[layer])
            new._publish_lengths(layer)
        new._publish()
        return new

    def out_of_memory_guard(self, what: str) -> AbstractContextManager[None]:
        """Turns the device's out-of-memory error into CacheOutOfMemoryError (PQC004)."""
        return _out_of_memory_as_pqc004(what)


def _pick(numbers: Sequence[int], indices: Sequence[int | None]) -> list[int]:
    return [0 if i is None else numbers[i] for i in indices]
