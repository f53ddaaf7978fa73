"""What `stats()` of a paged cache tells; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import CacheLayerMixin

from hf_pqcache.cache.forward_pass import ForwardPass
from hf_pqcache.pages.codec import CodedPages
from hf_pqcache.storage.layers import Layers
from hf_pqcache.storage.storage import Storage


def stats(forward_pass: ForwardPass, all_layers: list[Any], compressed: Sequence[int], exact: dict[int, str]) -> dict[str, Any]:
    """As `PagedCache.stats` says; `exact`: why transformers keeps a layer itself."""
    storage, layers = forward_pass.storage, forward_pass.storage.layers
    calls: dict[str, int] = {}
    engines = {i: {"name": "exact", "reason": reason} for i, reason in exact.items()}
    for state in layers.states.values():
        engines |= {layer: choice._asdict() for (layer, _), choice in state.choices.items()}
        for (operation, backend), count in state.calls.items():
            calls[f"{operation}/{backend}"] = calls.get(f"{operation}/{backend}", 0) + count
    engines |= {i: {"name": "decoded", "reason": reason} for i, reason in forward_pass.decoded.items()}
    counting = (layer for i, layer in enumerate(all_layers) if i not in forward_pass.without_positions)
    used, reserved = _bytes_used(layers), _bytes_reserved(layers)
    on_host = used[_kind(layers)] if layers.offload is not None else 0
    total = sum(used.values())
    return {
        "tokens": next((layer.get_seq_length() for layer in counting if isinstance(layer, CacheLayerMixin)), 0),
        "removed": {layer: storage.lengths.removed.get(layer, 0) for layer in layers.views} if storage.lengths.removed else {},
        "press": forward_pass.press if storage.lengths.removed else None,
        "pages_used": layers.table.num_used,
        "pages_free": layers.table.num_free,
        "pages_reserved": layers.allocator.num_reserved,
        "bytes": used,
        "bytes_total": total,
        "bytes_device": total - on_host,
        "bytes_host": on_host,
        "bytes_reserved": reserved["device"] + reserved["host"],
        "bytes_reserved_device": reserved["device"],
        "bytes_reserved_host": reserved["host"],
        "bytes_fp16": _bytes_fp16(storage),
        "true_bits": _true_bits(layers),
        "compressed_layers": list(compressed),
        "exact_layers": sorted(exact),
        "engines": engines,
        "eager_because": forward_pass.eager_because,
        "calls": calls,
    }


def _true_bits(layers: Layers) -> float | None:
    """Bits that pages hold for a number of keys and values, scales, offsets and padding included; None without layers."""
    numbers = sum(w.shape[1] * w.shape[3] for view in layers.views.values() for w in (view.window_keys, view.window_values))
    return 8 * layers.page_bytes / (layers.config.page_size * numbers) if numbers else None


def _kind(layers: Layers) -> str:
    return "pages" if layers.book_of is None else "codes"


def _fixed_bytes(layers: Layers) -> dict[str, int]:
    """What takes memory whatever number of tokens there is: exact windows, codebooks and tables."""
    views = layers.views.values()
    windows = sum(window.nbytes for view in views for window in (view.window_keys, view.window_values))
    coded = [codec for view in views for codec in (view.key_codec, view.value_codec) if isinstance(codec, CodedPages)]
    books = {codec.centroids.data_ptr(): codec.centroids.nbytes for codec in coded}  # layers share them
    tables = sum(state.nbytes for state in layers.states.values()) + sum(codec.equaliser.nbytes for codec in coded[::2])
    return {"codebooks": sum(books.values()), "window": windows, "tables": tables}


def _bytes_used(layers: Layers) -> dict[str, int]:
    """Bytes that the cache's tokens need, by kind; `staging` is what the device holds of pages on the host."""
    staged = sum(view.store.staged_page_bytes for view in layers.views.values())
    pages = layers.table.num_used
    return {_kind(layers): pages * layers.page_bytes, "staging": pages * staged, **_fixed_bytes(layers)}


def _bytes_reserved(layers: Layers) -> dict[str, int]:
    """Bytes that are allocated, on devices and on the host."""
    stores = layers.stores.values()
    device = sum(store.reserved_bytes for store in stores) + sum(_fixed_bytes(layers).values())
    return {"device": device, "host": sum(store.host_bytes for store in stores)}


def _bytes_fp16(storage: Storage) -> int:
    """Bytes that an uncompressed cache of two bytes a number takes for the same tokens."""
    numbers = 0
    for layer, view in storage.layers.views.items():
        per_token = sum(window.shape[1] * window.shape[3] for window in (view.window_keys, view.window_values))
        numbers += sum(storage.lengths.seq_lens(layer)) * per_token
    return 2 * numbers
