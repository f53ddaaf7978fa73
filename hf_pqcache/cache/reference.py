"""ReferenceCache: what PagedPQCache must compute, in the slowest and plainest way; knows no page, window or kernel.

It keeps every key and value in full precision and, at each step, hands attention a copy in which the tokens that a
paged cache would hold as codes are replaced by their decoded codes. Tests and `pqcache selftest` compare against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from hf_pqcache.codebook import pq
from hf_pqcache.codebook.codebook import Codebook, LayerCodebook
from hf_pqcache.config import PQConfig
from hf_pqcache.models.support import full_attention


class ReferenceLayer(DynamicLayer):
    """One layer. `keys` and `values` (B, H, n, d) are what the paged cache could still restore of every position.

    Args:
        starts: left padding of each row; a row counts its own tokens from there.
    """

    def __init__(self, config: PQConfig, book: LayerCodebook, starts: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.book = book
        self._first_starts = list(starts)
        self.starts: list[int] = []
        self.most: list[int] = []  # most tokens that each row ever held: older slots of its window were used again

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Several new tokens at once see each other exactly, and the past as the cache holds it before they enter."""
        if not self.starts:
            copies = key_states.shape[0] // len(self._first_starts)
            self.starts = [start for start in self._first_starts for _ in range(copies)]
            self.most = [0] * len(self.starts)
        is_step = key_states.shape[2] == 1 and self.get_seq_length() > 0
        before = (key_states[:, :, :0], value_states[:, :, :0]) if not self.get_seq_length() else self.seen()
        super().update(key_states, value_states)
        self.most = [max(most, length) for most, length in zip(self.most, self._row_lengths(), strict=True)]
        if is_step:
            return self.seen()
        return torch.cat([before[0], key_states], dim=2), torch.cat([before[1], value_states], dim=2)

    def seen(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, n, d) as the paged cache holds them now."""
        first, last = self.config.sink_tokens, [self.config.sink_tokens + c for c in self._coded()]
        return self._with_codes(first, last)

    def crop(self, tokens_to_remove: int) -> None:
        """Codes that fall back into the window stay decoded, unless the window still has the exact token."""
        before = self._coded()
        super().crop(tokens_to_remove)
        if not self.is_initialized:
            return
        self.starts = [min(start, self.get_seq_length()) for start in self.starts]
        kept = [most - self.config.window_slots for most in self.most]
        last = [min(self.config.sink_tokens + coded, k) for coded, k in zip(before, kept, strict=True)]
        self.keys, self.values = self._with_codes(self.config.sink_tokens, last)
        # Tokens that come now are in no slot that was used again.
        rows = zip(self.most, self._row_lengths(), strict=True)
        self.most = [min(most, length + self.config.window_slots) for most, length in rows]

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.starts, self.most = [], []

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
        self.starts, self.most = [self.starts[i] for i in rows], [self.most[i] for i in rows]

    def _row_lengths(self) -> list[int]:
        return [max(0, self.get_seq_length() - start) for start in self.starts]

    def _coded(self) -> list[int]:
        return [self.config.coded_tokens(length) for length in self._row_lengths()]

    def _with_codes(self, first: int, last: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copies of keys and values in which tokens first..last[r]-1 of each row r are their decoded codes."""
        assert self.keys is not None
        assert self.values is not None
        tokens = torch.arange(self.keys.shape[2]) - torch.tensor(self.starts)[:, None]  # (B, n): a row's own count
        is_code = ((tokens >= first) & (tokens < torch.tensor(last)[:, None])).to(self.keys.device)[:, None, :, None]
        sides = []
        for x, centroids in ((self.keys, self.book.keys), (self.values, self.book.values)):
            centroids = centroids.to(x.device)
            sides.append(torch.where(is_code, pq.decode(pq.encode(x, centroids), centroids, dtype=x.dtype), x))
        return sides[0], sides[1]


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
        codebook: centroids of the layers to compress.
        pq_config: shape of the cache; sizes of pages and windows decide which tokens are codes.
        starts: left padding of each row of the inputs, (B) or (1); rows that `generate` repeats are repeated here, too.
    """

    def __init__(
        self, config: PreTrainedConfig, codebook: Codebook, pq_config: PQConfig | None = None, starts: Sequence[int] = (0,)
    ) -> None:
        settings = (pq_config or PQConfig()).replace(num_subspaces=codebook.num_subspaces, num_bits=codebook.num_bits)
        layers: list[Any] = DynamicCache(config=config).layers
        for i in full_attention(config, layers):
            if i in codebook.layers:
                arguments = settings, codebook.layers[i], starts
                states = getattr(layers[i], "number_of_states", 0)
                layers[i] = HybridReferenceLayer(*arguments, number_of_states=states) if states else ReferenceLayer(*arguments)
        super().__init__(layers=layers)
