"""Prefixes of an engine as bytes, and what they say of the engine and the model that they are from; everything is checked
before anything is taken in."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_pqcache.batching.prefixes import Prefixes
from hf_pqcache.cache import provenance, sequence_file

if TYPE_CHECKING:
    from hf_pqcache.batching.blocks import SlotCache

PREFIXES = sequence_file.Kind("hf-pqcache-prefixes", 1, "export_prefixes", "exported prefixes")
#: Tensors of `Prefixes` that are always there.
_PARTS = ("tokens", "parents", "blocks", "sink_tokens", "sinks")


def pack(facts: Mapping[str, Any], prefixes: Prefixes) -> bytes:
    """The bytes of what `prefixes.take` has found, and of what `facts` says of whom they are."""
    tensors = {name: getattr(prefixes, name) for name in _PARTS}
    if prefixes.equaliser is not None:
        tensors["equaliser"] = prefixes.equaliser
    return sequence_file.pack(facts, tensors, PREFIXES)


def unpack(cache: SlotCache, own: Mapping[str, Any], most: int, data: bytes) -> Prefixes:
    """The inverse of `pack`, for `prefixes.put` in this cache.

    own: its `facts`. most: `known_tokens` of its model.

    Raises TypeError, ValueError.
    """
    noted, tensors = sequence_file.unpack(data, PREFIXES)
    try:
        provenance.check(noted, own, "the prefixes were")
        if noted["codec"] != own["codec"]:
            raise ValueError(
                f"the prefixes were coded as {short(noted['codec'])}, here {own['codec']}: take the same bits and codebook"
            )
    except (KeyError, TypeError, AttributeError) as error:  # what they say of themselves is not what export says
        raise ValueError(f"data are no prefixes that this version exported: {type(error).__name__} {short(error)}") from None
    _check_shapes(cache, tensors)
    prefixes = Prefixes(**tensors)
    _check(cache, prefixes, most)
    return prefixes


def texts_of(data: bytes) -> list[list[int]]:
    """The token ids that blocks are of, in bytes that `unpack` has accepted; what others go on from is part of those."""
    tensors = sequence_file.unpack(data, PREFIXES)[1]
    tokens, parents = tensors["tokens"].tolist(), tensors["parents"].tolist()
    firsts = dict(zip((n for n, parent in enumerate(parents) if parent < 0), tensors["sink_tokens"].tolist(), strict=True))
    texts = []
    for last in {*range(len(parents))} - {*parents}:
        run, number = [], last
        while number >= 0:
            run.append(tokens[number])
            first, number = number, parents[number]
        texts.append([*firsts[first], *chain.from_iterable(reversed(run))])
    return texts


def known_tokens(model: Any) -> int:
    """Token ids below it mean the same in every process; images have those from there on, in the order in which they came."""
    return int(model.get_input_embeddings().num_embeddings)


def facts(cache: SlotCache, model: Any) -> dict[str, Any]:
    """What both engines must share. To be called between steps."""
    layers, dtype = cache.layers, str(cache.dtype).removeprefix("torch.")
    holder = "batching engine with exact blocks" if layers.book is None else "batching engine with coded blocks"
    codec = None
    if layers.book is not None:
        shapes = [list(one.codes or ()) for one in (layers.views[0].key_codec, layers.views[0].value_codec)]
        codec = {"codes": shapes, "codebook": layers.book.fingerprint}
    return {**provenance.facts(holder, layers.config, model.config, dtype, model), "codec": codec}


def _check_shapes(cache: SlotCache, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless all tensors are there, as this cache's `Prefixes` have them."""
    layers, size = cache.layers, cache.layers.config.page_size
    if not set(_PARTS) <= tensors.keys() <= {*_PARTS, "equaliser"}:
        raise ValueError(f"the prefixes have the tensors {short(sorted(tensors))}, expected {', '.join(_PARTS)}")
    n, m = len(tensors["tokens"].flatten()) // size, len(tensors["sink_tokens"]) if tensors["sink_tokens"].dim() else 0
    heads, head_dim = layers.windows.shape[3], layers.windows.shape[5]
    expected = {
        "tokens": ((n, size), torch.int32),
        "parents": ((n,), torch.int32),
        "blocks": ((n, layers.block_bytes), torch.uint8),
        "sink_tokens": ((m, layers.config.sink_tokens), torch.int32),
        "sinks": ((m, *layers.no_sinks.shape), cache.dtype),
        "equaliser": ((layers.num_layers, heads, head_dim), torch.float32),
    }
    for name, x in tensors.items():
        if (tuple(x.shape), x.dtype) != expected[name]:
            shape, dtype = expected[name]
            raise ValueError(f"the prefixes' {name} are {x.dtype} {tuple(x.shape)}, expected {dtype} {shape}")


def _check(cache: SlotCache, new: Prefixes, most: int) -> None:
    """Raises ValueError unless the numbers make sense. most: token ids are below it."""
    n, is_first = len(new.parents), new.parents < 0
    if bool((new.parents < -1).any()) or bool((new.parents >= torch.arange(n)).any()) or int(is_first.sum()) != len(new.sinks):
        raise ValueError("the prefixes' blocks do not stand behind those that they continue")
    for ids in (new.tokens, new.sink_tokens):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < most:
            raise ValueError(f"the prefixes have tokens from {int(ids.min())} to {int(ids.max())}, this model knows {most}")
    if not new.sinks.isfinite().all() or not cache.layers.are_finite(new.blocks):
        raise ValueError("the prefixes' keys and values must be finite numbers")
    x, has_codes = new.equaliser, cache.layers.book is not None
    if (x is None and has_codes and n) or (x is not None and not has_codes):
        raise ValueError(f"{'an' if x is not None else 'no'} equaliser comes with {n} blocks")
    if x is not None and not (x.isfinite().all() and bool((x > 0).all())):
        raise ValueError("the prefixes' equaliser must be positive numbers")
