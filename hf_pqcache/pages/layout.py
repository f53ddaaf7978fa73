"""The byte layout of a page of codes, in one place; knows codes and bits, nothing of caches or devices.

A page of one (layer, KV head) holds the codes of `page_size` tokens: keys in one run of bytes, values in another. A
run is a stream of `num_bits`-bit codes, little-endian, code i in bits [i * num_bits, (i + 1) * num_bits). Which
(token, subspace) stands at place i is the *order*, a permutation given here for keys and for values. The kernels
in kernels/ read these very orders.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

#: Tokens of a tile; a page is whole tiles and the codes of a tile lie together, so orders are given for one tile.
TILE_TOKENS = 16


def num_units(num_subspaces: int, num_bits: int) -> int | None:
    """Units a token's codes form for the tuned kernels, 64 or 32; None where there is no tuned order.

    A unit is what indexes one table row: a code of 6 or 8 bits, or two codes of 4 bits as one byte.
    """
    if num_bits not in (4, 6, 8):
        return None
    units = num_subspaces // 2 if num_bits == 4 else num_subspaces
    return units if units in (32, 64) else None


def _tile_places(kind: str, num_subspaces: int, num_bits: int) -> Tensor:
    """Place of each code of a tile: int64 (16, M). The tuned orders hand every lane of a warp 16 bytes as they lie.

    In the matrix instruction a lane (0..31) stands for a column and a row pair. A key lane is token n of 8 and every
    fourth unit; a value lane is every eighth unit and two tokens, four apart. The place within a lane is rotated (xor) by the
    token, so that lanes asking for the same unit ask in different order and hit different banks of shared memory.
    """
    units = num_units(num_subspaces, num_bits)
    token = torch.arange(TILE_TOKENS)[:, None]
    subspace = torch.arange(num_subspaces)[None, :]
    if units is None:
        return token * num_subspaces + subspace
    split = num_subspaces // units
    unit, rest = subspace // split, subspace % split
    half, n, c, far = token // 8, token % 8, token % 4, token // 4 % 2
    if kind == "key":
        lane = n * 4 + unit % 4
        if units == 64:
            place = (half * 32 + lane) * 16 + unit // 32 * 8 + (unit // 4 % 8 ^ n & 3)
        else:
            place = lane * 16 + half * 8 + (unit // 4 ^ n & 3)
    elif units == 64:
        place = (half * 32 + unit % 8 * 4 + c) * 16 + far * 8 + (unit // 8 ^ c)
    else:
        lane = (unit // 16 * 4 + unit % 4) * 4 + c
        place = lane * 16 + half * 8 + far * 4 + (unit // 4 % 4 ^ c)
    return place * split + rest


def _page_order(kind: str, page_size: int, num_subspaces: int, num_bits: int) -> Tensor:
    """Repeat a tile's order over the page; place -> token * M + subspace."""
    tile = torch.argsort(_tile_places(kind, num_subspaces, num_bits).flatten())
    starts = torch.arange(0, page_size, TILE_TOKENS) * num_subspaces
    return (starts[:, None] + tile).flatten()


@lru_cache(maxsize=64)
def key_order(page_size: int, num_subspaces: int, num_bits: int) -> Tensor:
    """Order of the key codes: int64 (page_size * M,); place i holds code (token, subspace) = divmod(order[i], M)."""
    return _page_order("key", page_size, num_subspaces, num_bits)


@lru_cache(maxsize=64)
def value_order(page_size: int, num_subspaces: int, num_bits: int) -> Tensor:
    """Order of the value codes, as `key_order`."""
    return _page_order("value", page_size, num_subspaces, num_bits)


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


def pack_pages(codes: Tensor, order: Tensor, num_bits: int) -> Tensor:
    """codes (..., page_size, M) uint8 -> (..., page_size * M * num_bits / 8) uint8 in `order`."""
    return pack_bits(codes.flatten(-2)[..., order.to(codes.device)], num_bits)


def unpack_pages(pages: Tensor, order: Tensor, num_subspaces: int, num_bits: int) -> Tensor:
    """pages (..., bytes) uint8 in `order` -> codes (..., page_size, M) uint8; the inverse of `pack_pages`."""
    stream = unpack_bits(pages, num_bits)
    codes = torch.empty_like(stream)
    codes[..., order.to(stream.device)] = stream
    return codes.unflatten(-1, (-1, num_subspaces))
