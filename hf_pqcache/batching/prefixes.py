"""Prefixes taken out of an engine's blocks as tensors, and put into another engine's as they were; knows no file.

A *prefix* is a run of complete blocks and the sinks before them. What leaves is a list of blocks in which each stands behind
the one that it continues, those that most prompts begin with first: so any beginning of the list is whole, and who has room
for less takes less.

Letters in shapes: n blocks of P tokens, m of them first blocks; L layers, H KV heads, s sinks, d head_dim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_pqcache.batching.blocks import SlotCache

#: Of free blocks, what others' prefixes may take. The rest is for requests: when they lack a block, transformers' engine drops
#: everything that no request uses.
MOST_OF_FREE = 0.5


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Blocks of prefixes, each behind the one that it continues. All on the host.

    Attributes:
        tokens: int32 (n, P). parents: int32 (n), the number of the block before, -1 of a first block.
        blocks: uint8 (n, bytes of a block).
        sink_tokens: int32 (m, s), before each first block, in their order. sinks: model dtype (m, L, 2, H, s, d).
        equaliser: float32 (L, H, d) that all codes were made with; None without codes, and before there are any.
    """

    tokens: Tensor
    parents: Tensor
    blocks: Tensor
    sink_tokens: Tensor
    sinks: Tensor
    equaliser: Tensor | None = None


class Taken(NamedTuple):
    """What has become of imported prefixes, in blocks: new here, here already, without room."""

    imported: int
    known: int
    left_out: int


def take(cache: SlotCache, prompts: Sequence[Sequence[int]], most_bytes: int | None = None) -> Prefixes:
    """The blocks that hold the beginnings of prompts. To be called between steps.

    Args:
        prompts: the most important first: of blocks that equally many begin with, theirs come first.
        most_bytes: of blocks and sinks together.
    """
    allocator, size, first = cache.allocator, cache.allocator.tokens_per_page, cache.layers.config.sink_tokens
    runs = [(ids, allocator.match_prefix_blocks([*ids, 0])) for ids in prompts]  # matching leaves a token to be computed
    runs = [(ids, blocks) for ids, blocks in runs if blocks and cache.sinks_before(blocks[0]) is not None]
    used = Counter(block for _, blocks in runs for block in blocks)
    places: dict[int, tuple[int, int]] = {}
    for number, (_, blocks) in enumerate(runs):
        for depth, block in enumerate(blocks):
            places.setdefault(block, (number, depth))
    order = sorted(places, key=lambda block: (-used[block], places[block]))
    if most_bytes is not None:
        sink_bytes = cache.layers.no_sinks.nbytes
        taken = accumulate(allocator.bytes_per_block + (sink_bytes if places[block][1] == 0 else 0) for block in order)
        order = order[: sum(total <= most_bytes for total in taken)]
    tokens, parents, sink_tokens = [], [], []
    numbers = {block: number for number, block in enumerate(order)}
    for block in order:
        (ids, blocks), depth = runs[places[block][0]], places[block][1]
        tokens.append(list(ids[first + depth * size : first + (depth + 1) * size]))
        parents.append(numbers[blocks[depth - 1]] if depth else -1)
        if depth == 0:
            sink_tokens.append(list(ids[:first]))
    sinks = [own for block in order if places[block][1] == 0 and (own := cache.sinks_before(block)) is not None]
    return Prefixes(
        tokens=torch.tensor(tokens, dtype=torch.int32).view(len(order), size),
        parents=torch.tensor(parents, dtype=torch.int32),
        blocks=allocator.read_blocks(order),
        sink_tokens=torch.tensor(sink_tokens, dtype=torch.int32).view(len(sink_tokens), first),
        sinks=torch.stack([cache.layers.no_sinks, *sinks])[1:].cpu(),
        equaliser=cache.layers.equalisers,
    )


def put(cache: SlotCache, new: Prefixes) -> Taken:
    """Keep prefixes as if they had been computed here, as many as there is room for. To be called between steps.

    Raises ValueError where codes here were made with another equaliser; nothing has changed then.
    """
    layers, allocator = cache.layers, cache.allocator
    own = layers.equalisers
    if own is not None and new.equaliser is not None and not torch.equal(own, new.equaliser):
        raise ValueError(
            "the prefixes were coded with another equaliser than the codes of this engine, which is that of the first prompt "
            "that became pages: import before the first long prompt, or compute them here"
        )
    contents = allocator.contents_of(new.tokens.tolist(), new.parents.tolist(), new.sink_tokens.tolist())
    fresh = {content: number for number, content in reversed([*enumerate(contents)]) if not allocator.has(content)}
    chosen = sorted(fresh.values())[: int(allocator.free_blocks_left * MOST_OF_FREE)]
    firsts = (new.parents < 0).nonzero()[:, 0].tolist()
    blocks = allocator.get_blocks(len(chosen))
    try:
        allocator.write_blocks(blocks, new.blocks, chosen)
        sinks = {contents[number]: new.sinks[i].to(cache.device) for i, number in enumerate(firsts)}
    except BaseException:
        allocator.give_back(blocks)
        raise
    if own is None and new.equaliser is not None:  # nothing of what follows can fail
        layers.equalise_as(new.equaliser)
    allocator.keep(blocks, [contents[number] for number in chosen])
    cache.add_sinks(sinks)
    return Taken(len(chosen), len(contents) - len(fresh), len(fresh) - len(chosen))
