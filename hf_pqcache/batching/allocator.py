"""Blocks and slots of requests, and the prefixes that blocks hold, under transformers' continuous batching.

The only file that touches what its allocator inherits (transformers 5.20 to 5.24: `FullAttentionCacheAllocator`); `support.py`
checks its signatures before. Ledgers, reference counts and forks are transformers' own.

A block is complete when it is written, which is when its tokens leave the window; it is never changed again. So forks share
all blocks that they have, and only the window is copied. Sinks lie in the window: blocks hold tokens from `sink_tokens` on,
hashes cover the sinks besides, and who shares a prefix gets a copy of its sinks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers.generation.continuous_batching.cache_allocators import CachePool, FullAttentionCacheAllocator
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import compute_block_hash

from hf_pqcache.batching.requests import Request
from hf_pqcache.batching.slots import SlotLayers

TYPE = FullAttentionCacheAllocator.layer_type
#: Of blocks on their way to the device at a time.
_PIECE_BYTES = 1 << 26


class SlotAllocator(FullAttentionCacheAllocator):
    """Blocks of requests, and their slots.

    Args:
        kept: how many tokens of a prompt a press leaves, see `Pruning`; None prunes nothing.

    Attributes:
        prompt: length of the prompt of the request that is looked at, while it has no slot.
    """

    def __init__(self, layers: SlotLayers, allow_block_sharing: bool, kept: Callable[[int], int] | None = None) -> None:
        self.layers, self._kept, self.prompt = layers, kept, 0
        self._before_cache_tensor_init(
            index=0,
            layer_indices=list(range(layers.num_layers)),
            tokens_per_page=layers.config.page_size,
            bytes_per_page=layers.page_bytes,
            allow_block_sharing=allow_block_sharing,
        )
        self.requests: dict[str, Request] = {}
        self.free_slots = list(range(layers.num_slots - 1, -1, -1))

    def register_cache_tensor(self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: Tensor, pool: CachePool) -> None:
        self.bytes_per_sector = bytes_per_sector
        self._copy_view = cache_tensor.view(-1, self.bytes_per_block)
        self._after_cache_tensor_init(non_trash_bytes, bytes_per_sector, cache_tensor, pool)
        self.layers.attach(self._copy_view)

    # -- slots -------------------------------------------------------------------------------------------------------
    def open(self, request_id: str, stored: int, coded: int) -> Request:
        """Give a request a slot, of which there must be one."""
        row = np.full(2 + self.layers.page_table.shape[1], -1, dtype=np.int32)
        row[0] = slot = self.free_slots.pop()
        request = self.requests[request_id] = Request(slot, stored, coded, row)
        return request

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        if (request := self.requests.pop(request_id, None)) is not None:
            self.free_slots.append(request.slot)
        super().free_blocks(request_id, no_cache)

    def stored_after(self, request: Request | None, length: int) -> int:
        """Tokens in window and pages once the first `length` of a request have come."""
        if self._kept is None:
            return length
        if request is not None and request.stored:
            return length - request.pruned
        prompt = self.prompt if request is None or request.prompt is None else request.prompt
        return self._kept(min(length, prompt)) + max(0, length - prompt)

    def fill(self) -> dict[str, int]:
        """Bytes of requests' blocks and windows ("owned"; a block that several share counts once), and those of them that hold
        no token yet ("empty"): a window that is not full, a block that waits for its tokens. Asked in any thread."""
        layers, requests, tables = self.layers, self.requests.copy(), self.block_table.copy()
        window = layers.config.sink_tokens + layers.config.window_slots
        empty = sum(max(0, window - (request.stored - request.coded)) for request in requests.values())
        written = {name: request.coded // self.tokens_per_page for name, request in requests.items()}
        waiting = sum(max(0, len(table) - written.get(name, 0)) for name, table in tables.items())
        owned = len({block for table in tables.values() for block in table})
        token, block = layers.window_token_bytes, self.bytes_per_block
        return {"owned": owned * block + len(requests) * window * token, "empty": waiting * block + empty * token}

    # -- blocks: only what has left the window needs any -----------------------------------------------------------------
    def needs_new_blocks(self, request_id: str, past_length: int, query_length: int) -> int:
        request, owned = self.requests.get(request_id), len(self.block_table.get(request_id, []))
        length = self.stored_after(request, past_length + query_length)
        coded = self.layers.coded_after(0 if request is None else request.coded, length)
        return max(0, coded // self.tokens_per_page - owned)

    def allocate_cache_to_request(self, request_id: str, past_length: int, query_length: int) -> None:
        needed = self.needs_new_blocks(request_id, past_length, query_length)
        self.block_table.setdefault(request_id, []).extend(self.pool.get_free_blocks(self.index, needed))

    @property
    def free_blocks_left(self) -> int:
        """Blocks that hold nothing."""
        return self.pool.num_free_sectors * self.blocks_per_sector + self.pool.count_free_blocks(self.index)

    def get_blocks(self, count: int) -> list[int]:
        """Free blocks, of which there must be so many, for no request."""
        while self.pool.count_free_blocks(self.index) < count:
            self.pool.allocate_sector(self.index)
        return self.pool.get_free_blocks(self.index, count)

    def give_back(self, blocks: list[int]) -> None:
        self.pool.free_blocks(self.index, blocks)

    def read_blocks(self, blocks: list[int]) -> Tensor:
        """Their bytes on the host, uint8 (n, bytes_per_block)."""
        device, each = self._copy_view.device, max(1, _PIECE_BYTES // self.bytes_per_block)
        pieces = [torch.tensor(blocks[at : at + each], device=device) for at in range(0, len(blocks), each)]
        return torch.cat([self._copy_view[:0].cpu(), *(self._copy_view[piece].cpu() for piece in pieces)])

    def write_blocks(self, blocks: list[int], contents: Tensor, rows: list[int]) -> None:
        """Put rows of `contents`, uint8 (n, bytes_per_block) on the host, into blocks."""
        device, each = self._copy_view.device, max(1, _PIECE_BYTES // self.bytes_per_block)
        for at in range(0, len(blocks), each):
            there = torch.tensor(blocks[at : at + each], device=device)
            self._copy_view[there] = contents[rows[at : at + each]].to(device)

    def count_shareable_blocks(self, source_request_id: str, past_length: int) -> int:
        return self.requests[source_request_id].coded // self.tokens_per_page if self.use_block_sharing else 0

    # -- prefixes ----------------------------------------------------------------------------------------------------
    def _first_hash(self, token_ids: list[int]) -> int | None:
        sinks = self.layers.config.sink_tokens
        return compute_block_hash(None, token_ids[:sinks]) if sinks else None

    def _tokens_of(self, token_ids: list[int], block: int) -> list[int]:
        first = self.layers.config.sink_tokens + block * self.tokens_per_page
        return token_ids[first : first + self.tokens_per_page]

    def match_prefix_blocks(self, prompt_ids: list[int]) -> list[int]:
        """The longest run of known blocks, which leaves at least one token of the prompt to compute."""
        found: list[int] = []
        current = self._first_hash(prompt_ids)
        for i in range((len(prompt_ids) - 1 - self.layers.config.sink_tokens) // self.tokens_per_page):
            current = compute_block_hash(current, self._tokens_of(prompt_ids, i))
            block = self.ledger.hash_to_block.get(current)
            if block is None:
                break
            found.append(block)
        return found

    def contents_of(self, tokens: list[list[int]], parents: list[int], sinks: list[list[int]]) -> list[int]:
        """Hashes of blocks of `tokens`, each behind the one of number `parents[i]`; -1 is behind the next of `sinks`."""
        found, firsts = list[int](), iter(sinks)
        for own, parent in zip(tokens, parents, strict=True):
            found.append(compute_block_hash(self._first_hash(next(firsts)) if parent < 0 else found[parent], own))
        return found

    def has(self, content: int) -> bool:
        return content in self.ledger.hash_to_block

    def keep(self, blocks: list[int], contents: list[int]) -> None:
        """Make known what blocks hold that no request has, as if one had had them."""
        for block, content in zip(blocks, contents, strict=True):
            self.ledger.register_new_hash(block, content)
            self.ledger.release(block)

    def mark_complete_blocks(self, request_id: str, token_ids: list[int], new_new_blocks: int) -> None:
        """Make known what the last step has written; a block whose contents are known already is given back."""
        request = self.requests.get(request_id)
        if request is None:
            return
        parent, table, is_changed = self._first_hash(token_ids), self.block_table[request_id], False
        for i, block in enumerate(table):
            known = self.ledger.block_to_hash.get(block)
            if known is None:
                tokens = self._tokens_of(token_ids, i)
                if not new_new_blocks or len(tokens) < self.tokens_per_page:
                    break
                known, new_new_blocks = compute_block_hash(parent, tokens), new_new_blocks - 1
                if (same := self.ledger.register_new_hash(block, known)) is not None:
                    self.ledger.acquire(same)
                    table[i], is_changed = same, True
                    if self.ledger.release(block):
                        self.pool.free_blocks(self.index, [block])
            parent = known
        if is_changed:
            request.set_blocks(table, is_changed=True)

    # -- what a step reads -----------------------------------------------------------------------------------------------
    def get_read_indices(self, request_id: str, past_length: int, query_length: int) -> list[int]:
        return []

    get_write_indices = get_read_indices

    def fill_block_table(self, request_id: str, past_length: int, query_length: int, block_table: Tensor) -> None:
        """The request's row of the block table: slot, tokens in pages before this step, blocks; in the end, all tokens."""
        request = self.requests[request_id]
        request.set_blocks(self.block_table[request_id])
        request.row[1] = request.coded
        used = 2 + request.in_row
        block_table[:used] = torch.from_numpy(request.row[:used])
        block_table[-1] = request.stored
