"""What a transformers config says of the keys and values of a model's layers; knows no layer and no cache.

The layers of a model may differ, as Gemma 4's do in head_dim. Such a setting is read from the layer: to ask the whole
config for it is an error of a kind that `getattr` with a default lets through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def layer_configs(text_config: Any) -> Sequence[Any]:
    """The config of each layer of a decoder's config: the same one throughout where layers do not differ."""
    if getattr(text_config, "is_heterogeneous", False):
        return [text_config.per_layer_config[i] for i in range(text_config.num_hidden_layers)]
    return [text_config] * (getattr(text_config, "num_hidden_layers", None) or 1)


def kv_shape(layer_config: Any) -> tuple[int | None, int | None]:
    """(KV heads, head_dim) that the config of a layer announces; None where it does not say."""
    query_heads = getattr(layer_config, "num_attention_heads", None)
    heads = getattr(layer_config, "num_key_value_heads", None)
    if heads is None and not hasattr(layer_config, "multi_query"):  # Falcon, GPT-BigCode: one head, or what it computes
        heads = query_heads
    head_dim = getattr(layer_config, "head_dim", None)
    if head_dim is None and isinstance(query_heads, int) and isinstance(getattr(layer_config, "hidden_size", None), int):
        head_dim = layer_config.hidden_size // query_heads
    return (heads if isinstance(heads, int) else None), (head_dim if isinstance(head_dim, int) else None)


def has_latent_attention(text_config: Any) -> bool:
    """Whether a layer caches a latent vector, which attention expands (DeepSeek): two numbers do not say its shape."""
    return any(getattr(layer, "kv_lora_rank", None) for layer in layer_configs(text_config))
