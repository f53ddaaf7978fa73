"""ReferenceCache: what PagedPQCache must compute, in the slowest and plainest way; knows no page, window or kernel.

It keeps every key and value in full precision and, at each step, hands attention a copy in which the tokens that a
paged cache would hold as codes are replaced by their decoded codes. Tests and `pqcache selftest` compare against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from hf_pqcache.codebook import normalise, shipped
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig, Side
from hf_pqcache.models.support import full_attention
from hf_pqcache.pages.codec import CodedPages


class ReferenceLayer(DynamicLayer):
    """One layer. `keys` and `values` (B, H, n, d) are what the paged cache could still restore of every position.

    Args:
        starts: left padding of each row; a row counts its own tokens from there.
    """

    def __init__(self, config: PQConfig, book: Codebook | None, starts: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.book = book
        self._first_starts = list(starts)
        self.starts: list[int] = []
        self.most: list[int] = []  # most tokens that each row ever held: older slots of its window were used again
        self.equaliser: Tensor | None = None  # of the first page that was written
        self.pages: list[int] = []  # tokens of each row in pages that were written before a crop
        self.paged: tuple[Tensor, Tensor] | None = None  # what those pages stand for, where they do
        self._known: dict[
            tuple[Side, int], tuple[Tensor, Tensor]
        ] = {}  # of each side and row: pages, and what codes make of them

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Several new tokens at once see each other exactly, and the past as the cache holds it before they enter."""
        if not self.starts:
            copies = key_states.shape[0] // len(self._first_starts)
            self.starts = [start for start in self._first_starts for _ in range(copies)]
            self.most, self.pages = [0] * len(self.starts), [0] * len(self.starts)
        is_step = key_states.shape[2] == 1 and self.get_seq_length() > 0
        before = (key_states[:, :, :0], value_states[:, :, :0]) if not self.get_seq_length() else self.seen()
        super().update(key_states, value_states)
        self.most = [max(most, length) for most, length in zip(self.most, self._row_lengths(), strict=True)]
        self.note_equaliser()
        if is_step:
            return self.seen()
        return torch.cat([before[0], key_states], dim=2), torch.cat([before[1], value_states], dim=2)

    def seen(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, n, d) as the paged cache holds them now."""
        assert self.keys is not None
        assert self.values is not None
        book = self.book or shipped.codebook(self.config, self.keys.shape[3], self.values.shape[3])
        keys, values = self.keys.clone(), self.values.clone()
        for own, paged in zip((keys, values), self.paged or (), strict=False):
            for row, (start, count) in enumerate(zip(self.starts, self.pages, strict=True)):
                place = slice(start + self.config.sink_tokens, start + self.config.sink_tokens + count)
                own[row, :, place] = paged[row, :, place]
        return self._encoded("key", keys, book), self._encoded("value", values, book)

    def crop(self, tokens_to_remove: int) -> None:
        """Codes that fall back into the window stay decoded, unless the window still has the exact token."""
        if not self.is_initialized:
            return
        before, decoded = self._coded(), self.seen()
        super().crop(tokens_to_remove)
        self.starts = [min(start, self.get_seq_length()) for start in self.starts]
        self.pages = [min(coded, now) for coded, now in zip(before, self._coded(), strict=True)]
        self.paged = decoded
        assert self.keys is not None
        assert self.values is not None
        for row, (start, coded, most) in enumerate(zip(self.starts, before, self.most, strict=True)):
            first = start + self.config.sink_tokens
            last = min(first + coded, start + most - self.config.window_slots, self.get_seq_length())
            if last > first:
                self.keys[row, :, first:last] = decoded[0][row, :, first:last]
                self.values[row, :, first:last] = decoded[1][row, :, first:last]
        if not any(self._coded()):
            self.equaliser = None
            self._known.clear()
        # Tokens that come now are in no slot that was used again.
        rows = zip(self.most, self._row_lengths(), strict=True)
        self.most = [min(most, length + self.config.window_slots) for most, length in rows]

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.starts, self.most, self.pages, self.equaliser, self.paged = [], [], [], None, None
        self._known.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._select([row for row in range(len(self.starts)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(torch.arange(len(self.starts))[indices].tolist())

    def _select(self, rows: Sequence[int]) -> None:
        self.starts, self.most, self.pages = ([x[i] for i in rows] for x in (self.starts, self.most, self.pages))
        if self.paged is not None:
            self.paged = self.paged[0][list(rows)], self.paged[1][list(rows)]

    def _row_lengths(self) -> list[int]:
        return [max(0, self.get_seq_length() - start) for start in self.starts]

    def _coded(self) -> list[int]:
        return [self.config.coded_tokens(length) for length in self._row_lengths()]

    def _encoded(self, which: Side, out: Tensor, book: Codebook) -> Tensor:
        """Keys or values, now with every other whole page as its codes stand for it."""
        codec = CodedPages.like(out, which, self.config.page_size, book)
        self.note_equaliser()
        if which == "key" and self.equaliser is not None:
            codec = replace(codec, equaliser=self.equaliser)
        for row, (start, written, coded) in enumerate(zip(self.starts, self.pages, self._coded(), strict=True)):
            if coded > written:
                place = slice(start + self.config.sink_tokens + written, start + self.config.sink_tokens + coded)
                out[row, :, place] = self._decoded(codec, row, out[row, :, place].clone())
        return out

    def _decoded(self, codec: CodedPages, row: int, x: Tensor) -> Tensor:
        """What codes make of x (H, n, d), some pages of a row; those that were there a step ago are known."""
        key, size = (codec.layout.which, row), 0
        parts: list[Tensor] = []
        known = self._known.get(key, (x[:, :0], x[:, :0]))
        if known[0].dtype == x.dtype and torch.equal(known[0], x[:, : known[0].shape[1]]):
            parts, size = [known[1]], known[0].shape[1]
        if size < x.shape[1]:
            parts.append(codec.decode(codec.encode(x[:, size:]), x.dtype))
        decoded = torch.cat(parts, dim=1)
        self._known[key] = x, decoded
        return decoded

    def note_equaliser(self) -> None:
        """Make the equaliser of the first keys that are in pages, if there are any and there is none yet."""
        assert self.keys is not None
        rows = ((row, coded) for row, coded in enumerate(self._coded()) if coded)
        if self.equaliser is None and (found := next(rows, None)) is not None:
            row, coded = found
            first = self.starts[row] + self.config.sink_tokens
            last = first + min(coded, normalise.EQUALISER_TOKENS)
            self.equaliser = normalise.equaliser(self.keys[row, :, first:last])
            self._known.clear()


class HybridReferenceLayer(LinearAttentionAndFullAttentionLayer, ReferenceLayer):  # type: ignore[misc, override]
    """One layer of a model whose layers keep a recurrent state besides their tokens: the state is transformers' own."""

    def __init__(self, *args: Any, number_of_states: int) -> None:
        ReferenceLayer.__init__(self, *args)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        ReferenceLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
        ReferenceLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        ReferenceLayer.crop(self, tokens_to_remove)


class ReferenceCache(Cache):
    """A Cache that computes what PagedPQCache(config, codebook, pq_config) must.

    Args:
        config: the model's config.
        codebook: centroids; None means the shipped ones.
        pq_config: shape of the cache; sizes of pages and windows decide which tokens are codes.
        starts: left padding of each row of the inputs, (B) or (1); rows that `generate` repeats are repeated here, too.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        codebook: Codebook | None = None,
        pq_config: PQConfig | None = None,
        starts: Sequence[int] = (0,),
    ) -> None:
        layers: list[Any] = DynamicCache(config=config).layers
        for i in full_attention(config, layers):
            arguments = pq_config or PQConfig(), codebook, starts
            states = getattr(layers[i], "number_of_states", 0)
            layers[i] = HybridReferenceLayer(*arguments, number_of_states=states) if states else ReferenceLayer(*arguments)
        super().__init__(layers=layers)
