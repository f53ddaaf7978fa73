"""How much memory an engine's cache takes: blocks, windows, prompts that wait; touches no tensor and no transformers."""

from __future__ import annotations

from dataclasses import dataclass

from hf_pqcache.config import PQConfig
from hf_pqcache.errors import CacheOutOfMemoryError

#: Requests at once where neither the user nor the workload says how many; transformers' own number.
MOST_SLOTS = 1024
#: Of what is left beside the model, at most so much for windows, and for prompts that come in chunks.
WINDOW_SHARE, STAGING_SHARE = 0.3, 0.15


@dataclass(frozen=True)
class Sizes:
    """Attributes:
    num_blocks: blocks of `page_size` tokens of all layers.
    num_slots: requests that may be computed at once, each with a window.
    table_width: most blocks of one request.
    staging_tokens: most tokens of prompts that wait exactly for their end; a prompt that is longer is stored meanwhile.
    """

    num_blocks: int
    num_slots: int
    table_width: int
    staging_tokens: int


def longest(config: PQConfig, pages: int) -> int:
    """Most tokens that fill no more than so many pages."""
    return config.sink_tokens + config.extended_residual + (pages + 1) * config.page_size - 1


@dataclass(frozen=True)
class Wishes:
    """What is asked for; None where it follows from memory.

    Attributes:
        num_blocks, num_slots: as in Sizes.
        max_length: most tokens of one request, prompt and new ones. is_usual: whether many are that long.
        max_prompt: most tokens of a prompt, where the workload is known.
    """

    num_blocks: int | None = None
    num_slots: int | None = None
    max_length: int = 1
    is_usual: bool = False
    max_prompt: int | None = None


def plan(
    config: PQConfig,
    wishes: Wishes,
    *,
    memory: int,
    block_bytes: int,
    slot_bytes: int,
    token_bytes: int,
    max_batch_tokens: int,
    is_beside: bool = False,
) -> Sizes:
    """Divide `memory` bytes, what is left beside the model and its activations.

    block_bytes: of a block. slot_bytes: of a window in all layers. token_bytes: of an exact token in all layers.
    is_beside: whether prompts are stored beside later steps: two steps of them wait besides.

    Raises CacheOutOfMemoryError (PQC004) if not even one request of the shortest kind fits.
    """
    per_request = max(1, config.pages_of(wishes.max_length))
    staging = STAGING_SHARE * memory // token_bytes
    if wishes.max_prompt is not None:
        # Also a prompt that would fit a step comes in two with others before it: one ends and the next one begins.
        staging = min(staging, 2 * wishes.max_prompt + (2 * max_batch_tokens if is_beside else 0))
    if is_beside:
        staging = max(staging, min(max_batch_tokens, memory // token_bytes // 2))
    left = memory - int(staging) * token_bytes
    slots = wishes.num_slots or MOST_SLOTS
    if wishes.num_blocks is None and wishes.is_usual:  # no more than can have blocks
        slots = min(slots, left // (slot_bytes + per_request * block_bytes))
    elif wishes.num_blocks is None or wishes.num_slots is None:
        slots = min(slots, int(WINDOW_SHARE * left) // slot_bytes)
    slots = max(1, slots)
    blocks = wishes.num_blocks
    if blocks is None:
        # Twice what all of them can use: the rest keeps prefixes of requests that are gone.
        blocks = min((left - (slots + 1) * slot_bytes) // block_bytes, 2 * slots * per_request)
    needed = max(blocks, 1) * block_bytes + (slots + 1) * slot_bytes
    if blocks < 1 or needed > memory:
        raise CacheOutOfMemoryError(
            f"{max(blocks, 1)} blocks of {block_bytes} bytes and windows of {slot_bytes} bytes for {slots} requests at once "
            f"need {needed / 2**20:.0f} MiB, and there are {memory / 2**20:.0f} MiB: lower num_blocks or "
            "max_requests_per_batch of the ContinuousBatchingConfig, or extended_residual="
        )
    # The engine warms up with one request that fills a step.
    width = max(per_request, config.pages_of(max_batch_tokens + config.page_size))
    return Sizes(int(blocks), int(slots), min(width, int(blocks)), int(staging))
