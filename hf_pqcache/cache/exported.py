"""A sequence of a paged cache as bytes, and what they say of the cache and the model that it is from."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor
from transformers import DynamicCache

from hf_pqcache.cache import provenance, sequence_file, stock_state
from hf_pqcache.config import Side
from hf_pqcache.storage import transfer
from hf_pqcache.storage.memory import out_of_memory_as_pqc004
from hf_pqcache.storage.transfer import StoredLayer

if TYPE_CHECKING:
    from hf_pqcache.cache.base import PagedCache

#: Tensors of a layer in pages.
PARTS = ("key_pages", "value_pages", "window_keys", "window_values")
#: Of its tokens, see `StoredLayer`.
COUNTS = ("length", "reused", "removed")


def export(cache: PagedCache, seq: Hashable, model: Any) -> bytes:
    """As `PagedCache.export_sequence` says."""
    cache._pass.settle()
    storage = cache.storage
    if storage.lengths.is_uneven and not storage.are_independent:
        cache._pass.roll_back()
    place = _place(cache, seq)
    stock = {} if storage.are_independent else _stock_tensors(cache, place)
    layers, tensors = [], dict[str, Tensor]()
    for i, fresh in enumerate(fresh_layers(cache)):
        entry: dict[str, Any] = {"kind": type(fresh).__name__}
        if i in storage.layers.views:
            with out_of_memory_as_pqc004("the sequence that is being exported"):
                stored = transfer.take(storage, i, place)
            parts = {name: getattr(stored, name) for name in (*PARTS, "equaliser")}
            tensors |= {f"{i}.{name}": x.cpu() for name, x in parts.items() if x is not None}
            counts = {name: getattr(stored, name) for name in COUNTS}
            entry["pages"] = {**counts, "codec": codec_facts(cache, i, stored)}
        if i in stock:
            entry["seen"], found = stock[i]
            tensors |= {f"{i}.{name}": x for name, x in found.items()}
        layers.append(entry)
    lengths = storage.lengths
    pruned = [max(0, lengths.pruned_until - lengths.left_pad[place]), lengths.counts_removed]
    own = {"is_of_generate": not storage.are_independent, "pruned": pruned, "layers": layers}
    return sequence_file.pack({**facts(cache, model), **own}, tensors)


def _place(cache: PagedCache, seq: Hashable) -> int:
    storage = cache.storage
    if storage.are_independent:
        return cache._sequences._place(seq)
    batch = storage.layers.batch if any(storage.lengths.tokens(layer) for layer in storage.layers.views) else 0
    if not isinstance(seq, int) or isinstance(seq, bool) or not 0 <= seq < batch:
        raise ValueError(f"there is no row {seq!r}: the cache holds {batch} rows with tokens in pages, counted from 0")
    return seq


def _stock_tensors(cache: PagedCache, row: int) -> dict[int, tuple[int, dict[str, Tensor]]]:
    """(positions seen, tensors) of each layer that transformers keeps."""
    if beside := sorted(i for i in cache._pass.without_positions if cache.layers[i].get_seq_length()):
        raise NotImplementedError(
            f"layers {beside} hold what the model attends to beside its text: such rows cannot be exported"
        )
    if len(cache.layers) != len(fresh_layers(cache)):
        raise NotImplementedError(
            "the model has copied a layer for itself, which its config does not tell: it cannot be exported"
        )
    padding = cache.storage.lengths.left_pad[row]
    return {i: stock_state.read(part, i, row, padding) for i, part in cache._stock_parts().items()}


def fresh_layers(cache: PagedCache) -> list[Any]:
    """transformers' own layers of the model, without tokens."""
    return list(DynamicCache(config=cache._model_config).layers)


def facts(cache: PagedCache, model: Any) -> dict[str, Any]:
    """What both sides must share, as far as it is not a layer's."""
    name = "PagedKVCache" if cache.storage.layers.book_of is None else "PagedPQCache"
    dtype = getattr(cache._text_config, "dtype", None)
    dtype_name = None if dtype is None else str(dtype).removeprefix("torch.")
    return provenance.facts(name, cache.storage.layers.config, cache._model_config, dtype_name, model)


def codec_facts(cache: PagedCache, layer: int, stored: StoredLayer) -> Any:
    """How pages are coded; None where they hold tokens."""
    book_of = cache.storage.layers.book_of
    if book_of is None:
        return None
    book = book_of(stored.window_keys.shape[2], stored.window_values.shape[2])
    shapes = [list(book.codes(which, stored.window(which).shape[2])) for which in get_args(Side)]
    return {"codes": shapes, "codebook": book.fingerprint}
