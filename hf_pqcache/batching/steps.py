"""The steps of an engine as they come: chunks that were prepared, the rows of decode steps, what was counted.

A step is prepared on the host, then computed layer by layer; with asynchronous batching the next one is prepared meanwhile.
So a step carries all that it needs, and a decode step reads nothing from the host but its launch: its block table has a row
[slot, tokens in pages, blocks ..., tokens] for each request, which CUDA graphs replay with other contents.
"""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hf_pqcache.batching.attention import attend_step
from hf_pqcache.batching.compression import Compression
from hf_pqcache.batching.kernels import KernelRows
from hf_pqcache.batching.requests import Chunk, Request
from hf_pqcache.batching.slots import SlotLayers


class Steps:
    """Attention of one engine.

    Args:
        layers: attached. max_batch, num_blocks: as `KernelRows` takes them.

    Attributes:
        counts: steps and tokens by kind, see `stats`.
        compute_stream: on which steps are computed; None is the current one.
        compression: of prompts that are stored beside later steps; to be set.
    """

    def __init__(self, layers: SlotLayers, max_batch: int, num_blocks: int) -> None:
        self.layers = layers
        self.rows = KernelRows(layers, max_batch, num_blocks) if layers.backend.name != "torch" else None
        self.counts: Counter[str] = Counter()
        self.compute_stream: Any = None
        self.compression: Compression
        self._next: list[Chunk] = []  # prepared
        self._now: list[Chunk] = []  # under way

    def on_compute(self) -> AbstractContextManager[Any]:
        """Within it, what is computed comes after the steps so far."""
        return nullcontext() if self.compute_stream is None else torch.cuda.stream(self.compute_stream)

    # -- preparing -------------------------------------------------------------------------------------------------------
    def add(self, chunk: Chunk) -> None:
        """One more request of the next step; they lie in the packed input one after the other."""
        chunk.at = self._next[-1].at + self._next[-1].count if self._next else 0
        self._next.append(chunk)

    def before_decode(self, request: Request) -> None:
        """A request's row of a decode step is being prepared."""
        layers = self.layers
        self.counts["decode_rows"] += 1
        if not layers.is_equalised and layers.coded_after(request.coded, request.stored + 1) > request.coded:
            with self.on_compute():
                layers.equalise_by_window(request.slot, request.coded)

    # -- computing -------------------------------------------------------------------------------------------------------
    def attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, block_table: Tensor | None
    ) -> Tensor:
        """One layer of the step that was prepared last.

        Args:
            query: (1, Hq, T, d). keys, values: (1, H, T, d), packed.
            block_table: int32 (B, 3 + width) of a step of decode rows only, one token each; None where there are prompts.

        Returns:
            (1, T, Hq, d).
        """
        if block_table is not None:
            return self._decode(layer, query, keys, values, scale, block_table)
        if layer == 0:
            self._now, self._next = self._next, []
            self.counts["prompt_steps"] += 1
            self.counts["prompt_tokens"] += sum(chunk.exact for chunk in self._now)
            self.counts["rows_beside_prompts"] += sum(chunk.count - chunk.exact for chunk in self._now)
        out = attend_step(self.layers, self.rows, layer, self._now, query[0], keys[0], values[0], scale)
        if jobs := [chunk.job for chunk in self._now if chunk.job is not None]:
            self.compression.go_on(jobs, is_last=layer == self.layers.num_layers - 1)
        return out[None]

    def _decode(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float, block_table: Tensor) -> Tensor:
        if self.rows is not None:
            if layer == 0:
                self.rows.begin(block_table[:, :-1], block_table[:, -1] + 1)
            return self.rows.attend(layer, query[0], keys[0], values[0], scale)[None]
        if layer == 0:
            self._now = []
            for at, (slot, coded, *blocks, stored) in enumerate(block_table.tolist()):
                if slot >= 0:
                    used = self.layers.coded_after(coded, stored + 1) // self.layers.config.page_size
                    self._now.append(Chunk(slot, at, 1, 0, stored, coded, 0, False, None, blocks[:used]))
        return attend_step(self.layers, None, layer, self._now, query[0], keys[0], values[0], scale)[None]

    def stats(self) -> dict[str, int]:
        """Counted since the engine was made.

        prompt_steps: steps that had prompts. prompt_tokens: computed. prefix_tokens: of prompts, taken from blocks of others.
        cut_prompts: that were too long to wait exactly for their end. rows_beside_prompts, decode_rows: generated tokens in
        steps with and without prompts.
        """
        names = ("prompt_steps", "prompt_tokens", "prefix_tokens", "cut_prompts", "rows_beside_prompts", "decode_rows")
        return {name: self.counts[name] for name in names}
