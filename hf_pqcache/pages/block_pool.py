"""Who owns pages, and which sequence uses them; knows no layer."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.pages.slabs import MAX_SLAB, PLACE_BITS, PageStore, Slab

#: Pages of the smallest slab. Larger ones are an eighth of what is there: what is held stays near what is used.
MIN_SLAB, GROWTH = 4, 8


@dataclass
class _SlabPages:
    """How many pages a slab has, and which of its places are free."""

    size: int
    free: list[int]


class PageAllocator:
    """Hands out page numbers in O(1), with a reference count for sharing; brings slabs of memory and gives them back.

    A page is written once, whole, and never changed while somebody refers to it: sharing it needs a count, no copy. So a
    cache and its deep copies share one allocator. A slab is as large as what is asked for or an eighth of what there is,
    and goes when its last page does.

    Args:
        first_slab: pages of the first slab at least, for those who know how many will be needed.
    """

    def __init__(self, first_slab: int = 0) -> None:
        self._first_slab = first_slab
        self._slabs: dict[int, _SlabPages] = {}
        self._references: dict[int, int] = {}
        self._stores: list[PageStore] = []
        self._tables: weakref.WeakSet[PageTable] = weakref.WeakSet()
        self._lock = threading.RLock()  # copies of a cache may live in several threads
        self._depth = 0  # calls under way in the thread that holds the lock
        self._gone: deque[PageTable] = deque()
        self.version = 0  # changes with every slab that comes or goes

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
        self._clear_gone()

    def forget(self, table: PageTable) -> None:
        """Release the pages of a cache that is gone.

        The garbage collector finds such caches in the middle of anything, a call of ours included: then at its end.
        """
        self._gone.append(table)
        self._clear_gone()

    def _clear_gone(self) -> None:
        while self._gone and self._lock.acquire(blocking=False):  # or whoever holds it comes here next
            try:
                if self._depth or not self._gone:
                    return
                self._depth += 1
                try:
                    self._gone.popleft().clear()
                finally:
                    self._depth -= 1
            finally:
                self._lock.release()

    @property
    def num_used(self) -> int:
        """Pages that somebody refers to."""
        return len(self._references)

    @property
    def num_reserved(self) -> int:
        """Pages that there is memory for."""
        return sum(slab.size for slab in self._slabs.values())

    @property
    def num_tables(self) -> int:
        """Caches that have pages from here."""
        return len(self._tables)

    def references(self, page: int) -> int:
        """How many sequences refer to `page`; 0 when it is free."""
        return self._references.get(page, 0)

    def attach(self, store: PageStore) -> None:
        """Let `store` hold memory for all pages from now on. Raises torch.OutOfMemoryError, nothing changed."""
        with self._at_work():
            try:
                for number, slab in self._slabs.items():
                    store.add(number, store.new_slab(number, slab.size))
            except BaseException:
                for number in self._slabs:
                    store.drop(number)
                raise
            self._stores.append(store)

    def detach(self, store: PageStore) -> None:
        """Let go of the memory of a store that nobody reads any more."""
        with self._at_work():
            self._stores.remove(store)
            for number in self._slabs:
                store.drop(number)

    def allocate(self, count: int, most: int | None = None) -> list[int]:
        """Take `count` free pages, each with one reference; `most` is how many the caller may have at all.

        Raises torch.OutOfMemoryError and takes none if there is no memory for them.
        """
        with self._at_work():
            missing = count - sum(len(slab.free) for slab in self._slabs.values())
            if missing > 0:
                self._grow(missing, most)
            pages: list[int] = []
            for number, slab in self._slabs.items():
                taken = min(count - len(pages), len(slab.free))
                pages += [number << PLACE_BITS | slab.free.pop() for _ in range(taken)]
            self._references.update(dict.fromkeys(pages, 1))
            return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page."""
        with self._at_work():
            for page in pages:
                if page not in self._references:
                    raise ValueError(f"page {page} is free and cannot be shared")
                self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference of each page; a page without any is free, a slab without any page in use goes."""
        with self._at_work():
            has_empty_slab = False
            for page in pages:
                if page not in self._references:
                    raise ValueError(f"page {page} is already free")
                self._references[page] -= 1
                if self._references[page] == 0:
                    del self._references[page]
                    slab = self._slabs[page >> PLACE_BITS]
                    slab.free.append(page & (MAX_SLAB - 1))
                    has_empty_slab |= len(slab.free) == slab.size
            if has_empty_slab:
                self._drop_empty_slabs()

    def _grow(self, missing: int, most: int | None) -> None:
        wanted = max(missing, MIN_SLAB, self.num_reserved // GROWTH, 0 if self._slabs else self._first_slab)
        wanted = min(wanted, MAX_SLAB, wanted if most is None else max(missing, most - self.num_reserved))
        number = next(i for i in range(len(self._slabs) + 1) if i not in self._slabs)
        try:
            self._add_slab(number, wanted)
        except torch.OutOfMemoryError:
            if wanted == missing:
                raise
            self._add_slab(number, missing)

    def _add_slab(self, number: int, size: int) -> None:
        made: list[tuple[PageStore, Slab]] = []
        try:
            for store in self._stores:
                made.append((store, store.new_slab(number, size)))
        except BaseException:
            for store, _ in made:
                store.drop(number)
            raise
        for store, slab in made:
            store.add(number, slab)
        self._slabs[number] = _SlabPages(size, list(range(size - 1, -1, -1)))
        self.version += 1

    def _drop_empty_slabs(self) -> None:
        """One small empty slab stays, so that a sequence at its border does not bring and drop it in turn."""
        empty = [number for number, slab in self._slabs.items() if len(slab.free) == slab.size]
        spare = min(empty, key=lambda number: self._slabs[number].size)
        if self._slabs[spare].size <= max(MIN_SLAB, self.num_used // GROWTH):
            empty.remove(spare)
        for number in empty:
            del self._slabs[number]
            for store in self._stores:
                store.drop(number)
        self.version += bool(empty)


class PageTable:
    """Side pages each sequence (row) of a cache uses, in the order of its tokens; one for all layers.

    `version` changes with every change, so that device copies know when they are stale.

    Args:
        max_pages: most different pages that the rows may have together; None: as many as there is memory for.
    """

    def __init__(self, allocator: PageAllocator, num_rows: int, max_pages: int | None = None) -> None:
        self.allocator = allocator
        self.max_pages = max_pages
        self.rows: list[list[int]] = [[] for _ in range(num_rows)]
        self.version = 0
        self._owned: Counter[int] = Counter()
        allocator._tables.add(self)

    @property
    def num_used(self) -> int:
        """Different pages that the rows have."""
        return len(self._owned)

    @property
    def num_free(self) -> int:
        """Pages that the rows may still take: up to `max_pages`, or without it what there is memory for already."""
        if self.max_pages is not None:
            return self.max_pages - self.num_used
        return self.allocator.num_reserved - self.allocator.num_used

    def require(self, count: int) -> None:
        """Raise PagesExhaustedError if `count` more pages are above `max_pages`."""
        if self.max_pages is not None and self.num_used + count > self.max_pages:
            raise PagesExhaustedError(
                f"{count} more pages are needed and {self.num_free} of max_pages={self.max_pages} are free; "
                f"build the cache with max_pages={self.num_used + count} or more, or free sequences first"
            )

    def missing(self, counts: Sequence[int]) -> list[int]:
        """How many pages row r lacks to have counts[r]."""
        return [max(0, count - len(row)) for row, count in zip(self.rows, counts, strict=True)]

    def reserve(self, counts: Sequence[int], shared: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Give row r at least counts[r] pages, and (row, place) in `shared` a page of its own, all rows or none.

        Returns the new pages of the places in `shared`: the caller copies the contents. Raises PagesExhaustedError or
        torch.OutOfMemoryError and changes nothing.
        """
        missing = self.missing(counts)
        num_new = sum(missing) + len(shared)
        if not num_new:
            return []
        self.require(num_new)
        pages = self.allocator.allocate(num_new, self.max_pages)
        self._owned.update(pages)
        pages.reverse()  # each row gets its pages in their order in memory
        for row, count in zip(self.rows, missing, strict=True):
            row.extend(pages.pop() for _ in range(count))
        for (r, place), page in zip(shared, pages, strict=True):
            self._release([self.rows[r][place]])
            self.rows[r][place] = page
        self.version += 1
        return pages

    def truncate(self, counts: Sequence[int]) -> None:
        """Keep the first counts[r] pages of row r at most and release the rest."""
        for row, count in zip(self.rows, counts, strict=True):
            if len(row) > count:
                self._release(row[count:])
                del row[count:]
                self.version += 1

    def clear(self) -> None:
        """Release everything."""
        self.truncate([0] * len(self.rows))

    def select(self, indices: Sequence[int | None], owned: Sequence[int] | None = None) -> None:
        """Row i becomes a copy of row indices[i], of its first owned[i] pages, or empty; pages are shared by count.

        A row that stays in its place keeps all its pages.
        """
        old = self.rows
        self.rows = [
            [] if j is None else old[i] if i == j else self._share(old[j] if owned is None else old[j][: owned[i]])
            for i, j in enumerate(indices)
        ]
        for i, row in enumerate(old):
            if i >= len(indices) or indices[i] != i:
                self._release(row)
        self.version += 1

    def twin(self, counts: Sequence[int]) -> PageTable:
        """Another cache's table with the first counts[r] pages of row r, shared by count."""
        new = PageTable(self.allocator, 0, self.max_pages)
        new.rows = [new._share(row[:count]) for row, count in zip(self.rows, counts, strict=True)]
        return new

    def _share(self, pages: Sequence[int]) -> list[int]:
        self.allocator.share(pages)
        self._owned.update(pages)
        return list(pages)

    def _release(self, pages: Sequence[int]) -> None:
        self.allocator.release(pages)
        self._owned.subtract(pages)
        for page in pages:
            if not self._owned[page]:
                del self._owned[page]

    def to_array(self, width: int) -> np.ndarray:
        """int64 (rows, width): page numbers, -1 where a row has no page."""
        table = np.full((len(self.rows), width), -1, dtype=np.int64)
        for i, row in enumerate(self.rows):
            table[i, : len(row)] = row
        return table
