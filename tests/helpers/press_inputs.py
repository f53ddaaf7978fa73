"""What a press is shown of a prompt of a tiny model."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import build, tokens
from transformers import DynamicCache

from hf_pqcache.models.names import cache_kwargs

COUNT = 100


def seen(name: str, layer: int = 1) -> dict[str, Any]:
    """What a press gets of a layer: module, hidden_states, keys, values, kwargs; and the attention weights."""
    model, found = build(name, "eager"), {}

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        found.update(module=module, hidden_states=kwargs["hidden_states"], kwargs=kwargs, attentions=output[1])

    handle = next(part for path, part in model.named_modules() if path.endswith(f"{layer}.self_attn")).register_forward_hook(
        hook, with_kwargs=True
    )
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(2, COUNT), **cache_kwargs(cache))
    handle.remove()
    return {**found, "keys": cache.layers[layer].keys, "values": cache.layers[layer].values}
