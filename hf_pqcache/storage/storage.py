"""The sequences of a cache: how they grow, shrink, move and are copied; knows no transformers.

Whatever raises leaves the storage as it was: what may fail, allocating above all, comes before what changes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_pqcache.backends import store, torch_backend
from hf_pqcache.config import Side
from hf_pqcache.pages.layer_kv import LayerView
from hf_pqcache.storage.layers import Layers
from hf_pqcache.storage.lengths import Lengths
from hf_pqcache.storage.reservation import Reservation

#: Keys and values (H, T, d) that a sequence is about to get.
NewTokens = dict[int, tuple[Tensor, Tensor]]


class Storage:
    """The sequences of one cache, by their place in its batch.

    Attributes:
        layers: what they are stored in.
        lengths: how many tokens each has.
        reservation: the pages each owns.
        are_independent: each advances by itself, as cache/sequences.py has them.
    """

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.lengths = Lengths(layers)
        self.reservation = Reservation(layers, self.lengths)
        self.are_independent = False
        before_append = weakref.WeakMethod(self.reservation.before_append)  # states are among what `layers` holds
        layers.call_before_append(lambda layer, lengths: None if (call := before_append()) is None else call(layer, lengths))

    # -- between steps -----------------------------------------------------------------------------------------------
    def set_batch(self, batch: int) -> None:
        """Hold `batch` sequences from now on. Raises ValueError if there are tokens of another number of them."""
        if batch == self.layers.batch:
            return
        if any(self.lengths.tokens(layer) for layer in self.layers.views):
            raise ValueError(
                f"the cache holds {self.layers.batch} sequences, not {batch}; batch_repeat_interleave() and "
                "batch_select_indices() change their number and keep their tokens, reset() forgets them"
            )
        self.select([None] * batch)

    def check_in_step(self) -> None:
        """Raises ValueError in a cache whose sequences advance each by itself."""
        if self.are_independent:
            raise ValueError(
                "the cache holds sequences made by allocate_sequence; use append_tokens, fork_sequence and crop_sequence "
                "for them, or reset() the cache before generate"
            )

    def open(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Make room for a layer's first tokens, which are like keys, values (..., H, T, d); see `Layers.open`."""
        self.layers.open(layer, keys, values)
        self.lengths.count(layer, [0] * self.layers.batch)
        self._publish()

    def before_step(self, layer: int) -> None:
        """Between two decode steps: own the page that the coming one may fill, without reading the device if possible."""
        layer = self.longest(layer)
        if self.reservation.is_due(layer):
            self.reservation.reserve_ahead(layer)

    def longest(self, layer: int) -> int:
        """The layer that needs most pages; `layer` where all need as many."""
        removed, views = self.lengths.removed, self.layers.views
        return min(views, key=lambda i: removed.get(i, 0)) if self.lengths.is_ragged else layer

    # -- storing -----------------------------------------------------------------------------------------------------
    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store keys, values (B, H, T, d), the newest positions of `layer` in all sequences, left padding skipped."""
        end = self.lengths.tokens(layer) + keys.shape[2]
        self._append(layer, self._new_tokens(layer, keys, values), [end] * self.layers.batch)
        self.lengths.padding_is_known(layer)

    def append_pruned(self, layer: int, keys: Tensor, values: Tensor, positions: int, counts_removed: bool) -> None:
        """Store keys, values (B, H, n, d), what is left of the first `positions` positions of `layer` in all sequences.

        counts_removed: see `Lengths`.
        """
        self.lengths.note_removed(layer, positions - keys.shape[2], positions, counts_removed)
        self._append(layer, dict(enumerate(zip(keys, values, strict=True))), [positions] * self.layers.batch)
        self.lengths.padding_is_known(layer)
        self.lengths.publish_ahead()

    def append_sequence(self, layer: int, seq: int, keys: Tensor, values: Tensor) -> None:
        """Store keys, values (H, T, d), the newest tokens of one sequence in `layer`."""
        ends = list(self.lengths.positions(layer))
        ends[seq] += keys.shape[1]
        self._append(layer, {seq: (keys, values)}, ends)

    def advance(self, layer: int, count: int) -> None:
        """Record `count` positions that an op has stored and counted on the device itself."""
        before = self.lengths.last_known(layer)
        self.lengths.count(layer, [position + count for position in before])
        self.lengths.unread_appends = 0
        self._write_back(layer, before)
        self.lengths.padding_is_known(layer)

    def _new_tokens(self, layer: int, keys: Tensor, values: Tensor) -> NewTokens:
        """What each sequence gets of keys, values (B, H, T, d): all but its left padding."""
        first, count = self.lengths.tokens(layer), keys.shape[2]
        skips = [min(max(0, pad - first), count) for pad in self.lengths.left_pad]
        return {seq: (keys[seq, :, skip:], values[seq, :, skip:]) for seq, skip in enumerate(skips)}

    def _append(self, layer: int, new: NewTokens, positions: list[int]) -> None:
        view, seq_lens = self.layers.views[layer], self.lengths.seq_lens(layer)
        with self.reservation.given_back_on_failure():
            self.reservation.reserve(layer, self.lengths.at(layer, positions))
            for seq, (keys, values) in new.items():
                store.write_pages(view, seq, keys, values, seq_lens[seq])
            self._write_back(layer, self.lengths.positions(layer), positions)
        for seq, (keys, values) in new.items():
            store.write_recent_window(view, seq, keys, values, seq_lens[seq])
        self.lengths.count(layer, positions)
        self.lengths.publish_layer(layer)

    def _write_back(self, layer: int, before: Sequence[int], after: Sequence[int] | None = None) -> None:
        """The pages between positions `before` and `after` (None: those there are) have just been written."""
        if self.layers.offload is None:
            return
        spans = zip(self.layers.table.rows, *(self.lengths.num_pages(layer, at) for at in (before, after)), strict=True)
        if pages := [page for row, first, last in spans for page in row[first:last]]:
            self.layers.views[layer].store.write_back(pages)

    def fit_dtypes(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values in dtypes that also hold what `layer` has, which it then has in these dtypes, without loss.

        As torch.cat does it for DynamicCache: what was stored under autocast goes on in float32. Raises ValueError for new
        ones on another device.
        """
        view = self.layers.views[layer]
        if keys.device != view.device:
            raise ValueError(
                f"layer {layer}: tokens lie on {view.device} and new ones come on {keys.device}: leave the model where it was, "
                "or import_sequence() with device="
            )
        held = view.window_keys.dtype, view.window_values.dtype
        wanted = torch.promote_types(held[0], keys.dtype), torch.promote_types(held[1], values.dtype)
        if wanted != held:
            self.layers.promote(layer, *wanted)
            self._publish()
        return keys.to(wanted[0]), values.to(wanted[1])

    # -- taking away -------------------------------------------------------------------------------------------------
    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` positions. Tokens that fall back into the window are restored from their pages."""
        ends = {layer: [min(p, tokens) for p in self.lengths.positions(layer)] for layer in self.layers.views}
        self._shorten(ends, range(self.layers.batch))
        self.lengths.crop(tokens)
        self._publish()

    def crop_layer(self, layer: int, count: int) -> None:
        """Remove the last `count` tokens of one layer in all sequences."""
        ends = {layer: [position - count for position in self.lengths.positions(layer)]}
        self._shorten({i: self.lengths.positions(i) for i in self.layers.views} | ends, range(self.layers.batch))
        self._publish()

    def crop_sequence(self, seq: int, length: int) -> None:
        """Keep the first `length` tokens of one sequence."""
        end = self.lengths.left_pad[seq] + length
        ends = {layer: list(self.lengths.positions(layer)) for layer in self.layers.views}
        for positions in ends.values():
            positions[seq] = min(positions[seq], end)
        self._shorten(ends, [seq])
        self._publish()

    def roll_back(self, most: int | None = None) -> int:
        """Keep the positions that all layers hold, `most` at most, and no page more -> their number."""
        complete = self.lengths.complete()
        complete = complete if most is None else min(complete, most)
        self.crop(complete)
        return complete

    def _shorten(self, positions: dict[int, list[int]], sequences: Sequence[int]) -> None:
        """Take `sequences` back to the given positions of each layer; they keep no page that this leaves unwritten."""
        table, lengths = self.layers.table, self.lengths
        pages = [0 if seq in sequences else len(owned) for seq, owned in enumerate(table.rows)]
        restored: list[tuple[LayerView, Side, int, int, Tensor]] = []
        sides: tuple[Side, ...] = ("key", "value")
        for layer, view in self.layers.views.items():
            sinks, old, new = view.config.sink_tokens, lengths.seq_lens(layer), lengths.at(layer, positions[layer])
            for seq in sequences:
                coded = view.coded_tokens(new[seq])
                pages[seq] = max(pages[seq], coded // view.config.page_size)
                first = sinks + coded
                last = min(new[seq], sinks + view.coded_tokens(old[seq]), lengths.reused[layer][seq])
                if first < last:
                    restored += [(view, w, seq, first, torch_backend.coded_tokens(view, w, seq, first, last)) for w in sides]
        for item in restored:
            torch_backend.write_window(*item)
        for layer, ends in positions.items():
            lengths.shorten(layer, ends)
        table.truncate(pages)

    def reset(self) -> None:
        """Forget all tokens; storage and addresses stay."""
        self.layers.table.clear()
        self.lengths.reset()
        for state in self.layers.states.values():
            state.flags.zero_()
        self._publish()

    # -- rearranging -------------------------------------------------------------------------------------------------
    @torch.inference_mode(False)
    def select(self, indices: Sequence[int | None]) -> None:
        """Sequence i becomes a copy of sequence indices[i], or an empty one. Pages are shared by count, only windows copied.

        A sequence that stays in its place, or moves whole, keeps the pages reserved for it; copies own what is written.
        """
        commit = self.layers.stage_windows(indices)
        written, copied = self.lengths.written_pages(), Counter(indices)
        table = self.layers.table
        owned = [
            0 if j is None else len(table.rows[j]) if i == j or copied[j] == 1 else written[j] for i, j in enumerate(indices)
        ]
        table.select(indices, owned)
        self.lengths.select(indices)
        commit()
        self._publish()

    def fork(self, source: int, target: int) -> None:
        """Make sequence `target` a copy of `source`."""
        self.select([source if seq == target else seq for seq in range(self.layers.batch)])

    def free(self, seq: int) -> None:
        """Make a sequence empty; pages that no other one shares are free at once."""
        self.select([None if other == seq else other for other in range(self.layers.batch)])

    def clone(self) -> Storage:
        """An independent copy: same contents, own windows and tables; pages are shared by count, as they never change."""
        new = Storage(self.layers.twin(self.lengths.written_pages()))
        new.lengths.follow(self.lengths)
        new.are_independent = self.are_independent
        new._publish()
        return new

    def _publish(self) -> None:
        """Bring page tables and lengths to the devices."""
        self.layers.sync_tables()
        self.lengths.publish()
