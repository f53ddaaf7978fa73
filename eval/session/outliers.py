"""Keys with a few channels much larger than the others, planted into a model without changing what it computes.

Some models have them by nature (Qwen2.5's first and last layers), and caches that scale a vector by its largest number then
keep little of the rest. Scaling channels of the keys up and the same channels of the queries down leaves every score as it
was, so that what is lost is the cache's. Knows no cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_pqcache.models.shapes import kv_shape, layer_configs


@torch.no_grad()
def plant_outliers(model: Any, factor: float = 30.0) -> int:
    """Multiply two channels of every KV head by `factor` in k_proj, and divide them in q_proj -> layers that were changed.

    The two are the ones that a rotary embedding turns together most slowly: turned together they are scaled alike, and hardly
    turning they are large in every token, as outliers of real models are. They stay: load the model anew to be rid of them.

    Raises ValueError for a factor that is not above 0, and for a model in which this would change what it computes: keys
    normalised after their projection, or projections that are not linear layers k_proj and q_proj of their own.
    """
    if not factor > 0:
        raise ValueError(f"outliers={factor} must be above 0: what channels of the keys are multiplied by")
    layers = layer_configs(model.config.get_text_config(decoder=True))
    attentions = [module for module in model.modules() if hasattr(module, "k_proj") and hasattr(module, "q_proj")]
    for module in attentions:
        plain = isinstance(module.k_proj, nn.Linear) and isinstance(module.q_proj, nn.Linear)
        if not plain or any(hasattr(module, name) for name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")):
            attentions = []
            break
    if not attentions:
        raise ValueError(
            f"outliers cannot be planted in {type(model).__name__}: that needs linear q_proj and k_proj, no norm behind them"
        )
    for module in attentions:
        _, head_dim = kv_shape(layers[getattr(module, "layer_idx", 0) or 0])
        assert head_dim is not None
        for projection, scale in ((module.k_proj, factor), (module.q_proj, 1 / factor)):
            for parameter in filter(lambda p: p is not None, (projection.weight, projection.bias)):
                heads = parameter.unflatten(0, (-1, head_dim))
                heads[:, [head_dim // 2 - 1, head_dim - 1]] *= scale
    return len(attentions)
