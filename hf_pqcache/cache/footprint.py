"""What a KV cache will take, from the model's config alone: no weights, no tokens, no device; measures nothing.

Ours and transformers' exact caches are counted as `stats()` and the allocator count them (a test compares). Quantized
caches of transformers: one scale and one zero point for every 64 numbers, everything quantized but the newest tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from transformers import DynamicCache

from hf_pqcache import arguments
from hf_pqcache.codebook.samples import compressible_layers
from hf_pqcache.config import OPERATING_POINTS, PQConfig, Side
from hf_pqcache.models.shapes import has_latent_attention, kv_shape, layer_configs
from hf_pqcache.pages.layout import PageLayout
from hf_pqcache.pages.slabs import PageSpec

#: (KV heads, numbers of a key, numbers of a value) of a layer.
Shape = tuple[int, int, int]
#: Other caches -> bits of a number, scales and zero points included.
OTHERS = {"fp8": 8.0, "quanto:4": 4.5, "quanto:2": 2.5, "hqq:4": 4.5, "hqq:3": 4.0, "hqq:2": 2.5}


@dataclass(frozen=True)
class Footprint:
    """Bytes of one cache, all sequences together.

    Attributes:
        cache: dynamic, paged-kv, fp8, quanto:4, hqq:3, pq:4, ... as the command line calls it.
        stored: of old tokens: codes, pages, quantized or plain numbers. window: of tokens that stay exact beside them.
        tables: page tables and counters. codebooks: of centroids, once for all sequences.
        other_layers: of layers that no cache here compresses (sliding windows), exact.
        pages: that are filled; 0 for caches without pages.
    """

    cache: str
    stored: int
    window: int = 0
    tables: int = 0
    codebooks: int = 0
    other_layers: int = 0
    pages: int = 0

    @property
    def total(self) -> int:
        return self.stored + self.window + self.tables + self.codebooks + self.other_layers


@dataclass(frozen=True)
class MemoryPlan:
    """What each cache takes for one model, length and batch.

    Attributes:
        caches: "dynamic", half precision or the model's dtype, comes first.
        values: key and value numbers of all compressible layers and tokens; bits are counted over them.
        notes: what the config does not tell, or what was assumed.
    """

    tokens: int
    batch: int
    compressed_layers: int
    values: int
    caches: tuple[Footprint, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, cache: str) -> Footprint:
        for found in self.caches:
            if found.cache == cache:
                return found
        raise KeyError(f"{cache!r} is not planned here; there are {', '.join(x.cache for x in self.caches)}")

    def bits(self, cache: str) -> float:
        """Bits of each key and value number, window and tables included, the shared codebooks not."""
        found = self[cache]
        return 8 * (found.total - found.codebooks - found.other_layers) / self.values

    def saved(self, cache: str) -> int:
        """Bytes fewer than the exact cache takes."""
        return self.caches[0].total - self[cache].total

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the fields, and of each cache its total, bits and savings."""
        told = [{**asdict(x), "total": x.total, "bits": self.bits(x.cache), "saved": self.saved(x.cache)} for x in self.caches]
        return {**asdict(self), "caches": told, "notes": list(self.notes)}


def plan_memory(
    config: Any,
    *,
    tokens: int,
    batch: int = 1,
    pq_config: PQConfig | None = None,
    dtype_bytes: int = 2,
) -> MemoryPlan:
    """Bytes of every cache for `batch` sequences of `tokens` tokens each, from a model's config.

    Args:
        config: `model.config`, or `AutoConfig.from_pretrained(name)`.
        pq_config: page size, window and sinks of our caches; also plans a cache "pq" of exactly that shape.
        dtype_bytes: of a number that stays exact; 2 for float16 and bfloat16.

    Raises:
        ValueError: no tokens, or a config that does not say how large keys and values are.
        TypeError: something else than a config.
    """
    arguments.check_config(config)
    arguments.check_pq_config(pq_config)
    if tokens < 1 or batch < 1:
        raise ValueError(f"tokens={tokens} and batch={batch} must be at least 1")
    base = pq_config or PQConfig()
    text = config.get_text_config(decoder=True)
    shapes = [_shape(layer, i) for i, layer in enumerate(layer_configs(text))]
    chosen = compressible_layers(config)
    kept = _other_layers(config, shapes, chosen, tokens, batch * dtype_bytes)
    own = layer_shapes(config)
    values = sum(heads * (dk + dv) for heads, dk, dv in own) * tokens * batch
    exact = PQConfig(page_size=base.page_size, sink_tokens=0, extended_residual=1)
    found = [
        Footprint("dynamic", values * dtype_bytes, other_layers=kept),
        _paged("paged-kv", exact, own, tokens, batch, dtype_bytes, kept, lambda heads, dk, dv: heads * (dk + dv) * dtype_bytes),
    ]
    found += [Footprint(name, int(values * bits / 8), other_layers=kept) for name, bits in OTHERS.items()]
    sizes: dict[str, PQConfig] = {} if pq_config is None else {"pq": pq_config}
    for bits in OPERATING_POINTS:
        if all(width >= 8 for shape in own for width in shape[1:]):
            codes = dict.fromkeys(("num_subspaces", "num_bits", "value_subspaces", "value_bits"))
            sizes[f"pq:{bits}"] = base.replace(bits=bits, **codes)
    found += [_coded(name, settings, own, tokens, batch, dtype_bytes, kept) for name, settings in sizes.items()]
    return MemoryPlan(tokens, batch, len(chosen), values, tuple(found), _notes(text, chosen, shapes, tokens))


def _coded(
    name: str, config: PQConfig, shapes: Sequence[Shape], tokens: int, batch: int, dtype_bytes: int, kept: int
) -> Footprint:
    def token_bytes(heads: int, dk: int, dv: int) -> float:
        sides = (PageSpec((heads * block.nbytes,), torch.uint8) for block in page_layouts(config, dk, dv))
        return sum(side.padded_nbytes for side in sides) / config.page_size

    books = {
        (block.which, block.head_dim // block.num_subspaces, block.num_bits)
        for s in shapes
        for block in page_layouts(config, *s[1:])
    }
    return _paged(name, config, shapes, tokens, batch, dtype_bytes, kept, token_bytes, sum(2 * w << n for _, w, n in books))


def layer_shapes(config: Any) -> list[Shape]:
    """(KV heads, numbers of a key, numbers of a value) of the layers that keep every token, from a transformers config.

    Raises ValueError if it does not say.
    """
    layers = layer_configs(config.get_text_config(decoder=True))
    return [_shape(layers[i], i) for i in compressible_layers(config)]


def page_layouts(config: PQConfig, *dims: int) -> list[PageLayout]:
    """The two sides of a page of one head whose keys and values have `dims` numbers."""
    sides = zip(get_args(Side), dims, strict=True)
    return [PageLayout(which, config.page_size, d, *config.codes(which, d)) for which, d in sides]


def _paged(
    name: str,
    config: PQConfig,
    shapes: Sequence[Shape],
    tokens: int,
    batch: int,
    dtype_bytes: int,
    kept: int,
    token_bytes: Callable[[int, int, int], float],
    codebooks: int = 0,
) -> Footprint:
    """A cache of pages; `token_bytes` of a layer is what its pages hold for a token."""
    pages = batch * (config.coded_tokens(tokens) // config.page_size)
    slots = batch * (config.sink_tokens + config.window_slots)
    return Footprint(
        name,
        stored=int(pages * config.page_size * sum(token_bytes(*shape) for shape in shapes)),
        window=slots * sum(heads * (dk + dv) for heads, dk, dv in shapes) * dtype_bytes,
        tables=(4 * pages + 8 * batch) * len(shapes),
        codebooks=codebooks,
        other_layers=kept,
        pages=pages,
    )


def _shape(layer: Any, index: int) -> Shape:
    """Of a layer, as it caches them. Raises ValueError if its config does not say."""
    if has_latent_attention(layer):
        # Transformers caches what attention reads: the keys and values that the latent vector expands to.
        nope, rope = getattr(layer, "qk_nope_head_dim", None), getattr(layer, "qk_rope_head_dim", None)
        value = getattr(layer, "v_head_dim", None)
        if isinstance(nope, int) and isinstance(rope, int) and isinstance(value, int):
            return layer.num_attention_heads, nope + rope, value
    heads, head_dim = kv_shape(layer)
    if heads is None or head_dim is None:
        raise ValueError(f"layer {index}: the model's config does not say how many KV heads it has, or their head_dim")
    return heads, head_dim, head_dim


def _other_layers(config: Any, shapes: Sequence[Shape], chosen: Sequence[int], tokens: int, number_bytes: int) -> int:
    """Bytes of the layers that keep a bounded number of tokens, for all sequences. Recurrent states are not counted."""
    total = 0
    for i, layer in enumerate(DynamicCache(config=config).layers):
        window = getattr(layer, "sliding_window", None)
        if i not in chosen and i < len(shapes) and isinstance(window, int):
            heads, dk, dv = shapes[i]
            total += min(tokens, window - 1) * heads * (dk + dv) * number_bytes
    return total


def _notes(text: Any, chosen: Sequence[int], shapes: Sequence[Shape], tokens: int) -> tuple[str, ...]:
    notes = []
    if len(chosen) < len(shapes):
        notes.append(f"{len(chosen)} of {len(shapes)} layers keep every token and are compressed; the others stay as they are")
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit:
        notes.append(f"the model's positions end at {limit:,} tokens")
    return tuple(notes)
