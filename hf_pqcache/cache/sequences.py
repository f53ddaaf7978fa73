"""The sequences that a serving loop handles one by one: names for places in a cache's batch; knows no model.

Such a loop decides which sequence gets which tokens, layer by layer, instead of `generate`. A sequence's pages come from the
cache's pool as its tokens arrive and go back when it is freed; what has not filled a page lies in its recent window. Places
are made in powers of two and used again.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from hf_pqcache.backends import torch_backend
from hf_pqcache.cache.forward_pass import ForwardPass
from hf_pqcache.storage.memory import out_of_memory_as_pqc004


class Sequences:
    """Those of one cache, which holds either such sequences or those of `generate`. The methods are the cache's own.

    Args:
        layers: of the cache, compressed or not.
        compressed: which of them are kept in pages.
        places: of the sequences there are, oldest first.
    """

    def __init__(
        self, forward_pass: ForwardPass, layers: list[Any], compressed: Sequence[int], places: dict[Hashable, int]
    ) -> None:
        self._pass, self._storage = forward_pass, forward_pass.storage
        self._layers, self._compressed = layers, compressed
        self.places = dict(places)

    def allocate(self, seq_id: Hashable, initial_len: int) -> None:
        if initial_len < 0:
            raise ValueError(f"initial_len={initial_len} must not be negative")
        layers = self._storage.layers
        pages = layers.config.coded_tokens(initial_len) // layers.config.page_size
        layers.table.require(pages)  # before a place is made
        place = self._free_place(seq_id)
        self._storage.reservation.reserve_pages(place, pages)
        self._own(seq_id, place)

    def append(self, seq_id: Hashable, layer_idx: int, k: Tensor, v: Tensor) -> None:
        place, layer = self._place(seq_id), self._layer(layer_idx)
        k, v = (x[0] if x.dim() == 4 and x.shape[0] == 1 else x for x in (k, v))
        if k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2]:
            raise ValueError(
                f"k, v: expected (H, T, d) or (1, H, T, d) with equal H and T, got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if not layer.is_initialized:
            layer.open(k, v)
        view = self._storage.layers.views[layer_idx]
        for name, x, window in (("k", k, view.window_keys), ("v", v, view.window_values)):
            expected = (window.shape[1], x.shape[1], window.shape[3])
            if tuple(x.shape) != expected or x.dtype != window.dtype or x.device != window.device:
                raise ValueError(
                    f"{name}: layer {layer_idx} takes {expected} {window.dtype} on {window.device}, got {tuple(x.shape)} "
                    f"{x.dtype} on {x.device}"
                )
        with out_of_memory_as_pqc004("encoding the new tokens"):
            self._storage.append_sequence(layer_idx, place, k, v)

    def get_kv(self, seq_id: Hashable, layer_idx: int) -> tuple[Tensor, Tensor]:
        place = self._place(seq_id)
        if self._layer(layer_idx).index not in self._storage.layers.views:
            raise ValueError(f"layer {layer_idx} has no tokens yet; append_tokens comes first")
        view, length = self._storage.layers.views[layer_idx], self._storage.lengths.seq_lens(layer_idx)[place]
        return torch_backend.row_tokens(view, "key", place, length), torch_backend.row_tokens(view, "value", place, length)

    def fork(self, src: Hashable, dst: Hashable) -> None:
        source = self._place(src)
        target = self._free_place(dst)
        with out_of_memory_as_pqc004("a copy of the exact window"):
            self._storage.fork(source, target)
        self._own(dst, target)

    def crop(self, seq_id: Hashable, length: int) -> None:
        if length < 0:
            raise ValueError(f"length={length} must not be negative")
        place = self._place(seq_id)
        with out_of_memory_as_pqc004("restoring the exact window"):
            self._storage.crop_sequence(place, length)

    def free(self, seq_id: Hashable) -> None:
        self._storage.free(self._place(seq_id))
        del self.places[seq_id]
        self._storage.are_independent = bool(self.places)

    def stats(self, seq_id: Hashable) -> dict[str, Any]:
        place, layers, lengths = self._place(seq_id), self._storage.layers, self._storage.lengths
        pages = layers.table.rows[place]
        return {
            "tokens": max((lengths.seq_lens(layer)[place] for layer in layers.views), default=0),
            "pages": len(pages),
            "shared_pages": sum(layers.allocator.references(page) > 1 for page in pages),
            "page_bytes": len(pages) * layers.page_bytes,
        }

    def forget(self) -> None:
        """After the storage has been reset."""
        self.places.clear()
        self._storage.are_independent = False

    def _place(self, seq_id: Hashable) -> int:
        if seq_id not in self.places:
            raise KeyError(f"there is no sequence {seq_id!r}; there are {list(self.places)}")
        return self.places[seq_id]

    def _own(self, seq_id: Hashable, place: int) -> None:
        self.places[seq_id] = place
        self._storage.are_independent = True

    def _layer(self, layer_idx: int) -> Any:
        if layer_idx not in self._compressed:
            raise ValueError(f"layer {layer_idx} is not kept in pages; layers that are: {self._compressed}")
        return self._layers[layer_idx]

    def _free_place(self, seq_id: Hashable) -> int:
        """An empty place, made if there is none."""
        if seq_id in self.places:
            raise ValueError(f"there is a sequence {seq_id!r} already; free_sequence it or choose another id")
        storage, batch = self._storage, self._storage.layers.batch
        if not self.places:
            self._pass.settle()
            if any(storage.lengths.tokens(layer) for layer in storage.layers.views):
                raise ValueError("the cache holds tokens of generate; reset() it before allocating sequences")
        used = set(self.places.values())
        place = next((place for place in range(batch) if place not in used), batch)
        if place == batch:
            with out_of_memory_as_pqc004("the exact windows of more sequences"):
                storage.select([*range(batch), *[None] * max(1, batch)])
            for i in self._compressed:
                self._layers[i].batch_size = storage.layers.batch
        return place
