"""Keys of small norm are attended to most: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache
Compression", EMNLP 2024 (arXiv:2406.11430)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_pqcache.compressors.press import ScorePress


class Knorm(ScorePress):
    """Keeps the keys of the smallest Euclidean norm."""

    def scores(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return -keys.float().norm(dim=-1)
