"""Who owns pages, which sequence uses them, and what attention reads of a layer; knows no transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_pqcache.config import PQConfig
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.offload import HostPages
from hf_pqcache.pages import CODED, PageCodec


class PageAllocator:
    """Hands out page numbers 0..num_pages-1 through a free list in O(1), with a reference count for sharing.

    A page is written once, whole, and never changed while somebody refers to it: sharing it needs a count, no copy.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def references(self, page: int) -> int:
        """How many sequences refer to `page`; 0 when it is free."""
        return self._references[page]

    def require(self, count: int) -> None:
        """Raise PagesExhaustedError if fewer than `count` pages are free."""
        if count > len(self._free):
            raise PagesExhaustedError(
                f"{count} more pages are needed and {len(self._free)} of {self.num_pages} are free; "
                f"build the cache with max_pages={self.num_used + count} or more, or free sequences first"
            )

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each with one reference. Raises PagesExhaustedError and takes none if too few are free."""
        self.require(count)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page."""
        for page in pages:
            if self._references[page] == 0:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference of each page; a page without any returns to the free list."""
        for page in pages:
            if self._references[page] == 0:
                raise ValueError(f"page {page} is already free")
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)


class PageTable:
    """Which pages each sequence (row) uses, in the order of its tokens; one for all layers of a cache.

    `version` changes with every change, so that device copies know when they are stale.
    """

    def __init__(self, allocator: PageAllocator, num_rows: int) -> None:
        self.allocator = allocator
        self.rows: list[list[int]] = [[] for _ in range(num_rows)]
        self.version = 0

    def reserve(self, counts: Sequence[int], shared: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Give row r at least counts[r] pages, and (row, place) in `shared` a page of its own, all rows or none.

        Returns the new pages of the places in `shared`: the caller copies the contents. Raises PagesExhaustedError and
        changes nothing.
        """
        missing = [max(0, count - len(row)) for row, count in zip(self.rows, counts, strict=True)]
        if not any(missing) and not shared:
            return []
        pages = self.allocator.allocate(sum(missing) + len(shared))
        for row, count in zip(self.rows, missing, strict=True):
            row.extend(pages.pop() for _ in range(count))
        self.allocator.release([self.rows[r][place] for r, place in shared])
        for (r, place), page in zip(shared, pages, strict=True):
            self.rows[r][place] = page
        self.version += 1
        return pages

    def truncate(self, counts: Sequence[int]) -> None:
        """Keep the first counts[r] pages of row r at most and release the rest."""
        for row, count in zip(self.rows, counts, strict=True):
            if len(row) > count:
                self.allocator.release(row[count:])
                del row[count:]
                self.version += 1

    def copy(self, source: int, target: int, count: int) -> None:
        """Let row `target`, which must have no page, share the first `count` pages of row `source`."""
        if self.rows[target]:
            raise ValueError(f"row {target} still has {len(self.rows[target])} pages; free them first")
        pages = self.rows[source][:count]
        self.allocator.share(pages)
        self.rows[target] = pages
        self.version += 1

    def select(self, indices: Sequence[int | None]) -> None:
        """Row i becomes a copy of row indices[i], or an empty row; pages are shared by count, none is copied."""
        rows = [[] if i is None else list(self.rows[i]) for i in indices]
        for row in rows:
            self.allocator.share(row)
        for row in self.rows:
            self.allocator.release(row)
        self.rows = rows
        self.version += 1

    def to_tensor(self, width: int) -> Tensor:
        """int32 (rows, width) on the CPU, -1 where a row has no page."""
        table = np.full((len(self.rows), width), -1, dtype=np.int32)
        for i, row in enumerate(self.rows):
            table[i, : len(row)] = row
        return torch.from_numpy(table)


@dataclass
class LayerView:
    """Everything that append and attention touch of one layer; tensors keep their addresses while the cache lives.

    A row is one sequence. Its token t (0-based, its own count) is kept: t < sink_tokens exactly, in window slot t; the
    next `coded_tokens(length)` in pages, the i-th of them in page `page_table[row, i // page_size]`; the newest
    exactly, in window slot `sink_tokens + (t - sink_tokens) % window_slots`.

    Attributes:
        config: shape of the cache.
        num_subspaces: M of this layer.
        key_pages, value_pages: (max_pages, num_kv_heads, ...): whole pages as `codec` stores them: codes, uint8 in the
            order of `layout`; or exact tokens, model dtype (..., page_size, head_dim).
        key_centroids, value_centroids: float16 (num_kv_heads, M, 2**num_bits, head_dim / M); empty for exact pages.
        is_coded: whether pages can be written; until a layer has the centroids they need, all tokens stay in the window.
        window_keys, window_values: model dtype (batch, num_kv_heads, sink_tokens + window_slots, head_dim).
        counts: int32 (batch, 2): tokens of each row, and how many of them are codes, kept on the device; advanced by
            append.
        starts: int32 (batch): position in the attention mask of each row's first token (its left padding).
        page_table: int32 (batch, width): the row's pages in order; unused entries are -1.
        codebook: the `LayerCodebook` that the centroids are from, None before there is one.
        kernels: what the CUDA engine prepared for this layer (`cuda_engine.Prepared`), None where plain torch serves it.
        codec: what a page holds.
        device: of all tensors. Code that is compiled asks here, where it need not check a tensor of every layer in each step.
        host: the pages in host memory if they lie there; key_pages and value_pages are then shared with other layers, and
            hold this layer's after `bring`.
    """

    config: PQConfig
    num_subspaces: int
    key_pages: Tensor
    value_pages: Tensor
    key_centroids: Tensor
    value_centroids: Tensor
    window_keys: Tensor
    window_values: Tensor
    counts: Tensor
    starts: Tensor
    page_table: Tensor
    is_coded: bool = True
    codebook: Any = None
    kernels: Any = None
    codec: PageCodec = CODED
    host: HostPages | None = None
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = self.window_keys.device

    def bring(self) -> None:
        """To be called before pages are read or written."""
        if self.host is not None:
            self.host.bring()

    def keep(self, pages: Sequence[int]) -> None:
        """To be called after `pages` have been written."""
        if self.host is not None and pages:
            self.host.keep(pages)

    @property
    def lengths(self) -> Tensor:
        """int32 (batch): tokens of each row."""
        return self.counts[:, 0]

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Write the counts of rows that hold `lengths` tokens."""
        # Not waited for: the driver has taken a copy of such a small pageable tensor when the call returns.
        counts = torch.tensor([[n, self.coded_tokens(n)] for n in lengths], dtype=torch.int32)
        self.counts.copy_(counts, non_blocking=True)

    @property
    def window_slots(self) -> int:
        """Ring slots of the window: `config.window_slots`, or more where a codebook has yet to be learnt."""
        return self.window_keys.shape[2] - self.config.sink_tokens

    def coded_tokens(self, length: int) -> int:
        """How many of a row's first `length` tokens are in pages; none before the layer has a codebook."""
        return self.config.coded_tokens(length) if self.is_coded else 0
