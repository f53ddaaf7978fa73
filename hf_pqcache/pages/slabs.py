"""The memory of one layer's pages, in slabs that come and go with the pages in use; knows page numbers, no sequence.

What a cache holds follows what it uses, so its pages cannot be one tensor made in advance, and a tensor that is replaced
by a larger one would be there twice while it is copied. Instead, memory comes in slabs. A page's number names its slab and
its place there, for good, whatever other slabs come and go.

Kernels know no slabs. They find page `id` at `base + id * stride`. A page is its keys, then its values, each from a multiple
of 16 bytes on; `stride` is both together, and slabs begin at multiples of it; so the distance of a page from the layer's
lowest slab is a whole number of pages, which `device_ids` works out for the page table of the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor

from hf_pqcache.config import Side

#: A page's number is `slab << PLACE_BITS | place`.
PLACE_BITS = 20
MAX_SLAB = 1 << PLACE_BITS


class PageSpec(NamedTuple):
    """One side, keys or values, of one page: its shape (num_kv_heads, ...) and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def padded_nbytes(self) -> int:
        """Bytes from one side to the next: pages begin where memory is read 64 bytes at a time."""
        return -(-self.nbytes // 64) * 64


class Slab(NamedTuple):
    """Memory of some pages: keys (n, num_kv_heads, ...), values likewise, and all bytes allocated for them."""

    keys: Tensor
    values: Tensor
    nbytes: int

    def side(self, which: Side) -> Tensor:
        return self.keys if which == "key" else self.values


class PageStore:
    """The pages of one layer.

    Args:
        keys, values: what one page holds.
        device: where slabs lie.
        max_id: kernels count places of a layer in 32 bits, which bounds how far apart its slabs may lie, in pages.
    """

    def __init__(self, keys: PageSpec, values: PageSpec, device: torch.device, max_id: int = 1 << 30) -> None:
        self.keys, self.values, self.device, self.max_id = keys, values, device, max_id
        self.slabs: dict[int, Slab] = {}
        self.version = 0  # changes with every change of addresses

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values, and so from one page of a slab to the next."""
        return self.keys.padded_nbytes + self.values.padded_nbytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all slabs on the device."""
        return sum(slab.nbytes for slab in self.slabs.values())

    # -- slabs that come and go ------------------------------------------------------------------------------------
    def new_slab(self, number: int, size: int) -> Slab:
        """Memory for `size` pages, not yet part of the store. Raises torch.OutOfMemoryError, the store as it was."""
        slab = allocate(self.keys, self.values, size, self.device)
        stride, slabs = self.page_bytes, [*self.slabs.values(), slab]
        lowest = min(s.keys.data_ptr() for s in slabs)
        # Nothing counts in 32 bits on a CPU, whose heap and mapped memory lie far apart.
        if (
            self.device.type == "cuda"
            and max(s.keys.data_ptr() + len(s.keys) * stride - lowest for s in slabs) > self.max_id * stride
        ):
            raise torch.OutOfMemoryError(f"free memory of {self.device} is too scattered: slabs of a layer lie too far apart")
        return slab

    def add(self, number: int, slab: Slab) -> None:
        self.slabs[number] = slab
        self.version += 1

    def drop(self, number: int) -> None:
        """Give a slab back; without one of this number nothing happens."""
        if self.slabs.pop(number, None) is not None:
            self.version += 1

    # -- addresses -------------------------------------------------------------------------------------------------
    @property
    def bases(self) -> tuple[int, int]:
        """Addresses from which kernels count pages of keys and of values; 0 before there is a slab."""
        lowest = min(self.slabs.values(), key=lambda slab: slab.keys.data_ptr(), default=None)
        return (0, 0) if lowest is None else (lowest.keys.data_ptr(), lowest.values.data_ptr())

    def device_ids(self, pages: np.ndarray) -> np.ndarray:
        """Page numbers, -1 for none -> int32 ids by which kernels find them, -1 for none."""
        if not self.slabs:
            return np.full(pages.shape, -1, dtype=np.int32)
        first_ids = np.zeros(max(self.slabs) + 1, dtype=np.int64)
        base = self.bases[0]
        for number, slab in self.slabs.items():
            first_ids[number] = (slab.keys.data_ptr() - base) // self.page_bytes
        found = np.maximum(pages, 0)
        ids = first_ids[found >> PLACE_BITS] + (found & (MAX_SLAB - 1))
        return np.where(pages < 0, -1, ids).astype(np.int32)

    # -- contents, for those who read and write by page number -------------------------------------------------------
    def read(self, which: Side, pages: Sequence[int]) -> Tensor:
        """(n, num_kv_heads, ...): one side of `pages`, to be read only."""
        parts = list(self._by_slab(pages))
        if len(parts) == 1:  # as nearly always in a short sequence
            return self.slabs[parts[0][0]].side(which)[parts[0][2]]
        spec = self.keys if which == "key" else self.values
        out = torch.empty((len(pages), *spec.shape), dtype=spec.dtype, device=self.device)
        for number, at, places in parts:
            out[at] = self.slabs[number].side(which)[places]
        return out

    def write(self, which: Side, pages: Sequence[int], x: Tensor) -> None:
        """Store x (n, num_kv_heads, ...) as one side of `pages`."""
        for number, at, places in self._by_slab(pages):
            self.slabs[number].side(which)[places] = x[at]

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Make pages `targets` copies of pages `sources`."""
        for which in ("key", "value"):
            self.write(which, targets, self.read(which, sources))

    def _by_slab(self, pages: Sequence[int]) -> Iterator[tuple[int, slice | Tensor, slice | Tensor]]:
        """(slab, positions in `pages`, places in the slab) for each slab that has any; a slice where one will do."""
        numbers = np.asarray(pages, dtype=np.int64)
        slabs = numbers >> PLACE_BITS
        if len(pages) and (slabs == slabs[0]).all():
            yield int(slabs[0]), slice(0, len(pages)), self._index(numbers & (MAX_SLAB - 1))
            return
        for number in np.unique(slabs):
            at = np.flatnonzero(slabs == number)
            yield int(number), self._index(at), self._index(numbers[at] & (MAX_SLAB - 1))

    def _index(self, at: np.ndarray) -> slice | Tensor:
        if (np.diff(at) == 1).all():
            return slice(int(at[0]), int(at[-1]) + 1)
        return torch.from_numpy(at).to(self.device, non_blocking=True)  # copied at once, the device is not waited for

    # -- what a store in host memory does besides (offload.py) ---------------------------------------------------------
    host_bytes = 0  # of slabs on the host
    staged_page_bytes = 0  # what a page on the host takes on the device

    def prefetch(self) -> None:
        """Have all pages on the device, for what is queued on the current stream from now on."""

    def write_back(self, pages: Sequence[int]) -> None:
        """Let `pages`, just written on the device, be kept."""


@torch.inference_mode(False)
def allocate(keys: PageSpec, values: PageSpec, size: int, device: torch.device) -> Slab:
    """Uninitialised memory for `size` pages, laid out as kernels want it. Raises torch.OutOfMemoryError."""
    stride = keys.padded_nbytes + values.padded_nbytes
    if device.type == "cpu":
        check_host(size * stride)
    memory = torch.empty((size + 1) * stride, dtype=torch.uint8, device=device)
    begin = -memory.data_ptr() % stride
    pages = memory[begin : begin + size * stride].view(size, stride)
    sides = ((keys, 0), (values, keys.padded_nbytes))
    first, second = (pages[:, at : at + spec.nbytes].view(spec.dtype).unflatten(1, spec.shape) for spec, at in sides)
    return Slab(first, second, memory.nbytes)


def check_host(nbytes: int) -> None:
    """Raises torch.OutOfMemoryError for more memory than the machine has, which some systems promise: they end the process
    when it is written."""
    if nbytes > (most := psutil.virtual_memory().total + psutil.swap_memory().total):
        raise torch.OutOfMemoryError(f"{nbytes:,} bytes are more than the {most:,} of this machine")
