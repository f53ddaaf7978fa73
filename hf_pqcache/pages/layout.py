"""The bytes of a page of codes, in one place; knows codes and bits, nothing of caches or devices.

A block is one side, keys or values, of a page of one (layer, KV head): the codes of its P tokens, then what normalises them:

    keys:    codes | mean int8 (d) | magnitude uint8 (d) | step float16 | zeros
    values:  codes | magnitude uint8 (P)

each part and the whole a multiple of 16 bytes long. In a page the codes of all heads come first, then the rest of all heads:
so codes begin where loads of a warp want them. Codes are a stream of `num_bits`-bit numbers, little-endian, a tile of 16
tokens after the other. Which (token, subspace) stands where in a tile is chosen so that the lanes of a warp read it as it
lies, and follows from M and the bits alone; kernels/page.cuh says the same, and a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hf_pqcache.config import Side

#: Tokens of a tile; a page is whole tiles and the codes of a tile lie together, so orders are given for one tile.
TILE_TOKENS = 16
_ALIGNMENT = 16


@dataclass(frozen=True)
class PageLayout:
    """Where everything is in a block. M = num_subspaces codes of num_bits bits for each vector of head_dim numbers."""

    which: Side
    page_size: int
    head_dim: int
    num_subspaces: int
    num_bits: int

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes, which are also where the scales begin."""
        return _padded(self.page_size * self.num_subspaces * self.num_bits // 8)

    @property
    def nbytes(self) -> int:
        """Bytes of the block."""
        return self.code_bytes + (_padded(2 * self.head_dim + 2) if self.which == "key" else self.page_size)

    @property
    def bits_per_number(self) -> float:
        """Bits that a number of a key or value takes, everything counted."""
        return 8 * self.nbytes / (self.page_size * self.head_dim)

    def pack(self, codes: Tensor, magnitude: Tensor, mean: Tensor | None = None, step: Tensor | None = None) -> Tensor:
        """codes uint8 (..., P, M), and scales as `normalise` has them -> blocks uint8 (..., nbytes)."""
        blocks = codes.new_zeros(*codes.shape[:-2], self.nbytes)
        stream = pack_bits(codes.flatten(-2)[..., self._order(codes.device)], self.num_bits)
        halves = half_order(self.num_subspaces, self.num_bits)
        if halves is not None:
            shape = (*stream.shape[:-1], self.page_size // TILE_TOKENS, halves.numel(), 2)
            stream = stream.view(shape)[..., halves.to(codes.device), :].flatten(-3)
        blocks[..., : stream.shape[-1]] = stream
        at, d = self.code_bytes, self.head_dim
        if mean is None or step is None:
            blocks[..., at : at + self.page_size] = magnitude
        else:
            blocks[..., at : at + d], blocks[..., at + d : at + 2 * d] = mean.view(torch.uint8), magnitude
            blocks[..., at + 2 * d : at + 2 * d + 2] = step.contiguous()[..., None].view(torch.uint8)
        return blocks

    def unpack(self, blocks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The inverse of `pack`: codes, and scales by name."""
        stream = blocks[..., : self.page_size * self.num_subspaces * self.num_bits // 8]
        halves = half_order(self.num_subspaces, self.num_bits)
        if halves is not None:
            shape = (*stream.shape[:-1], self.page_size // TILE_TOKENS, halves.numel(), 2)
            stream = stream.reshape(shape)[..., torch.argsort(halves).to(blocks.device), :].flatten(-3)
        stream = unpack_bits(stream, self.num_bits)
        codes = torch.empty_like(stream)
        codes[..., self._order(blocks.device)] = stream
        codes = codes.unflatten(-1, (self.page_size, self.num_subspaces))
        at, d = self.code_bytes, self.head_dim
        if self.which == "value":
            return codes, {"magnitude": blocks[..., at : at + self.page_size]}
        return codes, {
            "mean": blocks[..., at : at + d].view(torch.int8),
            "magnitude": blocks[..., at + d : at + 2 * d],
            "step": self.step(blocks),
        }

    def step(self, blocks: Tensor) -> Tensor:
        """Of blocks of keys, the only one of their scales that is not finite whatever its bits are: float16 (...)."""
        at = self.code_bytes + 2 * self.head_dim
        return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0]

    def join(self, blocks: Tensor) -> Tensor:
        """Blocks (n, H, nbytes) of the heads -> pages (n, H * nbytes)."""
        return torch.cat([blocks[..., : self.code_bytes].flatten(1), blocks[..., self.code_bytes :].flatten(1)], dim=1)

    def split(self, pages: Tensor) -> Tensor:
        """The inverse of `join`."""
        heads = pages.shape[1] // self.nbytes
        codes, rest = pages.split([heads * self.code_bytes, pages.shape[1] - heads * self.code_bytes], dim=1)
        return torch.cat([codes.unflatten(1, (heads, -1)), rest.unflatten(1, (heads, -1))], dim=2)

    def _order(self, device: torch.device) -> Tensor:
        """int64 (P * M): place i of the stream holds code (token, subspace) = divmod(order[i], M)."""
        return _page_order(self.which, self.page_size, self.num_subspaces, self.num_bits).to(device)


def num_units(num_subspaces: int, num_bits: int) -> int | None:
    """Units of a token's codes where lanes have an order of their own, None where codes lie token after token.

    A unit is what looks up one row of a table: two neighbouring 4-bit codes as one byte, or one code.
    """
    units, bits = units_of(num_subspaces, num_bits)
    return units if units % 8 == 0 and units * bits % 32 == 0 else None


def units_of(num_subspaces: int, num_bits: int) -> tuple[int, int]:
    return (num_subspaces // 2, 8) if num_bits == 4 and num_subspaces % 2 == 0 else (num_subspaces, num_bits)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _tile_places(which: Side, num_subspaces: int, num_bits: int) -> Tensor:
    """Place of each code of a tile: int64 (16, M).

    In the matrix instruction lane 4 g + c stands for a column and a row pair. Unit number j of a lane is, of keys, token
    g + 8 (j % 2) and unit c + 4 (j // 2); of values, token c + 4 (j % 4) and unit g + 8 (j // 4).
    """
    token = torch.arange(TILE_TOKENS)[:, None]
    subspace = torch.arange(num_subspaces)[None, :]
    units = num_units(num_subspaces, num_bits)
    if units is None:
        return token * num_subspaces + subspace
    split = num_subspaces // units
    unit, rest = subspace // split, subspace % split
    if which == "key":
        lane, number = token % 8 * 4 + unit % 4, unit // 4 * 2 + token // 8
    else:
        lane, number = unit % 8 * 4 + token % 4, unit // 8 * 4 + token // 4
    return (lane * (units // 2) + number) * split + rest


@lru_cache(maxsize=64)
def _page_order(which: Side, page_size: int, num_subspaces: int, num_bits: int) -> Tensor:
    """Repeat a tile's order over the page; place -> token * M + subspace."""
    tile = torch.argsort(_tile_places(which, num_subspaces, num_bits).flatten())
    starts = torch.arange(0, page_size, TILE_TOKENS) * num_subspaces
    return (starts[:, None] + tile).flatten()


@lru_cache(maxsize=64)
def half_order(num_subspaces: int, num_bits: int) -> Tensor | None:
    """Where the 16-bit halves of words of a tile are from: number i of it is number order[i] of the lanes' streams; None is
    as it is.

    A lane's words are dealt so that all lanes together load wide and side by side: four words of each lane at a time, then
    two, then one, then half a word.
    """
    units = num_units(num_subspaces, num_bits)
    if units is None:
        return None
    halves = units * units_of(num_subspaces, num_bits)[1] // 32  # of a lane
    lane, half = torch.arange(32)[:, None], torch.arange(halves)[None, :]
    word, words = half // 2, halves // 2
    whole, pairs = words // 4 * 4, words & 2
    place = torch.where(
        word < whole,
        word // 4 * 128 + lane * 4 + word % 4,
        torch.where(word < whole + pairs, whole * 32 + lane * 2 + word - whole, whole * 32 + pairs * 32 + lane),
    )
    return torch.argsort(torch.where(word < words, place * 2 + half % 2, words * 64 + lane).flatten())


def pack_bits(codes: Tensor, num_bits: int) -> Tensor:
    """codes (..., n) uint8 < 2**num_bits, n * num_bits a multiple of 8 -> (..., bytes) uint8, little-endian."""
    if num_bits == 8:
        return codes.contiguous()
    if codes.shape[-1] * num_bits % 8:
        raise ValueError(f"{codes.shape[-1]} codes of {num_bits} bits do not fill whole bytes")
    shifts = torch.arange(num_bits, device=codes.device, dtype=torch.uint8)
    num_bytes = codes.shape[-1] * num_bits // 8
    bits = (codes[..., None] >> shifts & 1).reshape(*codes.shape[:-1], num_bytes, 8)
    weights = (1 << torch.arange(8, device=codes.device, dtype=torch.int32)).to(torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, num_bits: int) -> Tensor:
    """packed (..., n * num_bits / 8) uint8 -> codes (..., n) uint8; the inverse of `pack_bits`."""
    if num_bits == 8:
        return packed
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    num_codes = packed.shape[-1] * 8 // num_bits
    bits = (packed[..., None] >> shifts & 1).reshape(*packed.shape[:-1], num_codes, num_bits)
    weights = (1 << torch.arange(num_bits, device=packed.device, dtype=torch.int32)).to(torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8)
