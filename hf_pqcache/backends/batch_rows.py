"""What kernels are told of the rows of a continuous-batching step; knows no scheduler and no page's contents.

In such a step a row of the batch is any of the running requests, in an order that changes from step to step, and rows may be
there only because a captured CUDA graph has a fixed number of them. A request keeps one *slot*, its window in every layer, as
long as it runs; all else comes anew in each step, as one row of a block table.

The pages of a pool lie in one tensor: block b holds the pages of all L layers one after the other, a page its keys, then its
values, each padded as `PageSpec` says, `PageStore.page_bytes` together. So a layer's pages begin at
`pool + layer * page_bytes`, and the id by which its kernels find that of block b is b * L.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Columns of a block table before the blocks: the slot, and how many tokens are in pages.
HEAD_COLUMNS = 2


class Step(NamedTuple):
    """What `Place` takes of B rows: parts of the tensors of `BatchRows`, at the same addresses in every step of B rows.

    slots: int32 (B). seq_lens: int32 (num_layers, B, 2). page_table: int32 (B, width). left_pad: int32 (B), zeros.
    """

    slots: Tensor
    seq_lens: Tensor
    page_table: Tensor
    left_pad: Tensor


class BatchRows:
    """Tensors with stable addresses that say which request is in which row, where its pages are and how long it is.

    Attributes:
        slots: int32 (max_batch), the window that each row has in every layer.
        seq_lens: int32 (num_layers, max_batch, 2): tokens of each row before the step's, and how many of them are in pages;
            one for each layer, since append advances its own.
        page_table: int32 (max_batch, width), ids of pages for the kernels of any layer; -1 where unused.
        left_pad: int32 (max_batch), zeros: rows have no padding.
        trash_slot: the window of rows without a request. They append to its first place and attend to what is there: numbers
            that are finite and mean nothing. Nothing is read of pages for them or written there, and no flag is raised.
    """

    def __init__(
        self,
        num_layers: int,
        max_batch: int,
        width: int,
        num_blocks: int,
        trash_slot: int,
        device: torch.device | str,
        max_id: int = 1 << 30,
    ) -> None:
        """width: blocks that a row can have. num_blocks: of the pool. max_id: see `max_page_id` of pages/codec.py.

        Raises ValueError for a pool with more pages than kernels can count.
        """
        if num_blocks * num_layers > max_id:
            raise ValueError(
                f"{num_blocks} blocks of {num_layers} layers are more than the {max_id} pages that kernels count; take fewer "
                "blocks, or larger ones"
            )
        self.num_layers, self.width, self.trash_slot = num_layers, width, trash_slot
        with torch.inference_mode(False):
            self.slots = torch.full((max_batch,), trash_slot, dtype=torch.int32, device=device)
            self.seq_lens = torch.zeros(num_layers, max_batch, 2, dtype=torch.int32, device=device)
            self.page_table = torch.full((max_batch, width), -1, dtype=torch.int32, device=device)
            self.left_pad = torch.zeros(max_batch, dtype=torch.int32, device=device)
            # `where` writes into given memory only what it takes from tensors.
            self._trash, self._none, self._zero = (
                torch.tensor(n, dtype=torch.int32, device=device) for n in (trash_slot, -1, 0)
            )
        self._steps: dict[int, Step] = {}

    @property
    def max_batch(self) -> int:
        return len(self.slots)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.slots, self.seq_lens, self.page_table, self.left_pad))

    def _step(self, batch: int) -> Step:
        if batch not in self._steps:
            parts = self.slots[:batch], self.seq_lens[:, :batch], self.page_table[:batch], self.left_pad[:batch]
            self._steps[batch] = Step(*parts)
        return self._steps[batch]

    def begin_step(self, block_table: Tensor, lengths: Tensor) -> Step:
        """Take over the rows of a decode step of one token each. Waits for nothing, so that a CUDA graph can hold it.

        Args:
            block_table: int32 (B, 2 + width) on the device, B <= max_batch: of each row its slot, how many of its tokens are
                in pages, and the blocks of those pages in order, with one more for a page that may leave the window in this
                step; below 0 where there is none.
            lengths: int32 (B): tokens of each row, this step's one included. A row of length 0, or whose slot is below 0, has
                no request.

        Returns:
            what the layers' kernels take; valid until the next call.
        """
        batch = len(lengths)
        if block_table.shape != (batch, HEAD_COLUMNS + self.width) or lengths.shape != (batch,) or batch > self.max_batch:
            raise ValueError(
                f"expected a block table (B, {HEAD_COLUMNS + self.width}) and lengths (B), B up to {self.max_batch}; got "
                f"{tuple(block_table.shape)} and {tuple(lengths.shape)}"
            )
        if block_table.dtype != torch.int32 or lengths.dtype != torch.int32:
            raise ValueError(f"block table and lengths: expected int32, got {block_table.dtype} and {lengths.dtype}")
        step = self._step(batch)
        slots, coded, blocks = block_table[:, 0], block_table[:, 1], block_table[:, HEAD_COLUMNS:]
        before = lengths - 1
        is_there = torch.minimum(before, slots) >= 0
        torch.where(is_there, slots, self._trash, out=step.slots)
        layers = (self.num_layers, batch)
        torch.where(is_there, before.expand(layers), self._zero, out=step.seq_lens[..., 0])
        torch.where(is_there, coded.expand(layers), self._zero, out=step.seq_lens[..., 1])
        torch.where(is_there[:, None], blocks, self._none, out=step.page_table)
        step.page_table.mul_(self.num_layers).clamp_(min=-1)
        return step
