"""Generated tokens of a step on CUDA kernels: two launches a layer for all rows; nothing here reads the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from hf_pqcache.backends import cuda_backend
from hf_pqcache.backends.batch_rows import BatchRows, Step
from hf_pqcache.backends.cuda_backend import Place
from hf_pqcache.batching.requests import Chunk
from hf_pqcache.batching.slots import SlotLayers


class KernelRows:
    """The rows of decode steps, and of generated tokens beside prompts.

    Args:
        max_batch: most rows of a step. num_blocks: of the pool, its reserved ones included.
    """

    def __init__(self, layers: SlotLayers, max_batch: int, num_blocks: int) -> None:
        self.layers = layers
        width, device = layers.page_table.shape[1], layers.windows.device
        self.rows = BatchRows(layers.num_layers, max_batch, width, num_blocks, layers.num_slots, device, layers.max_id)
        self.flags = torch.zeros(4, dtype=torch.int32, device=device)
        self._step: Step | None = None
        self._at = torch.empty(0, dtype=torch.long, device=device)  # of rows beside prompts, in the packed input

    @cached_property
    def _no_padding(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int32, device=self.flags.device)

    def begin(self, block_table: Tensor, lengths: Tensor) -> None:
        """The rows of the step to come; as `BatchRows.begin_step` takes them."""
        self._step = self.rows.begin_step(block_table, lengths)

    def begin_beside_prompts(self, chunks: Sequence[Chunk]) -> None:
        """The same for decode chunks of a step with prompts, whose rows nobody has put on the device."""
        table = torch.full((len(chunks), 2 + self.rows.width), -1, dtype=torch.int32)
        for row, chunk in zip(table, chunks, strict=True):
            row[: 2 + len(chunk.blocks)] = torch.tensor([chunk.slot, chunk.coded, *chunk.blocks], dtype=torch.int32)
        lengths = torch.tensor([chunk.stored + 1 for chunk in chunks], dtype=torch.int32)
        at = torch.tensor([chunk.at for chunk in chunks])
        table, lengths, self._at = (x.to(self.flags.device, non_blocking=True) for x in (table, lengths, at))
        self.begin(table, lengths)

    def attend_beside_prompts(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None:
        """`attend` for the rows of `begin_beside_prompts` among packed tokens; out: (Hq, T, d), where they lie in it."""
        query, keys, values = (x[:, self._at] for x in (query, keys, values))
        out[:, self._at] = self.attend(layer, query, keys, values, scale).transpose(0, 1)

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Store one token of every row, then attend: query (Hq, B, d), keys, values (H, B, d) -> (B, Hq, d)."""
        step = self._step
        assert step is not None
        place = Place(
            self.layers.layer_ptrs,
            layer,
            step.seq_lens[layer],
            step.left_pad,
            step.page_table,
            self._geometry(query.shape[1]),
            step.slots,
        )
        return self._launch(place, query, keys, values, scale)

    def attend_in_turn(
        self, layer: int, chunk: Chunk, stored: int, coded: int, sides: Sequence[Tensor], scale: float
    ) -> Tensor:
        """Several generated tokens of one request, as a soft reset computes them again: query (Hq, T, d), keys and values
        (H, T, d) -> (Hq, T, d)."""
        layers = self.layers
        lengths = torch.tensor([[stored, coded]], dtype=torch.int32).to(self.flags.device, non_blocking=True)
        slot = torch.tensor([chunk.slot], dtype=torch.int32).to(self.flags.device, non_blocking=True)
        table = layers.page_table[chunk.slot : chunk.slot + 1]
        place = Place(layers.layer_ptrs, layer, lengths, self._no_padding, table, self._geometry(1), slot)
        parts = []
        for i in range(sides[0].shape[1]):
            query, keys, values = (x[:, i : i + 1] for x in sides)
            parts.append(self._launch(place, query, keys, values, scale))
        return torch.cat(parts).transpose(0, 1)

    def _geometry(self, batch: int) -> cuda_backend.Geometry:
        return self.layers.views[0].kernels.geometry.of_batch(batch)

    def _launch(self, place: Place, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        query, keys, values = (x.transpose(0, 1)[:, :, None] for x in (query, keys, values))  # (B, heads, 1, d)
        cuda_backend.append(keys, values, place, self.flags)
        return cuda_backend.attend(query, place, None, None, scale, 0.0, place.geometry.max_tokens)[:, 0]
