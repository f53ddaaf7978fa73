"""After KVQuant: levels that are not evenly spaced, and one number in a hundred set aside exactly.

Hooper et al. 2024, "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization"
(arXiv:2401.18079): keys per channel and values per token (section 3.1), a datatype of unevenly spaced levels ("nuq", 3.3),
and dense-and-sparse quantization, in which the 1 % outliers of a vector are kept in 16 bits and do not widen its range
(3.4). What differs here, for it is to run on any model without calibration: keys are taken as attention sees them, after
their rotary embedding (3.2 takes them before); ranges are those of 64 tokens at a time, not of a calibration set; levels are
fitted to normal numbers, not to a model's gradients; outliers are the hundredth of each block of 64 tokens.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from hf_pqcache.eval.quantizers.integers import SIDE_BITS
from hf_pqcache.eval.quantizers.packing import pack, unpack

#: Tokens of a block; share of its numbers that are set aside, and bits of such a number's place and value.
BLOCK, OUTLIERS, OUTLIER_BITS = 64, 0.01, 32
_ROUNDS, _SAMPLES = 100, 1 << 12


@lru_cache
def levels(bits: int, device: torch.device) -> Tensor:
    """Levels float32 (2**bits), ascending in [-1, 1]: k-means of normal numbers, 64 at a time brought to that range."""
    rows = torch.randn(_SAMPLES, BLOCK, generator=torch.Generator().manual_seed(0)).clamp(-2.576, 2.576)  # without 1 %
    low, high = rows.aminmax(dim=1, keepdim=True)
    x = ((2 * rows - low - high) / (high - low)).flatten().sort().values.double()
    total = torch.cat([x.new_zeros(1), x.cumsum(0)])
    found = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    for _ in range(_ROUNDS):
        edges = torch.searchsorted(x, (found[1:] + found[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_tensor([x.numel()])])
        found = (total[edges[1:]] - total[edges[:-1]]) / (edges[1:] - edges[:-1]).clamp_min(1)
    return found.float().to(device)


class DenseAndSparse:
    """Rows of numbers that share a range: a channel's in a block of tokens (is_per_channel), or a token's."""

    tokens_together = BLOCK

    def __init__(self, bits: int, is_per_channel: bool) -> None:
        self.num_bits, self.is_per_channel = bits, is_per_channel

    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        return ()

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Codes, scales and offsets of rows; places int16 and values float16 (B, H, blocks, k) of outliers."""
        rows = x.float().unflatten(2, (-1, BLOCK))
        rows = rows.transpose(-1, -2) if self.is_per_channel else rows  # (B, H, blocks, rows, numbers of a row)
        centred = rows - rows.mean(-1, keepdim=True)
        unusual = (centred.abs() / centred.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)).flatten(-2)
        places = unusual.topk(self._outliers(x.shape[-1]), dim=-1).indices
        values = rows.flatten(-2).gather(-1, places)
        is_outlier = torch.zeros_like(unusual, dtype=torch.bool).scatter_(-1, places, True).view_as(rows)
        low = rows.masked_fill(is_outlier, math.inf).amin(-1)
        high = rows.masked_fill(is_outlier, -math.inf).amax(-1)
        empty = low > high  # all of the row is set aside
        low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)
        scale, offset = ((high - low) / 2).clamp_min(1e-7).half(), ((high + low) / 2).half()
        found = levels(self.num_bits, x.device)
        inside = ((rows - offset[..., None].float()) / scale[..., None].float()).contiguous()
        codes = torch.bucketize(inside, (found[1:] + found[:-1]) / 2)
        return pack(codes.to(torch.uint8), self.num_bits), scale, offset, places.to(torch.int16), values.half()

    def decode(self, parts: tuple[Tensor, ...], fitted: tuple[Tensor, ...], head_dim: int) -> Tensor:
        packed, scale, offset, places, values = parts
        codes = unpack(packed, self.num_bits, BLOCK if self.is_per_channel else head_dim)
        rows = levels(self.num_bits, codes.device)[codes.int()] * scale[..., None].float() + offset[..., None].float()
        rows = rows.flatten(-2).scatter(-1, places.long(), values.float()).view_as(rows)
        return (rows.transpose(-1, -2) if self.is_per_channel else rows).flatten(2, 3)

    def bits(self, head_dim: int) -> float:
        row = BLOCK if self.is_per_channel else head_dim
        return self.num_bits + 2 * SIDE_BITS / row + OUTLIER_BITS * self._outliers(head_dim) / (BLOCK * head_dim)

    @staticmethod
    def _outliers(head_dim: int) -> int:
        return math.ceil(OUTLIERS * BLOCK * head_dim)
