"""Which cards hold a model and its cache: memory of common cards, bytes of a model's weights; loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_pqcache.cache.footprint import plan_memory
from hf_pqcache.config import PQConfig

GIB = 1 << 30
#: GiB that CUDA shows of common cards.
CARDS = {
    "L4, RTX 4090 (24 GB)": 22,
    "RTX 5090 (32 GB)": 31,
    "A100 40 GB": 39,
    "L40S (48 GB)": 44,
    "A100, H100 80 GB": 79,
    "H200 (141 GB)": 139,
    "B200 (180 GB)": 178,
}
#: Share of a card that is left to activations and the CUDA context.
LEFT = 0.1


def weight_bytes(config: Any, trust_remote_code: bool = False) -> int:
    """Bytes of a model's weights as saved, counted on a model without memory. Of quantized weights an estimate.

    Raises what transformers raises for a config that it has no causal language model for.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.bfloat16
    bits = torch.finfo(dtype).bits if isinstance(dtype, torch.dtype) else 16
    quantized = getattr(config, "quantization_config", None)
    if isinstance(quantized, dict):
        small = 4 if quantized.get("load_in_4bit") else 8 if quantized.get("load_in_8bit") else quantized.get("bits")
        embeddings = model.get_input_embeddings().weight.numel()
        if isinstance(small, int):
            return ((parameters - embeddings) * (small + 1) + embeddings * bits) // 8
    return parameters * bits // 8


def tokens_that_fit(
    config: Any, caches: Sequence[str], room: float, *, batch: int, pq_config: PQConfig | None = None, dtype_bytes: int = 2
) -> dict[str, int]:
    """Tokens of each of `batch` sequences whose cache takes at most `room` bytes, by cache; about, to a page."""
    near, far = (plan_memory(config, tokens=n << 20, batch=batch, pq_config=pq_config, dtype_bytes=dtype_bytes) for n in (1, 2))
    found = {}
    for cache in caches:
        at_far = far[cache].total
        slope = (at_far - near[cache].total) / (1 << 20)
        found[cache] = max(0, int((2 << 20) - (at_far - room) / slope)) if slope > 0 else 0
    return found
