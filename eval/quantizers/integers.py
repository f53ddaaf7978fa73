"""Asymmetric integers in groups, along tokens or along a vector; the part that KIVI and per-token integers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_pqcache.eval.quantizers.packing import pack, unpack

#: Of a scale or an offset: float16.
SIDE_BITS = 16


def encode_groups(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """x float (..., g), a group in each row -> packed codes uint8 (..., g * bits / 8), scales and offsets float16 (...).

    scale = (max - min) / (2**bits - 1) and offset = min of the group, as they are kept, in float16; code =
    round((x - offset) / scale). So the error is at most half a scale, and what float16 rounds away of both.
    """
    low, high = x.float().aminmax(dim=-1)
    offset = low.half()
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-7).half()
    codes = ((x - offset[..., None].float()) / scale[..., None].float()).round_().clamp_(0, 2**bits - 1)
    return pack(codes.to(torch.uint8), bits), scale, offset


def decode_groups(packed: Tensor, scale: Tensor, offset: Tensor, bits: int, group: int) -> Tensor:
    """The inverse of `encode_groups`, float32 (..., g)."""
    return unpack(packed, bits, group) * scale[..., None].float() + offset[..., None].float()


class PerToken:
    """Each token by itself: neighbouring numbers of its vector in groups."""

    tokens_together = 1

    def __init__(self, bits: int, group: int = 64) -> None:
        self.num_bits, self.group = bits, group

    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        return ()

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return encode_groups(x.unflatten(-1, (-1, self._group(x.shape[-1]))), self.num_bits)

    def decode(self, parts: tuple[Tensor, ...], fitted: tuple[Tensor, ...], head_dim: int) -> Tensor:
        packed, scale, offset = parts
        return decode_groups(packed, scale, offset, self.num_bits, self._group(head_dim)).flatten(-2)

    def bits(self, head_dim: int) -> float:
        return self.num_bits + 2 * SIDE_BITS / self._group(head_dim)

    def _group(self, head_dim: int) -> int:
        """A vector of 96 numbers has no groups of 64: of 32 then."""
        return math.gcd(head_dim, self.group)


class PerChannel:
    """Each channel by itself: its numbers in `group` tokens that follow each other are a group."""

    def __init__(self, bits: int, group: int = 64) -> None:
        self.num_bits, self.tokens_together = bits, group

    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        return ()

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        groups = x.unflatten(2, (-1, self.tokens_together)).transpose(-1, -2)  # (B, H, n / group, d, group)
        return encode_groups(groups, self.num_bits)

    def decode(self, parts: tuple[Tensor, ...], fitted: tuple[Tensor, ...], head_dim: int) -> Tensor:
        packed, scale, offset = parts
        groups = decode_groups(packed, scale, offset, self.num_bits, self.tokens_together)
        return groups.transpose(-1, -2).flatten(2, 3)

    def bits(self, head_dim: int) -> float:
        return self.num_bits + 2 * SIDE_BITS / self.tokens_together
