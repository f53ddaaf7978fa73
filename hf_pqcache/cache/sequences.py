"""The sequence-level API of a paged cache: many sequences of any length side by side, sharing prefixes; knows no model.

A serving loop uses it instead of `generate`: it decides which sequence gets which tokens, layer by layer. A sequence is
a row of the storage. Its pages come from the cache's pool as its tokens arrive and go back when it is freed; what has not
filled a page lies in the row's exact window. Rows are made in powers of two and used again.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from hf_pqcache.backends import torch_backend
from hf_pqcache.cache.forward_pass import Steps
from hf_pqcache.storage.storage import Storage


class SequenceCache:
    """Mixed into the caches. A cache holds either such sequences or the rows of `generate`, never both.

    Every method raises before it changes anything: PagesExhaustedError (PQC001) and CacheOutOfMemoryError (PQC004) leave
    all sequences as they were. An unknown id is a KeyError.
    """

    storage: Storage
    layers: list[Any]
    _steps: Steps
    _compressed: list[int]
    _rows: dict[Hashable, int]

    @property
    def sequence_ids(self) -> list[Hashable]:
        """The sequences there are, oldest first."""
        return list(self._rows)

    def allocate_sequence(self, seq_id: Hashable, initial_len: int = 0) -> None:
        """Begin an empty sequence and own the pages of its first `initial_len` tokens.

        Raises ValueError if there is such a sequence already, or the cache holds tokens of `generate`.
        """
        if initial_len < 0:
            raise ValueError(f"initial_len={initial_len} must not be negative")
        pages = self.storage.config.coded_tokens(initial_len) // self.storage.config.page_size
        self.storage.table.require(pages)  # before a row is made
        row = self._free_row(seq_id)
        self.storage.reserve_pages(row, pages)
        self._own(seq_id, row)

    def append_tokens(self, seq_id: Hashable, layer_idx: int, k: Tensor, v: Tensor) -> None:
        """Store the newest tokens of a sequence in one layer.

        Args:
            k, v: (H, T, d) or (1, H, T, d), keys after their rotary embedding, in the model's dtype.

        Raises:
            ValueError: a shape, dtype or device differs from the layer's, or the layer is not kept in pages.
        """
        row, layer = self._row(seq_id), self._layer(layer_idx)
        k, v = (x[0] if x.dim() == 4 and x.shape[0] == 1 else x for x in (k, v))
        if k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2]:
            raise ValueError(
                f"k, v: expected (H, T, d) or (1, H, T, d) with equal H and T, got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if not layer.is_initialized:
            layer.open(k, v)
        view = self.storage.views[layer_idx]
        for name, x, window in (("k", k, view.window_keys), ("v", v, view.window_values)):
            expected = (window.shape[1], x.shape[1], window.shape[3])
            if tuple(x.shape) != expected or x.dtype != window.dtype or x.device != window.device:
                raise ValueError(
                    f"{name}: layer {layer_idx} takes {expected} {window.dtype} on {window.device}, got {tuple(x.shape)} "
                    f"{x.dtype} on {x.device}"
                )
        with self.storage.out_of_memory_guard("encoding the new tokens"):
            self.storage.append_row(layer_idx, row, k, v)

    def get_kv(self, seq_id: Hashable, layer_idx: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a sequence in one layer, decoded where they are codes: (H, n, d) each.

        Raises ValueError if no sequence has had a token in this layer yet.
        """
        row = self._row(seq_id)
        if self._layer(layer_idx).index not in self.storage.views:
            raise ValueError(f"layer {layer_idx} has no tokens yet; append_tokens comes first")
        view, length = self.storage.views[layer_idx], self.storage.row_lengths(layer_idx)[row]
        return torch_backend.row_tokens(view, "key", row, length), torch_backend.row_tokens(view, "value", row, length)

    def fork_sequence(self, src: Hashable, dst: Hashable) -> None:
        """Begin sequence `dst` as a copy of `src`. They share whole pages by count; only `src`'s window is copied."""
        source = self._row(src)
        target = self._free_row(dst)
        self.storage.copy_row(source, target)
        self._own(dst, target)

    def crop_sequence(self, seq_id: Hashable, length: int) -> None:
        """Keep a sequence's first `length` tokens in every layer. Tokens that return to the window come from pages."""
        if length < 0:
            raise ValueError(f"length={length} must not be negative")
        row = self._row(seq_id)
        with self.storage.out_of_memory_guard("restoring the exact window"):
            self.storage.crop_row(row, length)

    def free_sequence(self, seq_id: Hashable) -> None:
        """Forget a sequence. Pages that no other one shares are free at once."""
        self.storage.free_row(self._row(seq_id))
        del self._rows[seq_id]
        self.storage.are_rows_independent = bool(self._rows)

    def sequence_stats(self, seq_id: Hashable) -> dict[str, Any]:
        """Tokens (the most that a layer holds), pages, how many of these are shared with others, and bytes of the pages."""
        row, storage = self._row(seq_id), self.storage
        pages = storage.table.rows[row]
        return {
            "tokens": max((storage.row_lengths(layer)[row] for layer in storage.views), default=0),
            "pages": len(pages),
            "shared_pages": sum(storage.allocator.references(page) > 1 for page in pages),
            "page_bytes": len(pages) * storage.page_bytes,
        }

    def forget_sequences(self) -> None:
        """After the storage has been reset."""
        self._rows.clear()
        self.storage.are_rows_independent = False

    def _row(self, seq_id: Hashable) -> int:
        if seq_id not in self._rows:
            raise KeyError(f"there is no sequence {seq_id!r}; there are {self.sequence_ids}")
        return self._rows[seq_id]

    def _own(self, seq_id: Hashable, row: int) -> None:
        self._rows[seq_id] = row
        self.storage.are_rows_independent = True

    def _layer(self, layer_idx: int) -> Any:
        if layer_idx not in self._compressed:
            raise ValueError(f"layer {layer_idx} is not kept in pages; layers that are: {self._compressed}")
        return self.layers[layer_idx]

    def _free_row(self, seq_id: Hashable) -> int:
        """An empty row, made if there is none."""
        if seq_id in self._rows:
            raise ValueError(f"there is a sequence {seq_id!r} already; free_sequence it or choose another id")
        storage = self.storage
        if not self._rows:
            self._steps.settle()
            if any(storage.tokens(layer) for layer in storage.views):
                raise ValueError("the cache holds tokens of generate; reset() it before allocating sequences")
        used = set(self._rows.values())
        row = next((row for row in range(storage.batch) if row not in used), storage.batch)
        if row == storage.batch:
            with storage.out_of_memory_guard("the exact windows of more sequences"):
                storage.select_rows([*range(storage.batch), *[None] * max(1, storage.batch)])
            for i in self._compressed:
                self.layers[i].batch_size = storage.batch
        return row
