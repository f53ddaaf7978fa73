"""Whether transformers' continuous batching is as we know it, and whether a model fits; touches neither.

Everything private that `blocks.py` and `manager.py` inherit or replace is listed here with the arguments that we rely on,
and checked by signature: a release that changes one of them is refused with its name, before anything is computed.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import transformers
from packaging.version import Version

from hf_pqcache.attention.functions import eager_function, known
from hf_pqcache.models.code import gives_attention_what_it_caches
from hf_pqcache.models.shapes import has_latent_attention, layer_configs

OLDEST = "5.20"
_ENGINE = "transformers.generation.continuous_batching"
#: module, attribute -> arguments that are passed by name or place.
_SIGNATURES: dict[tuple[str, str], tuple[str, ...]] = {
    ("cache", "PagedAttentionCache.can_store_request_tokens"): ("state", "request_len", "dry_run"),
    ("cache", "PagedAttentionCache.search_prefix_match"): ("request_id", "prompt_ids"),
    ("cache", "PagedAttentionCache.count_new_complete_blocks"): ("state", "request_len"),
    ("cache", "PagedAttentionCache.mark_complete_blocks"): ("state", "complete_blocks"),
    ("cache", "PagedAttentionCache.prepare_fork_request"): ("src_state", "dst_req_ids", "copy_src_and_dst"),
    ("cache", "PagedAttentionCache.perform_cache_copy"): ("copy_src_and_dst",),
    ("cache", "PagedAttentionCache.reset"): (),
    ("cache", "PagedAttentionCache.free_blocks"): ("request_id", "no_cache"),
    ("cache", "PagedAttentionCache.free_all_requests"): ("clear_ledgers",),
    ("cache", "PagedAttentionCache.update"): ("key_states", "value_states", "layer_idx", "kwargs"),
    ("cache", "PagedAttentionCache.fill_block_table"): ("request_id", "past_length", "query_length", "block_table"),
    ("cache", "PagedAttentionCache.extend_read_and_write_indices"): (
        "request_id", "past_length", "query_length", "read_index", "write_index",
    ),
    ("cache", "PagedAttentionCache.__init__"): (
        "config", "continuous_batching_config", "device", "distributed_helper", "dtype",
    ),
    ("cache_allocators.cache_pool", "CachePool.__init__"): ("num_sectors", "num_allocators"),
    ("cache_allocators.cache_pool", "CachePool.get_free_blocks"): ("index", "num_blocks"),
    ("cache_allocators.cache_pool", "CachePool.free_blocks"): ("index", "block_ids"),
    ("cache_allocators.cache_pool", "CachePool.count_free_blocks"): ("index",),
    ("cache_allocators.cache_allocator", "compute_block_hash"): ("parent_hash", "tokens"),
    ("cache_allocators.cache_allocator", "CacheAllocator._before_cache_tensor_init"): (
        "index", "layer_indices", "tokens_per_page", "bytes_per_page", "allow_block_sharing",
    ),
    ("cache_allocators.cache_allocator", "CacheAllocator._after_cache_tensor_init"): (
        "non_trash_bytes", "bytes_per_sector", "cache_tensor", "pool",
    ),
    ("cache_allocators.cache_allocator", "CacheAllocator.free_blocks"): ("request_id", "no_cache"),
    ("cache_allocators.cache_allocator", "CacheAllocator.acquire_prefix_blocks"): ("request_id", "prefix_len", "block_ids"),
    ("cache_allocators.cache_allocator", "CacheAllocator.mark_complete_blocks"): ("request_id", "token_ids", "new_new_blocks"),
    ("cache_allocators.cache_allocator", "CacheAllocator.match_prefix_blocks"): ("prompt_ids",),
    ("cache_allocators.cache_allocator", "CacheAllocator.count_shareable_blocks"): ("source_request_id", "past_length"),
    ("cache_allocators.cache_allocator", "BlockLedger.register_new_hash"): ("block_id", "block_hash"),
    ("continuous_api", "ContinuousBatchingManager.__init__"): (
        "model", "generation_config", "continuous_batching_config", "workload_hints",
    ),
    ("continuous_api", "ContinuousBatchingManager.switch_to_cb_friendly_attn"): ("model", "auto_switch_to_flash"),
    ("continuous_api", "ContinuousBatchingManager._create_batch_processor"): (),
    ("continuous_api", "ContinuousBatchProcessor._handle_request_error"): ("error", "state"),
    ("scheduler", "FIFOScheduler.schedule_batch"): ("token_budget", "cache_budget"),
    ("scheduler", "PrefillFirstScheduler.schedule_batch"): ("token_budget", "cache_budget"),
    ("scheduler", "Scheduler.add_waiting_request"): ("state",),
    ("scheduler", "Scheduler.finish_request"): ("request_id",),
    ("scheduler", "Scheduler.clear_cancelled_requests"): (),
    ("input_outputs", "ContinuousBatchingIOs.prepare_batch_tensors"): ("requests_in_batch", "use_decode_fast_path"),
}  # fmt: skip


def why_unsupported() -> str | None:
    """Why continuous batching is not to be had with this transformers, if so."""
    version = Version(transformers.__version__)
    if version < Version(OLDEST):
        return f"continuous batching needs transformers {OLDEST} or newer, and {version} is installed"
    for (module, path), arguments in _SIGNATURES.items():
        try:
            found: Any = importlib.import_module(f"{_ENGINE}.{module}")
            for name in path.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            return _changed(version, f"{module}.{path} is gone")
        takes = inspect.signature(found).parameters
        if missing := [name for name in arguments if name not in takes]:
            return _changed(version, f"{module}.{path} takes no {', '.join(missing)} any more")
    return None


def _changed(version: Version, what: str) -> str:
    return (
        f"transformers {version} has changed its continuous batching: {what}. Use a release that pqcache doctor names as "
        "tested, and tell us"
    )


def why_unfit(model: Any) -> str | None:
    """Why a model cannot be served over blocks of ours, if so."""
    config = model.config.get_text_config()
    name = type(model).__name__
    if has_latent_attention(config):
        return f"{name} caches a latent vector, not keys and values"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} has an encoder, which transformers' continuous batching does not serve"
    told = getattr(config, "layer_types", None)
    if kinds := sorted({*(told or [])} - {"full_attention"}):
        return f"{name} has layers of {', '.join(kinds)}; continuous batching over blocks takes full attention only"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True) and told is None:
        return f"{name} attends to a sliding window of {config.sliding_window} tokens; blocks are for full attention"
    if len({id(layer) for layer in layer_configs(config)}) > 1:
        return f"{name}'s layers differ in shape, and blocks hold a page of each"
    if not gives_attention_what_it_caches(config):
        return f"{name} computes with keys and values itself, or hands attention others than it caches"
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):
            if not module.is_causal:
                return f"{type(module).__name__} is not causal"
            function = eager_function(module)
            facts = known(function)
            if facts is None:
                return f"what {function.__qualname__} computes is not known here; it is not one of transformers' own"
            if facts.sinks:
                return f"{type(module).__name__} has attention sinks of its own"
    return None


def base_of(model: Any) -> Any:
    """The model of transformers itself: LoRA's wrapper passes calls on."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
