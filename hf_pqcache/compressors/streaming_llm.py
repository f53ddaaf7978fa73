"""The first tokens and the newest: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024
(arXiv:2309.17453). There positions are counted anew within what is kept; here they stay those of the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_pqcache.compressors.press import ScorePress


class StreamingLLM(ScorePress):
    """Keeps the first `sinks` tokens and the newest ones."""

    def __init__(self, ratio: float = 0.5, sinks: int = 4) -> None:
        super().__init__(ratio)
        self.sinks = sinks

    def scores(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, kwargs: dict[str, Any]) -> Tensor:
        count = keys.shape[2]
        scores = torch.arange(count, device=keys.device, dtype=torch.float32)
        scores[: self.sinks] = count
        return scores.expand(*keys.shape[:2], count)
