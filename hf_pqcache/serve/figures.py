"""What an engine's parts say of themselves in figures and words, for operators; asked in any thread while it runs."""

from __future__ import annotations

from typing import Any

from hf_pqcache.batching.images import of


def state(settings: Any, manager: Any) -> dict[str, float]:
    """Requests that wait and run, blocks used and free, and what `_fill` says.

    Args:
        settings: the engine's. manager: transformers', warmed up.
    """
    processor, cache = manager.batch_processor, manager.batch_processor.cache
    free = cache.compute_free_capacity() * cache.num_blocks
    return {
        "waiting": manager.input_queue.qsize() + len(processor.scheduler.waiting_requests),
        "running": len(processor.scheduler.active_requests),
        "blocks_free": free,
        "blocks_used": cache.num_blocks - free,
        "pool_bytes": cache.cache_tensor.nbytes,
        **(_stock_fill(processor) if settings.variant == "stock" else _fill(cache)),
        **_images(manager.model),
    }


def facts(settings: Any, manager: Any) -> dict[str, str]:
    """What does not change: what blocks hold, the press, where finished prompts are stored, and why not as asked for."""
    found = {"blocks": settings.variant, "press": settings.press or "none"}
    if settings.variant == "stock":
        return found
    compression = manager.stats()["compression"]
    is_as_asked = compression["lane"] == settings.compress
    because = "" if is_as_asked else compression["greenctx_reason"]
    return found | {"compress": compression["lane"], "compress_because": because}


def _fill(cache: Any) -> dict[str, float]:
    """Bytes that requests have, those of them that hold no token yet, slots; prompts stored beside steps, tokens pruned."""
    fill, free, total = cache.allocator.fill(), len(cache.allocator.free_slots), cache.layers.num_slots
    found = {"owned_bytes": fill["owned"], "empty_bytes": fill["empty"], "slots_used": total - free, "slots_free": free}
    found["stored_beside"] = cache.compression.counts["beside"]
    size, tokens = cache.allocator.bytes_per_block, cache.allocator.tokens_per_page
    for name in ("imported", "exported"):
        found |= {f"{name}_tokens": cache.exchanged[name] * tokens, f"{name}_bytes": cache.exchanged[name] * size}
    found["refused_imports"] = cache.exchanged["refused"]
    return found | ({} if cache.pruning is None else {"pruned_tokens": cache.pruning.pruned_tokens})


def _images(model: Any) -> dict[str, float]:
    """Tokens of images that are remembered, and of them what requests may look at; none for a model that takes none."""
    if (images := of(model)) is None:
        return {}
    found = images.stats()
    return {"image_tokens": found["remembered"], "image_tokens_held": found["held"], "image_room": found["room"]}


def _stock_fill(processor: Any) -> dict[str, float]:
    """The same of transformers' own blocks, whose last one of each request is half full."""
    active = processor.scheduler.active_requests.copy()
    owned = empty = 0
    for one in processor.cache.cache_allocators.values():
        tables = one.block_table.copy()
        owned += len({block for table in tables.values() for block in table}) * one.bytes_per_block
        for name, state in active.items():
            room = len(tables.get(name, ())) * one.tokens_per_page
            empty += max(0, room - state.current_len()) * one.bytes_per_block // one.tokens_per_page
    return {"owned_bytes": owned, "empty_bytes": empty}
