"""What the end of a prompt attends to: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", NeurIPS
2024 (arXiv:2404.14469)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_pqcache.compressors import queries
from hf_pqcache.compressors.press import ScorePress


class SnapKV(ScorePress):
    """Keeps the newest `window` tokens, and of the others those that these attend to, and their neighbours.

    A prompt that is not longer than the window keeps its newest tokens.

    Args:
        kernel: tokens over which attention is averaged, so that what stands together stays together.
    """

    def __init__(self, ratio: float = 0.5, window: int = 64, kernel: int = 5) -> None:
        super().__init__(ratio)
        self.window, self.kernel = window, kernel

    def scores(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, kwargs: dict[str, Any]) -> Tensor:
        batch, heads, count, _ = keys.shape
        newest = torch.arange(count, device=keys.device, dtype=torch.float32).expand(batch, heads, count)
        if count <= self.window:
            return newest
        weights = self._weights(module, hidden_states, keys, kwargs)  # (B, Hq, window, T)
        votes = weights[..., : -self.window].mean(dim=2)
        votes = votes.unflatten(1, (heads, -1)).mean(dim=2)  # query heads of one KV head
        votes = F.avg_pool1d(votes, self.kernel, stride=1, padding=self.kernel // 2)[..., : count - self.window]
        return torch.cat([votes, 1 + newest[..., -self.window :]], dim=-1)  # a vote is at most 1

    def _weights(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Attention of the newest queries to all keys (B, Hq, window, T), float32."""
        head_dim, count = keys.shape[3], keys.shape[2]
        query = queries.project(module, hidden_states[:, -self.window :], head_dim)
        if (turns := kwargs.get("position_embeddings")) is not None:
            query = queries.rotate(module, query, *(x[:, -self.window :] for x in turns))
        scale = getattr(module, "scaling", None) or head_dim**-0.5
        logits = query @ keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1).mT * scale
        first = count - self.window
        is_later = torch.ones_like(logits[0, 0], dtype=torch.bool).triu(first + 1)
        return logits.float().masked_fill(is_later, float("-inf")).softmax(dim=-1)
