"""What tokens to come are expected to attend to: Devoto, Jeblick and Jegou, "Expected Attention: KV Cache Compression by
Estimating Attention from Future Queries Distribution", 2025 (arXiv:2510.00636)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_pqcache.compressors import queries
from hf_pqcache.compressors.press import ScorePress


class ExpectedAttention(ScorePress):
    """Keeps what queries like the prompt's would attend to from the positions that follow it, weighed by the values' norms.

    Queries are taken to be normally distributed, so a key's expected weight is exp(k.mean + k.covariance.k / 2).

    Args:
        future: how many positions to come are averaged over.
        sinks: first tokens that always stay and whose queries, being unlike the others, do not count.
    """

    def __init__(self, ratio: float = 0.5, future: int = 512, sinks: int = 4) -> None:
        super().__init__(ratio)
        self.future, self.sinks = future, sinks

    def scores(self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, kwargs: dict[str, Any]) -> Tensor:
        batch, heads, count, head_dim = keys.shape
        if count <= self.sinks + 1:
            return keys.new_zeros(batch, heads, count)
        mean, covariance = self._distribution(module, hidden_states[:, self.sinks :], head_dim, kwargs)
        scale = getattr(module, "scaling", None) or head_dim**-0.5
        of_heads = keys.float().repeat_interleave(mean.shape[1] // heads, dim=1)  # (B, Hq, T, d)
        logits = (of_heads @ mean.mT)[..., 0] * scale + (of_heads @ covariance * of_heads).sum(-1) * scale**2 / 2
        logits[..., : self.sinks] = float("-inf")
        weights = logits.softmax(dim=-1).unflatten(1, (heads, -1)).mean(dim=2)
        scores = weights * values.float().norm(dim=-1)
        scores[..., : self.sinks] = scores.amax() + 1
        return scores

    def _distribution(
        self, module: nn.Module, hidden_states: Tensor, head_dim: int, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Mean (B, Hq, 1, d) and covariance (B, Hq, d, d) of queries to come, float32."""
        query = queries.project(module, hidden_states, head_dim).float()
        mean = query.mean(dim=2, keepdim=True)
        centred = query - mean
        covariance = centred.mT @ centred / query.shape[2]
        if (turns := kwargs.get("position_embeddings")) is not None:
            cos, sin = queries.next_rotations(turns[0].float(), turns[1].float(), self.future)
            mean = queries.rotate(module, mean, cos, sin)
            cos, sin = (x.expand(-1, head_dim, -1) for x in (cos, sin))
            for _ in range(2):  # one side of the matrix, then the other
                covariance = queries.rotate(module, covariance, cos, sin).mT
        return mean, covariance
