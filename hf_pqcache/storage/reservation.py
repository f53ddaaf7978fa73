"""Owns pages ahead of the tokens that will fill them, and gives them back where storing fails; writes no token.

The pages of a step must be there before it: what runs on the device, a captured graph above all, can ask nobody. Steps are
counted; the device's lengths are read when so many could have filled the pages there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hf_pqcache.backends import torch_backend
from hf_pqcache.errors import CacheOutOfMemoryError, PagesExhaustedError
from hf_pqcache.storage.layers import Layers
from hf_pqcache.storage.lengths import Lengths
from hf_pqcache.storage.memory import out_of_memory_as_pqc004


class Reservation:
    """The pages that each sequence owns. Every method does what it says for all sequences, or raises and changes nothing."""

    def __init__(self, layers: Layers, lengths: Lengths) -> None:
        self._layers, self._lengths = layers, lengths

    def reserve(self, layer: int, lengths: Sequence[int], *, may_widen: bool = True) -> None:
        """Own the pages that lengths[i] tokens of sequence i need in `layer`.

        A page that a sequence is about to write and shares with another becomes a copy of its own. That happens only if the
        sequence was copied while `layer` was behind others, which had written the page already. Raises PagesExhaustedError,
        CacheOutOfMemoryError.
        """
        view, table, size = self._layers.views[layer], self._layers.table, self._layers.config.page_size
        num_pages = [view.coded_tokens(length) // size for length in lengths]
        self._make_room(num_pages, may_widen)
        shared: list[tuple[int, int]] = []
        leaving: Counter[int] = Counter()
        for seq, written in enumerate(self._lengths.num_pages(layer)):
            pages = table.rows[seq]
            for i in range(written, min(num_pages[seq], len(pages))):
                if table.allocator.references(pages[i]) - leaving[pages[i]] > 1:
                    leaving[pages[i]] += 1
                    shared.append((seq, i))
        sources = [table.rows[seq][place] for seq, place in shared]
        with out_of_memory_as_pqc004("more pages"):
            new = table.reserve(num_pages, shared)
        for other in self._layers.views.values() if shared else ():
            other.store.prefetch()
            other.store.copy_pages(sources, new)
            other.store.write_back(new)
        self._layers.sync_tables()
        self._equalise(num_pages)

    def _equalise(self, num_pages: Sequence[int]) -> None:
        """What kernels divide keys by must be there before they write a first page, whose tokens are in the window by then."""
        for layer, view in self._layers.views.items():
            if view.kernels is None or view.is_equalised:
                continue
            first, last = view.config.sink_tokens, view.config.sink_tokens + view.config.page_size
            lengths = enumerate(self._lengths.seq_lens(layer))
            seq = next((i for i, length in lengths if num_pages[i] and length >= last), None)
            if seq is not None:
                view.equalise(torch_backend.read_window(view, "key", seq, first, last))

    def reserve_positions(self, layer: int, positions: int) -> None:
        """Own the pages that `positions` positions of `layer` need, left padding included."""
        self.reserve(layer, self._lengths.at(layer, [positions] * self._layers.batch))

    def reserve_pages(self, seq: int, count: int) -> None:
        """Own at least `count` pages for one sequence."""
        wanted = [count if i == seq else 0 for i in range(self._layers.batch)]
        self._make_room(wanted, may_widen=True)
        with out_of_memory_as_pqc004("more pages"):
            self._layers.table.reserve(wanted)
        self._layers.sync_tables()

    def _make_room(self, num_pages: Sequence[int], may_widen: bool) -> None:
        """Let the tables of devices have room for so many pages of each sequence."""
        layers = self._layers
        if max(num_pages, default=0) <= layers.table_width:
            return
        layers.table.require(sum(layers.table.missing(num_pages)))  # nothing changes, tables neither, where pages are short
        if not may_widen:  # in the middle of compiled code, which goes on with the old ones
            raise PagesExhaustedError(
                f"page tables have room for {layers.max_tokens} tokens, and nobody said before this step that there would be "
                "more; build the cache with expected_tokens=, or call its get_mask_sizes() before every step"
            )
        layers.widen_tables(max(num_pages))
        self._lengths.publish()

    def owns(self, layer: int, lengths: Sequence[int]) -> bool:
        """Whether each sequence has the pages that lengths[i] tokens need in `layer`."""
        view, size = self._layers.views[layer], self._layers.config.page_size
        rows = zip(lengths, self._layers.table.rows, strict=True)
        return all(view.coded_tokens(length) // size <= len(row) for length, row in rows)

    @contextmanager
    def given_back_on_failure(self) -> Iterator[None]:
        owned = [len(pages) for pages in self._layers.table.rows]
        try:
            yield
        except BaseException:
            self._layers.table.truncate(owned)
            self._lengths.publish()
            self._layers.sync_tables()
            raise

    # -- steps whose lengths the host does not read --------------------------------------------------------------------
    def is_due(self, layer: int) -> bool:
        """Whether the coming decode step may fill a page that is not there. Reads the device for it in no step."""
        lengths = self._lengths
        lengths.unread_steps += 1
        return layer in self._layers.views and not (lengths.is_stale and self._has_room_for(layer, lengths.unread_steps))

    def reserve_ahead(self, layer: int) -> None:
        """Own the pages of the next page_size tokens, or of the next one only where there are no more."""
        tokens = self._lengths.tokens(layer)
        try:
            self.reserve_positions(layer, tokens + self._layers.config.page_size)
        except (PagesExhaustedError, CacheOutOfMemoryError):
            self.reserve_positions(layer, tokens + 1)
        self._lengths.unread_steps = 1  # the coming one; only now: reading lengths has forgotten it

    def before_append(self, layer: int, seq_lens: Sequence[int] | None) -> None:
        """The op is about to store one more token of every sequence of `layer`, which then hold `seq_lens` (None: not read).

        Whoever compiles a model by himself may call no `get_mask_sizes` between steps.
        """
        lengths = self._lengths
        if seq_lens is not None:
            if not self.owns(layer, seq_lens):
                self.reserve(layer, seq_lens, may_widen=False)
            return
        lengths.unread_appends += layer == min(self._layers.views)
        unread = max(lengths.unread_steps, lengths.unread_appends) if lengths.is_stale else 1
        if not self._has_room_for(layer, unread):
            self.reserve(layer, [length + 1 for length in lengths.seq_lens(layer)], may_widen=False)
            lengths.unread_appends = 1  # the one that is about to be

    def _has_room_for(self, layer: int, steps: int) -> bool:
        """Whether compiled steps, `steps` since lengths were read, surely have pages."""
        position = max(self._lengths.last_known(layer), default=0) + steps
        return self.owns(layer, self._lengths.at(layer, [position] * self._layers.batch))
