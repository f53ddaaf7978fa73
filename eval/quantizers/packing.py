"""Codes of a few bits, packed into bytes without gaps; knows no quantizer."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 (..., n), each below 2**bits -> uint8 (..., ceil(n * bits / 8)), the lowest bit of the first code first."""
    flags = codes[..., None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device) & 1
    flags = flags.flatten(-2)
    flags = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (flags << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 (..., count)."""
    if bits == 4 and count % 2 == 0:  # by far the most frequent
        return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    flags = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    flags = flags.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    return (flags << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(-1, dtype=torch.uint8)
