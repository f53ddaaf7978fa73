"""The sequences of a cache: how they grow, shrink, move and are copied; knows no transformers.

Whatever raises leaves the storage as it was: what may fail, allocating above all, comes before what changes.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_pqcache.backends import dispatch, store, torch_backend
from hf_pqcache.codebook.codebook import LayerCodebook
from hf_pqcache.config import PQConfig
from hf_pqcache.errors import WindowOverflowError
from hf_pqcache.pages.layer_kv import LayerView
from hf_pqcache.pages.slabs import Which
from hf_pqcache.storage.layers import Layers
from hf_pqcache.storage.lengths import Lengths
from hf_pqcache.storage.reservation import Reservation

#: Keys and values (H, T, d) that a sequence is about to get.
NewTokens = dict[int, tuple[Tensor, Tensor]]
Learner = Callable[[Tensor, Tensor, PQConfig], LayerCodebook]


class Storage:
    """The sequences of one cache, by their place in its batch.

    Attributes:
        layers: what they are stored in.
        lengths: how many tokens each has.
        reservation: the pages each owns.
        are_independent: each advances by itself, as cache/sequences.py has them.
        learner: makes the codebook of a layer from its keys and values (H, N, d); used without a codebook only.
    """

    def __init__(self, layers: Layers, learner: Learner) -> None:
        self.layers = layers
        self.lengths = Lengths(layers)
        self.reservation = Reservation(layers, self.lengths)
        self.are_independent = False
        self.learner = learner
        self.learned: dict[int, LayerCodebook] = {}
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
        if not self.reservation.is_due(layer):
            return
        tokens = self.lengths.tokens(layer)
        for other, view in self.layers.views.items():  # what compiled steps have gathered may be enough to learn from
            if not view.is_coded and self.lengths.tokens(other) == tokens:
                self.learn_if_due(other, view.window_keys[:, :, :0], view.window_values[:, :, :0])
        self.reservation.reserve_ahead(layer)

    # -- storing -----------------------------------------------------------------------------------------------------
    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store keys, values (B, H, T, d), the newest positions of `layer` in all sequences, left padding skipped."""
        end = self.lengths.tokens(layer) + keys.shape[2]
        self._append(layer, self._new_tokens(layer, keys, values), [end] * self.layers.batch)
        self.lengths.padding_is_known(layer)

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
            if not view.is_coded:
                self._learn_if_due(layer, new)
            self.reservation.reserve(layer, self.lengths.at(positions))
            for seq, (keys, values) in new.items():
                store.write_pages(view, seq, keys, values, seq_lens[seq])
            self._write_back(layer, self.lengths.positions(layer), positions)
        for seq, (keys, values) in new.items():
            store.write_recent_window(view, seq, keys, values, seq_lens[seq])
        self.lengths.count(layer, positions)
        self.lengths.publish_layer(layer)

    def learn_if_due(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Without a codebook: learn the layer's once enough tokens are there, from them and the new ones (B, H, T, d)."""
        if not self.layers.views[layer].is_coded:
            self._learn_if_due(layer, self._new_tokens(layer, keys, values))

    @torch.no_grad()
    def _learn_if_due(self, layer: int, new: NewTokens) -> None:
        view, seq_lens, learn_tokens = self.layers.views[layer], self.lengths.seq_lens(layer), self.layers.learn_tokens
        added = [new[seq][0].shape[1] if seq in new else 0 for seq in range(self.layers.batch)]
        longest = max(length + more for length, more in zip(seq_lens, added, strict=True))
        if sum(seq_lens) + sum(added) < learn_tokens:
            if longest > self.layers.config.sink_tokens + view.window_slots:
                raise WindowOverflowError(
                    f"{longest} tokens without a codebook do not fit the exact window of {view.window_slots}; "
                    f"pass a codebook, or lower learn_tokens={learn_tokens}"
                )
            return
        sides: tuple[tuple[Which, int], ...] = (("key", 0), ("value", 1))
        samples = [
            torch.cat(
                [torch_backend.read_window(view, which, seq, 0, length) for seq, length in enumerate(seq_lens)]
                + [tokens[i] for tokens in new.values()],
                dim=1,
            )
            for which, i in sides
        ]
        book = self.learner(samples[0], samples[1], view.config)
        before = dataclasses.replace(view)
        try:
            self.layers.give_pages(layer, view, book)
            dispatch.publish(self.layers.state(layer), layer, view)
            with self.reservation.given_back_on_failure():
                self.reservation.reserve(layer, seq_lens)
                for seq, length in enumerate(seq_lens):
                    store.write_window_as_pages(view, seq, length)
                self._write_back(layer, self.lengths.left_pad)
        except BaseException:
            vars(view).update(vars(before))
            self.layers.state(layer).add_view(layer, view, () if view.kernels is None else view.kernels.tensors)
            raise
        self.learned[layer] = book
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

        As torch.cat does it for DynamicCache: what was stored under autocast goes on in float32.
        """
        view = self.layers.views[layer]
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
        restored: list[tuple[LayerView, Which, int, int, Tensor]] = []
        sides: tuple[Which, ...] = ("key", "value")
        for layer, view in self.layers.views.items():
            sinks, old, new = view.config.sink_tokens, lengths.seq_lens(layer), lengths.at(positions[layer])
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
        """Forget all tokens; storage and addresses stay, codebooks that were learnt from the tokens go."""
        self.layers.table.clear()
        self.lengths.reset()
        for state in self.layers.states.values():
            state.flags.zero_()
        for layer in self.learned:
            self.layers.views[layer].is_coded = False
        self.learned.clear()
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
        new = Storage(self.layers.twin(self.lengths.written_pages()), self.learner)
        new.lengths.follow(self.lengths)
        new.are_independent, new.learned = self.are_independent, dict(self.learned)
        new._publish()
        return new

    def _publish(self) -> None:
        """Bring page tables and lengths to the devices."""
        self.layers.sync_tables()
        self.lengths.publish()
