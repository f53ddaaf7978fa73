"""TurboQuant: a random rotation makes all coordinates of a vector alike, then one scalar codebook serves them all.

Zandieh, Daliri, Hadian, Mirrokni 2025, "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate"
(arXiv:2504.19874), its mean-squared-error quantizer (section 3.1, algorithm 1): the norm is kept apart, the unit vector
is rotated, and each coordinate is replaced by the nearest level of the Lloyd-Max codebook for the distribution that
coordinates of a random unit vector have. Fractional bits as in its section 4.3: channels are split into outliers and the
others, each half with an instance of its own, outliers with one bit more. Which channels are outliers is not fixed by the
paper; here, as in QJL (Zandieh, Daliri, Han 2024), those of the largest mean magnitude in the first tokens that become
codes, for each row and head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hf_pqcache.eval.quantizers.packing import pack, unpack

#: Of a norm: float16.
NORM_BITS = 16
_SEED = 0


@lru_cache
def rotation(size: int, device: torch.device) -> Tensor:
    """A random orthonormal matrix float32 (size, size): the Q of a Gaussian matrix, its signs made unique."""
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(_SEED))
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float().to(device)


@lru_cache
def levels(size: int, bits: int, device: torch.device) -> Tensor:
    """Lloyd-Max levels float32 (2**bits), ascending, for a coordinate of a random unit vector of `size` numbers.

    Its density is proportional to (1 - x^2)^((size - 3) / 2) on [-1, 1]. Means of cells and nearest-level borders are
    iterated on a grid of 2^16 points, over ten standard deviations where that is less, until no level moves by more than
    1e-9.
    """
    end = min(1.0, 10 / size**0.5)
    x = torch.linspace(-end, end, 2**16 + 1, dtype=torch.float64)[1:-1]
    weight = (1 - x * x).pow((size - 3) / 2)
    total, first = weight.cumsum(0), (weight * x).cumsum(0)
    total, first = torch.cat([total.new_zeros(1), total]), torch.cat([first.new_zeros(1), first])
    share = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    found = x[torch.searchsorted(total[1:] / total[-1], share)]
    for _ in range(10_000):
        borders = torch.searchsorted(x, (found[1:] + found[:-1]) / 2)
        edges = torch.cat([borders.new_zeros(1), borders, borders.new_tensor([x.numel()])])
        new = (first[edges[1:]] - first[edges[:-1]]) / (total[edges[1:]] - total[edges[:-1]])
        if torch.equal(new, found) or float((new - found).abs().max()) < 1e-9:
            break
        found = new
    return found.float().to(device)


class _Instance:
    """The quantizer of vectors of one size, at a whole number of bits."""

    def __init__(self, bits: int) -> None:
        self.num_bits = bits

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, H, T, s) -> packed codes uint8 (B, H, T, s * bits / 8), norms float16 (B, H, T)."""
        size = x.shape[-1]
        norm = x.float().norm(dim=-1)
        rotated = (x.float() / norm.clamp_min(1e-20)[..., None]) @ rotation(size, x.device).T
        found = levels(size, self.num_bits, x.device)
        codes = torch.bucketize(rotated, (found[1:] + found[:-1]) / 2)
        return pack(codes.to(torch.uint8), self.num_bits), norm.half()

    def decode(self, packed: Tensor, norm: Tensor, size: int) -> Tensor:
        codes = unpack(packed, self.num_bits, size)
        rotated = levels(size, self.num_bits, codes.device)[codes.int()]
        return rotated @ rotation(size, codes.device) * norm[..., None].float()


class Turbo:
    """Whole bits: one instance. A half: channels in two halves, outliers with one bit more than the others."""

    tokens_together = 1

    def __init__(self, bits: float) -> None:
        self.num_bits = bits
        self._parts = [_Instance(int(bits))] if bits == int(bits) else [_Instance(int(bits) + 1), _Instance(int(bits))]

    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        """The order of the channels, outliers first, uint8 or int16 (B, H, d); nothing for whole bits."""
        if len(self._parts) == 1:
            return ()
        order = x.float().abs().mean(2).argsort(dim=-1, descending=True)
        half = x.shape[-1] // 2
        order = torch.cat([order[..., :half].sort(-1).values, order[..., half:].sort(-1).values], -1)
        return (order.to(torch.uint8 if x.shape[-1] <= 256 else torch.int16),)

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not fitted:
            return self._parts[0].encode(x)
        half = x.shape[-1] // 2
        sorted_x = x.gather(-1, fitted[0].long()[:, :, None].expand_as(x))
        outliers, others = self._parts[0].encode(sorted_x[..., :half]), self._parts[1].encode(sorted_x[..., half:])
        return (*outliers, *others)

    def decode(self, parts: tuple[Tensor, ...], fitted: tuple[Tensor, ...], head_dim: int) -> Tensor:
        if not fitted:
            return self._parts[0].decode(parts[0], parts[1], head_dim)
        half = head_dim // 2
        outliers = self._parts[0].decode(parts[0], parts[1], half)
        x = torch.cat([outliers, self._parts[1].decode(parts[2], parts[3], head_dim - half)], -1)
        place = fitted[0].long().argsort(-1)
        return x.gather(-1, place[:, :, None].expand_as(x))

    def bits(self, head_dim: int) -> float:
        half = head_dim // 2 if len(self._parts) == 2 else head_dim
        sizes = (half, head_dim - half)
        codes = sum(part.num_bits * size for part, size in zip(self._parts, sizes, strict=False))
        return (codes + NORM_BITS * len(self._parts)) / head_dim
