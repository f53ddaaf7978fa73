"""The cache that transformers' continuous batching is given, over coded or exact blocks.

The only file that touches what it inherits (transformers 5.20 to 5.24: `PagedAttentionCache`, `CachePool`); `support.py` checks
its signatures before. Scheduling, reference counts and forks are transformers' own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import lcm
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import CachePool

from hf_pqcache.batching.allocator import TYPE, SlotAllocator
from hf_pqcache.batching.compression import Compression, Room
from hf_pqcache.batching.pruning import Pruning
from hf_pqcache.batching.requests import Chunk, Job, Pruned, Request, Staging
from hf_pqcache.batching.sizes import Sizes, longest
from hf_pqcache.batching.slots import SlotLayers
from hf_pqcache.batching.steps import Steps

#: Blocks of prefixes that left, and that came from other engines: new here, here already, without room; and how many times
#: an import was refused.
EXCHANGED = ("exported", "imported", "known", "left_out", "refused")


class SlotCache(PagedAttentionCache):
    """The engine's cache; its constructor sizes it, attention and prefixes are its own, the rest is inherited.

    Args:
        sizes: of blocks and slots, see `sizes.py`.
        layers: over which, not yet attached.
        config, dtype, device: of the model.
        allow_block_sharing: whether prefixes may be shared.
        max_batch_tokens: most tokens of a step.
        pruning: of prompts; None keeps all of them.
    """

    def __init__(
        self,
        layers: SlotLayers,
        sizes: Sizes,
        *,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        allow_block_sharing: bool,
        max_batch_tokens: int,
        pruning: Pruning | None = None,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.layers, self.sizes = layers, sizes
        self.pruning, kept = pruning, None if pruning is None else pruning.kept
        allocator = self.allocator = SlotAllocator(layers, allow_block_sharing and pruning is None, kept)
        self.cache_allocators: dict[str, Any] = {TYPE: allocator}
        self.layer_to_allocator: dict[int, Any] = dict.fromkeys(range(layers.num_layers), allocator)
        self.bytes_per_sector = lcm(allocator.bytes_per_block, 128)
        blocks_per_sector = self.bytes_per_sector // allocator.bytes_per_block
        self.tokens_per_sector = blocks_per_sector * allocator.tokens_per_page
        self.max_batch_tokens, self.num_sectors = max_batch_tokens, -(-sizes.num_blocks // blocks_per_sector)
        non_trash = self.num_sectors * self.bytes_per_sector
        self.cache_tensor = torch.zeros(non_trash + 2 * self.bytes_per_sector, dtype=torch.uint8, device=device)
        self.pool = CachePool(self.num_sectors, 1)
        allocator.register_cache_tensor(self.bytes_per_sector, non_trash, self.cache_tensor, self.pool)
        self.allow_block_sharing = allow_block_sharing and pruning is None
        self.use_prefix_sharing = allocator.use_block_sharing
        self.num_blocks = allocator.num_blocks
        self.max_blocks_per_request = sizes.table_width + 3  # columns of the engine's block table
        self.read_cache_limit = 0  # nothing is read through the engine's indices
        # Positions, which say nothing of a pruned request's blocks.
        self.max_decode_fast_path_length = longest(layers.config, sizes.table_width) if pruning is None else 1 << 40
        self.max_tokens_read = allocator.tokens_per_page * allocator.num_blocks
        self.steps = Steps(layers, sizes.num_slots, len(allocator._copy_view))
        room = Room(sizes.staging_tokens)
        self.compression = self.steps.compression = Compression(layers, room, self.steps.on_compute, self._taken_in)
        if pruning is not None:
            pruning.failed = self.compression.failed
        self._sinks_of: dict[int, Tensor] = {}  # by the hash of a prefix's first block, which tells its first tokens as well
        self._forked: list[tuple[int, int]] = []  # windows to copy
        self.exchanged: Counter[str] = Counter()  # see EXCHANGED

    # -- scheduling ------------------------------------------------------------------------------------------------------
    def why_unfit(self, prompt: int, new: int) -> str | None:
        """Why a request of so many tokens could never be served, if so."""
        config = self.layers.config
        most = longest(config, min(self.sizes.table_width, self.num_blocks))
        if self.pruning is not None and prompt > self.sizes.staging_tokens:
            return (
                f"the prompt is {prompt} tokens long, and a press needs it whole: {self.sizes.staging_tokens} tokens may wait "
                "exactly for their end. Lower num_blocks or max_requests_per_batch of the ContinuousBatchingConfig"
            )
        stored = prompt if self.pruning is None else self.pruning.kept(prompt)
        if stored + new <= most:
            return None
        return (
            f"the request is {prompt + new} tokens long, {new} of them to be generated, and one request has room for {most}: "
            f"of {self.num_blocks} blocks of {config.page_size} tokens it may have {self.sizes.table_width}. Ask for fewer "
            "tokens, or raise max_length= of enable_batching or num_blocks= of the ContinuousBatchingConfig"
        )

    def can_store_request_tokens(self, state: Any, request_len: int, dry_run: bool = False) -> bool:
        allocator, request = self.allocator, self.allocator.requests.get(state.request_id)
        if request is None and not dry_run and not (allocator.free_slots and self._may_wait(state, request_len)):
            return False
        # After a soft reset transformers counts generated tokens to the prompt.
        allocator.prompt = state._true_initial_tokens or len(state.initial_tokens)
        if not super().can_store_request_tokens(state, request_len, dry_run):
            return False
        if not dry_run:
            if request is None:
                length = state.current_len()  # 0, but for the engine's warm-up
                request = allocator.open(state.request_id, length, self.layers.config.coded_tokens(length))
            request.prompt = allocator.prompt
            if self.pruning is not None and not request.stored:
                request.images = self.pruning.images_in(state.initial_tokens[: allocator.prompt])
        return True

    def _may_wait(self, state: Any, request_len: int) -> bool:
        """Whether a new prompt ends at once, or there is room for what waits until it ends."""
        prompt = len(state.remaining_prefill_tokens)
        return (request_len == prompt and not state.num_children) or self.compression.room.has(prompt)

    def is_in_prompt(self, request_id: str) -> bool:
        """Whether a request's next token is one of its prompt: no decode step, even if it is the last one."""
        return self.allocator.requests[request_id].is_in_prompt

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        allocator, sinks = self.allocator, self.layers.config.sink_tokens
        if not self.use_prefix_sharing or not allocator.free_slots or not self.layers.is_equalised:
            return 0
        blocks = allocator.match_prefix_blocks(prompt_ids)
        if not blocks or (first := self.sinks_before(blocks[0])) is None:
            return 0
        coded = len(blocks) * allocator.tokens_per_page
        allocator.acquire_prefix_blocks(request_id, coded, blocks)
        request = allocator.open(request_id, sinks + coded, coded)
        request.sinks = first if sinks else None
        self.steps.counts["prefix_tokens"] += sinks + coded
        return sinks + coded

    def count_new_complete_blocks(self, state: Any, request_len: int) -> dict[str, int]:
        if not self.use_prefix_sharing:
            return {}
        request = self.allocator.requests[state.request_id]
        if request.prompt is not None and request.length + request_len < request.prompt:
            return {}  # the prompt's keys wait
        coded = self.layers.coded_after(request.coded, request.length + request_len)
        new = (coded - request.coded) // self.allocator.tokens_per_page
        return {TYPE: new} if new else {}

    def mark_complete_blocks(self, state: Any, complete_blocks: dict[str, int]) -> None:
        if (job := self.compression.jobs.get(state.request_id)) is not None:
            job.complete_blocks = (state, complete_blocks)
            return
        request = self.allocator.requests.get(state.request_id)
        super().mark_complete_blocks(state, complete_blocks)
        if request is not None and complete_blocks and self.layers.config.sink_tokens:
            self._keep_sinks(request.slot, self.allocator.block_table[state.request_id][0])

    def _keep_sinks(self, slot: int, block: int) -> None:
        """Whoever begins with this block needs the first tokens, too, which its request has in its window."""
        known = self.allocator.ledger.block_to_hash
        if (content := known.get(block)) is None or content in self._sinks_of:
            return
        with self.steps.on_compute():
            self.add_sinks({content: self.layers.sinks(slot)})

    def add_sinks(self, sinks: Mapping[int, Tensor]) -> None:
        """The first tokens before first blocks, by the hashes of those; what is known stays."""
        known = self.allocator.ledger.block_to_hash
        for content, own in sinks.items():
            self._sinks_of.setdefault(content, own)
        if len(self._sinks_of) > 2 * len(known):  # of blocks that are gone
            there = set(known.values())
            self._sinks_of = {content: sinks for content, sinks in self._sinks_of.items() if content in there}

    def sinks_before(self, block: int) -> Tensor | None:
        """The first tokens before a known first block, (L, 2, H, sinks, d), to be copied; None where they are not known."""
        if not self.layers.config.sink_tokens:
            return self.layers.no_sinks
        return self._sinks_of.get(self.allocator.ledger.block_to_hash[block])

    def prepare_fork_request(self, src_state: Any, dst_req_ids: list[str], copy_src_and_dst: Any) -> list[str]:
        allocator = self.allocator
        self.compression.settle(src_state.request_id)
        source = allocator.requests[src_state.request_id]
        forked: list[str] = super().prepare_fork_request(src_state, dst_req_ids[: len(allocator.free_slots)], copy_src_and_dst)
        for request_id in forked:
            child = source.fork(allocator.free_slots.pop())
            allocator.requests[request_id] = child
            child.set_blocks(allocator.block_table[request_id], is_changed=True)
            if source.stored:
                self._forked.append((source.slot, child.slot))
        return forked

    def perform_cache_copy(self, copy_src_and_dst: Any) -> None:
        super().perform_cache_copy(copy_src_and_dst)
        for source, target in self._forked:
            self.layers.copy_window(source, target)
        self._forked.clear()

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        self.compression.forget(request_id, self.allocator.requests.get(request_id))
        super().free_blocks(request_id, no_cache)

    def free_all_requests(self, clear_ledgers: bool = False) -> None:
        for request_id, request in self.allocator.requests.items():
            self.compression.forget(request_id, request)
        super().free_all_requests(clear_ledgers)

    def _taken_in(self, job: Job) -> None:
        if job.complete_blocks is not None:
            self.mark_complete_blocks(*job.complete_blocks)

    def reset(self) -> None:
        super().reset()
        self._sinks_of.clear()
        self.layers.forget_equalisers()

    # -- a step ----------------------------------------------------------------------------------------------------------
    def fill_block_table(self, request_id: str, past_length: int, query_length: int, block_table: Tensor) -> None:
        request = self.allocator.requests[request_id]
        self.steps.before_decode(request)
        super().fill_block_table(request_id, past_length, query_length, block_table)
        self._advance(request, past_length + query_length)

    def extend_read_and_write_indices(
        self, request_id: str, past_length: int, query_length: int, read_index: Any, write_index: Any
    ) -> None:
        request, new_length = self.allocator.requests[request_id], past_length + query_length
        assert request.prompt is not None
        exact = max(0, min(new_length, request.prompt) - past_length)
        staged = 0 if request.staging is None else request.staging.tokens
        whole, job = request.prompt - past_length + staged, None
        keeps = new_length < request.prompt and self.compression.room.stage(request.slot, whole, staged + exact)
        if new_length == request.prompt:
            job = self.compression.plan(request_id, request, new_length)
        if not keeps and job is None:
            self.compression.room.leave(request.slot)
        pruned = None
        if self.pruning is not None and exact and not request.stored:
            pruned = Pruned(self.pruning, request_id, request, self.pruning.kept(staged + exact))
            if new_length < request.prompt and not keeps:
                self.pruning.refuse(pruned, "the prompt would have to be stored in parts, and a press needs it whole")
        self.steps.counts["cut_prompts"] += new_length < request.prompt and not keeps and request.stored == 0
        if keeps and request.staging is None:
            request.staging = Staging(self.layers.num_layers)
        chunk = Chunk(
            slot=request.slot,
            at=0,
            count=query_length,
            exact=exact,
            stored=request.stored,
            coded=request.coded,
            staged=staged,
            keeps=keeps,
            staging=request.staging,
            blocks=list(self.allocator.block_table[request_id]),
            sinks=request.sinks,
            job=job,
            pruned=pruned,
        )
        request.sinks = None
        if keeps:
            assert request.staging is not None
            request.staging.tokens += exact
        else:
            request.staging = None
            self._advance(request, new_length)
        self.steps.add(chunk)

    def _advance(self, request: Request, length: int) -> None:
        """A step is prepared after which `length` tokens of a request have come."""
        stored = self.allocator.stored_after(request, length)
        request.coded = self.layers.coded_after(request.coded, stored)
        request.stored, request.pruned = stored, length - stored

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Keys and values go on to attention as they are, which stores them; it is told where."""
        kwargs["cache"], kwargs["cache_layer"] = self, layer_idx
        return key_states, value_states

    # -- what users look at ----------------------------------------------------------------------------------------------
    def stats(self) -> dict[str, Any]:
        """What the cache holds and how it was served: see `batching.stats`."""
        allocator, layers = self.allocator, self.layers
        return {
            "blocks": {
                "total": self.num_blocks,
                "free": allocator.free_blocks_left,
                "shareable": len(allocator.ledger.cached_blocks),
                "tokens": allocator.tokens_per_page,
                "bytes": allocator.bytes_per_block,
            },
            "slots": {"total": layers.num_slots, "free": len(allocator.free_slots)},
            "bytes": {"blocks": self.cache_tensor.nbytes, "windows_and_tables": layers.nbytes, **allocator.fill()},
            "backend": layers.backend._asdict(),
            "prefixes": {name: self.exchanged[name] for name in EXCHANGED},
            **self.steps.stats(),
            **(
                {} if self.pruning is None else {"press": repr(self.pruning.press), "pruned_tokens": self.pruning.pruned_tokens}
            ),
        }
