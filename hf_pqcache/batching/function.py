"""The attention function that a model has while an engine runs; knows what an engine passes to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_pqcache.batching.blocks import SlotCache

#: What the model's attention implementation is called while an engine runs.
NAME = "pqcache_blocks"
#: Keywords of attention that do not change what it computes, or that only an engine passes.
_HARMLESS = set(
    """block_table cache cache_layer cache_position cu_seq_lens_k cu_seq_lens_q dropout input_ids is_causal labels
    logits_indices logits_processor_args logits_to_keep max_length_k max_length_q num_items_in_batch output_attentions
    output_hidden_states output_router_logits position_embeddings position_ids read_index return_dict sliding_window use_cache
    write_index""".split()  # noqa: SIM905 - a list of them fills half a page
)


@torch.compiler.disable
def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function while an engine runs: (1, Hq, T, d) and (1, H, T, d) packed -> (1, T, Hq, d)."""
    cache = kwargs.get("cache")
    if not isinstance(cache, SlotCache):
        raise RuntimeError(
            "the model's attention is set up for continuous batching, and this is another call. Wait for generate_batch, or "
            "leave its context manager, before you call generate or the model itself"
        )
    odd = [name for name, x in kwargs.items() if name not in _HARMLESS and x is not None and x is not False]
    if odd or attention_mask is not None or kwargs.get("sliding_window"):
        what = ", ".join(odd) or ("attention_mask" if attention_mask is not None else "sliding_window")
        raise NotImplementedError(f"attention over blocks does not know what {type(module).__name__} makes of {what}")
    table = kwargs.get("block_table")
    if cache.pruning is not None:
        cache.pruning.begin(module)
    out = cache.steps.attend(
        kwargs.get("cache_layer", module.layer_idx),
        query,
        key,
        value,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        None if table is None else table[0],
    )
    return out, None
