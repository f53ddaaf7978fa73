"""Takes up a sequence that another paged cache has exported: everything is checked before anything changes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from hf_pqcache.cache import provenance, sequence_file, stock_state
from hf_pqcache.cache.exported import COUNTS, PARTS, codec_facts, facts, fresh_layers
from hf_pqcache.cache.hybrid import new_states
from hf_pqcache.cache.layer import PagedLayer
from hf_pqcache.config import MAX_TOKENS, Side
from hf_pqcache.models.shapes import has_latent_attention, kv_shape, layer_configs
from hf_pqcache.pages.codec import CodedPages, ExactPages, PageCodec
from hf_pqcache.storage import transfer
from hf_pqcache.storage.memory import out_of_memory_as_pqc004
from hf_pqcache.storage.transfer import StoredLayer

if TYPE_CHECKING:
    from hf_pqcache.cache.base import PagedCache

#: Most numbers of all heads of a token, where the model's config does not say how many there are.
_MOST_NUMBERS = 1 << 20
Device = torch.device | str | None
Devices = Device | Mapping[int, Device]
#: (positions seen, tensors) of layers that transformers keeps.
Stock = dict[int, tuple[int, dict[str, Tensor]]]


def import_(cache: PagedCache, data: bytes, seq_id: Hashable | None, model: Any, device: Devices) -> None:
    """As `PagedCache.import_sequence` says."""
    description, tensors = sequence_file.unpack(data)
    try:
        provenance.check(description, facts(cache, model))
        pages, stock = _read_layers(cache, description, tensors)
        pruned = _pruned(description["pruned"], pages)
    except (KeyError, TypeError, AttributeError) as error:  # what it says of itself is no longer what export says
        raise ValueError(f"data are no sequence that this version exported: {type(error).__name__} {short(error)}") from None
    _check_use(cache, description, seq_id, pages, stock)
    transfer.check_equalisers(cache.storage, pages)
    cache.storage.layers.table.require(max((stored.num_pages for stored in pages.values()), default=0))
    with out_of_memory_as_pqc004("the imported sequence"):
        filled = _filled(cache, stock, pages, device)
        place = 0 if seq_id is None else cache._sequences._free_place(seq_id)
        if seq_id is None:
            cache.storage.set_batch(1)
        for i, stored in pages.items():
            there = _device(cache, i, device)
            cache.layers[i].open(*(stored.window(which)[None, :, :0].to(there) for which in get_args(Side)))
        transfer.put(cache.storage, place, pages, pruned)
    for i, layer in filled.items():
        _use(cache, i, layer, is_beside_pages=i in pages)
    for i in pages:
        cache.storage.lengths.padding_is_known(i)
    if seq_id is not None:
        cache._sequences._own(seq_id, place)


def _read_layers(
    cache: PagedCache, noted: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[int, StoredLayer], Stock]:
    """What pages and what transformers' layers get, checked against this cache. Raises ValueError."""
    fresh, left = fresh_layers(cache), dict(tensors)
    if [entry["kind"] for entry in noted["layers"]] != [type(layer).__name__ for layer in fresh]:
        raise ValueError("the sequence's layers are of other kinds than this model's")
    pages, stock = {}, {}
    for i, entry in enumerate(noted["layers"]):
        own = {name: left.pop(key) for name in (*PARTS, "equaliser") if (key := f"{i}.{name}") in left}
        if "pages" in entry:
            pages[i] = _stored(cache, i, entry["pages"], own)
        elif own:
            raise ValueError(f"layer {i} has {sorted(own)}, which its description does not tell of")
        if "seen" in entry:
            found = {key.partition(".")[2]: left.pop(key) for key in list(left) if key.startswith(f"{i}.")}
            seen = _count(entry["seen"], f"layer {i}: seen")
            stock_state.check(_part(fresh[i], is_beside_pages=i in pages), i, seen, found)
            if (
                "keys" in found
                and isinstance(cache.layers[i], PagedLayer)
                and cache._why_unfit(found["keys"], found["values"]) is None
            ):
                raise ValueError(f"layer {i} is transformers' there, and in pages here")
            stock[i] = seen, found
    if left:
        raise ValueError(f"the sequence has tensors that no layer takes: {short(sorted(left))}")
    return pages, stock


def _part(fresh: Any, is_beside_pages: bool) -> Any:
    """What transformers keeps of a layer: all of it, or the states beside tokens in pages."""
    return new_states(fresh.number_of_states) if is_beside_pages else fresh


def _pruned(noted: Any, pages: Mapping[int, StoredLayer]) -> tuple[int, bool]:
    """Until which position a press has pruned, and whether transformers is told positions. Raises ValueError."""
    until, is_told = _count(noted[0], "pruned"), noted[1]
    for i, stored in pages.items():
        if stored.removed and not stored.removed <= until <= stored.length + stored.removed:
            raise ValueError(f"layer {i}: {stored.removed} of {until} positions pruned, and {stored.length} tokens left")
    if not isinstance(is_told, bool):
        raise ValueError(f"pruned={short(noted)} does not say whether positions are told")
    return until, is_told


def _count(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_TOKENS:
        raise ValueError(f"{what}={short(value)} is no number of tokens")
    return value


def _stored(cache: PagedCache, i: int, entry: Mapping[str, Any], own: Mapping[str, Tensor]) -> StoredLayer:
    """One layer's tensors, of the shapes and dtypes that this cache's layer has. Raises ValueError."""
    config = cache.storage.layers.config
    if missing := set(PARTS) - set(own):
        raise ValueError(f"layer {i} lacks {sorted(missing)}")
    length, reused, removed = (_count(entry[name], f"layer {i}: {name}") for name in COUNTS)
    stored = StoredLayer(length, reused, **own, removed=removed)
    if not length - config.window_slots <= reused <= length:
        raise ValueError(f"layer {i}: {length} tokens, of which the window has lost {reused}, do not go together")
    sinks, first = transfer.exact_tokens(config, length, reused)
    for which in get_args(Side):
        window = stored.window(which)
        if window.dim() != 3 or window.shape[:2] != (stored.window_keys.shape[0], sinks + length - first):
            raise ValueError(
                f"layer {i}: the window of {which}s is {tuple(window.shape)}, expected {sinks + length - first} tokens"
            )
        if not window.is_floating_point() or not window.isfinite().all():
            raise ValueError(f"layer {i}: the window of {which}s must be finite numbers, got {window.dtype}")
    codecs = _codecs(cache, i, stored)
    if entry["codec"] != codec_facts(cache, i, stored):
        raise ValueError(
            f"layer {i} was coded as {short(entry['codec'])}, here {codec_facts(cache, i, stored)}: "
            "build the cache with the same bits and codebook"
        )
    for which, codec in zip(get_args(Side), codecs, strict=True):
        x, expected = stored.pages(which), (config.pages_of(length), *codec.spec.shape)
        if tuple(x.shape) != expected or x.dtype != codec.spec.dtype:
            raise ValueError(
                f"layer {i}: pages of {which}s are {x.dtype} {tuple(x.shape)}, expected {codec.spec.dtype} {expected}"
            )
        if not codec.are_finite(x):
            raise ValueError(f"layer {i}: pages of {which}s must be of finite numbers")
    _check_equaliser(i, stored, codecs[0])
    return stored


def _codecs(cache: PagedCache, i: int, stored: StoredLayer) -> tuple[PageCodec, PageCodec]:
    """Those of the layer, or those that it would open with. Raises ValueError where the layer holds other tokens."""
    layers, keys, values = cache.storage.layers, stored.window_keys, stored.window_values
    (heads, key_dim), value_dim = keys.shape[::2], values.shape[2]
    if not isinstance(cache.layers[i], PagedLayer):
        raise ValueError(f"layer {i} is in pages there, and transformers' {type(cache.layers[i]).__name__} here")
    if (view := layers.views.get(i)) is not None:
        own = view.window_keys, view.window_values
        if [(x.shape[1], x.shape[3], x.dtype) for x in own] != [(x.shape[0], x.shape[2], x.dtype) for x in (keys, values)]:
            numbers = f"{own[0].shape[3]} and {own[1].shape[3]} numbers"
            raise ValueError(
                f"layer {i} holds {own[0].shape[1]} heads of {numbers} in {own[0].dtype}, "
                f"the sequence {heads} of {key_dim} and {value_dim} in {keys.dtype}"
            )
        return view.key_codec, view.value_codec
    own_heads, own_dim = _announced(cache, i)
    if (
        own_heads not in (None, heads)
        or own_dim not in (None, key_dim)
        or not 0 < heads * (key_dim + value_dim) <= _MOST_NUMBERS
    ):
        raise ValueError(
            f"layer {i}: {heads} heads of {key_dim} and {value_dim} numbers, the model has {own_heads} of {own_dim}"
        )
    if (reason := cache._why_unfit(keys[None], values[None])) is not None:
        raise ValueError(f"layer {i}: {reason}")
    if layers.book_of is None:
        return ExactPages.like(keys, layers.config.page_size), ExactPages.like(values, layers.config.page_size)
    book, size = layers.book_of(key_dim, value_dim), layers.config.page_size
    return CodedPages.like(keys, "key", size, book), CodedPages.like(values, "value", size, book)


def _announced(cache: PagedCache, i: int) -> tuple[int | None, int | None]:
    """(KV heads, head_dim) of a layer in this process, None where the config does not say."""
    text = layer_configs(cache._text_config)
    if has_latent_attention(cache._text_config) or i >= len(text):
        return None, None
    heads, head_dim = kv_shape(text[i])
    is_one_of_several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return None if is_one_of_several else heads, head_dim


def _check_equaliser(i: int, stored: StoredLayer, codec: PageCodec) -> None:
    x, wanted = stored.equaliser, isinstance(codec, CodedPages) and stored.num_pages > 0
    if (x is not None) != wanted:
        raise ValueError(f"layer {i}: {'an' if x is not None else 'no'} equaliser beside {stored.num_pages} pages")
    if x is not None:
        shape = (stored.window_keys.shape[0], stored.window_keys.shape[2])
        if x.dtype != torch.float32 or tuple(x.shape) != shape or not x.isfinite().all() or not bool((x > 0).all()):
            raise ValueError(f"layer {i}: the equaliser must be positive numbers {shape} in float32")


def _check_use(
    cache: PagedCache, noted: Mapping[str, Any], seq_id: Hashable | None, pages: Mapping[int, StoredLayer], stock: Stock
) -> None:
    """Raises ValueError where the cache cannot hold such a sequence beside what it has."""
    if seq_id is not None:
        if any(stored.removed for stored in pages.values()):
            raise ValueError("a press has pruned the sequence: import it into an empty cache, without seq_id")
        if any(found for _, found in stock.values()):
            raise ValueError("the sequence has layers that transformers keeps, which a cache of single sequences has none of: "
                             "import it into an empty cache, without seq_id")  # fmt: skip
        return
    cache._pass.settle()
    if cache.storage.are_independent or any(cache.storage.lengths.tokens(layer) for layer in cache.storage.layers.views):
        raise ValueError("the cache has tokens: import into a new one, or reset() it; beside other sequences only with seq_id")
    ends = {stored.length + stored.removed for stored in pages.values()}
    if len(ends) > 1:
        raise ValueError(f"the sequence's layers end at {sorted(ends)} tokens: such a one can only be imported with seq_id")
    kept = [i for i in cache._stock_parts() if type(cache.layers[i]).__name__ not in stock_state.EMPTY]
    if kept and not noted["is_of_generate"]:
        raise ValueError(f"the sequence has no tokens for layers {kept}, which transformers keeps: import it with seq_id")


def _device(cache: PagedCache, i: int, device: Devices) -> torch.device:
    if (view := cache.storage.layers.views.get(i)) is not None:
        return view.device
    chosen = device.get(i) if isinstance(device, Mapping) else device
    return torch.device(chosen) if chosen is not None else torch.get_default_device()


def _filled(cache: PagedCache, stock: Stock, pages: Mapping[int, StoredLayer], device: Devices) -> dict[int, Any]:
    """transformers' layers with their tokens and states, not yet in use."""
    fresh, found = fresh_layers(cache), {}
    for i, (seen, tensors) in stock.items():
        if tensors:
            found[i] = stock_state.fill(_part(fresh[i], i in pages), seen, tensors, _device(cache, i, device))
    return found


def _use(cache: PagedCache, i: int, layer: Any, is_beside_pages: bool) -> None:
    """Put one of transformers' layers into its place."""
    if is_beside_pages:
        cache.layers[i].states = layer
        return
    if isinstance(cache.layers[i], PagedLayer):
        cache._keep_exact(i, cache._why_unfit(layer.keys, layer.values) or "")
    cache.layers[i] = layer
