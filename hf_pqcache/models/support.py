"""Side layers of a model are compressed, why the others are not, and what no cache of one attention can do.

Knows transformers' configs and layers only.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionAndFullAttentionLayer

from hf_pqcache.models.names import CACHE

#: transformers' layers that keep every token; the second has a recurrent state besides.
KEEPING = (DynamicLayer, LinearAttentionAndFullAttentionLayer)
#: Why a layer is kept as it is whose tokens are not those of the text.
NO_POSITIONS = "its tokens are no positions of the text, but what the model attends to beside it, such as an image"
#: Why there is a layer that the model's config does not tell of.
COPY = "a copy that the model made of another layer"


def layers_without_positions(config: Any) -> frozenset[int]:
    """The layers whose tokens are no positions: the cross-attention of Llama 3.2 Vision holds an image's."""
    text_config = config.get_text_config(decoder=True)
    there = _num_layers(text_config)
    return frozenset(i for i in getattr(text_config, "cross_attention_layers", None) or () if i < there)


def _num_layers(text_config: Any) -> int:
    """Layers of a decoder. Where a config counts encoder and decoder apart, transformers' caches go by the encoder's."""
    counts = (getattr(text_config, name, None) for name in ("decoder_layers", "num_decoder_layers", "num_hidden_layers"))
    return next((count for count in counts if isinstance(count, int)), sys.maxsize)


def full_attention(config: Any, layers: Sequence[Any]) -> list[int]:
    """Side of transformers' `layers` for a model keep every position; the others have a window, only a state, or an image."""
    others, there = layers_without_positions(config), _num_layers(config.get_text_config(decoder=True))
    return [i for i, layer in enumerate(layers[:there]) if type(layer) in KEEPING and i not in others]


def why_exact(layer: Any) -> str:
    """Why transformers' own cache layer of a model is kept as it is."""
    if type(layer).__name__ == "DummyLayer":
        return "attends to the keys and values of another layer"
    if type(layer) in KEEPING:
        return "the codebook has no centroids for it, or the decoder no such layer"
    if getattr(layer, "is_sliding", False):
        return f"keeps no more than {layer.sliding_window} tokens (sliding window or chunks)"
    if hasattr(layer, "conv_states"):
        besides = " besides its tokens" if isinstance(layer, CacheLayerMixin) else ""
        return f"keeps a recurrent state of constant size{besides}"
    return f"transformers' {type(layer).__name__} keeps more than keys and values"


class SingleAttention:
    """Notices a model that would store what both of its attentions see in one cache.

    Such a model updates a layer twice in a row, for itself and for what an encoder has read. Its config may say that it has
    an encoder; captioning models (BLIP's, or Whisper's decoder alone) only show it. A pass that is tried again after an
    error repeats one layer; two attentions repeat the next one, too.
    """

    def __init__(self, config: Any, num_layers: int) -> None:
        self._has_encoder = bool(getattr(config, "is_encoder_decoder", False))
        self._num_layers = num_layers
        self._last = self._repeated = -1

    def check(self, layer: int, is_given_to_generate: bool) -> None:
        """Called with each update of a layer. Raises ValueError for a cache that would mix two attentions."""
        is_repeated = layer == self._last and self._num_layers > 1
        if not is_repeated and self._last != self._repeated:
            self._repeated = -1
        is_second = is_repeated and self._repeated not in (-1, layer)
        if is_repeated:
            self._repeated = layer
        self._last = layer
        if is_second or (self._has_encoder and (is_repeated or is_given_to_generate)):
            raise ValueError(
                f"a model with two attentions in each layer has two caches and was given one: pass {CACHE}="
                "EncoderDecoderCache(PagedPQCache(model.config), DynamicCache(config=model.config))"
            )
