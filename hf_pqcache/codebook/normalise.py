"""Rotates, centres and scales keys and values so that one small codebook fits every layer and head of every model.

A Hadamard rotation spreads outlier channels over all others (QuaRot, Ashkboos et al. 2024, section 3). What is left of a
key differs most between channels and slowly between tokens, so keys are centred and scaled per page and channel (as KIVI
scales them, Liu et al. 2024, section 3.2); values differ most between tokens and are scaled per token. Knows no pages'
bytes, no codes and no cache.

Letters in shapes: n pages of P tokens, H KV heads, d head_dim.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_pqcache.config import Side

#: Magnitudes are kept as round(8 log2(x)) + 160 in a byte: an eighth of an octave from 2**-20 to 2**11.9.
_STEPS, _ORIGIN = 8, 160
#: Tokens that an equaliser is made of at most.
EQUALISER_TOKENS = 4096
#: A channel is loud from so many times the median channel's standard deviation on.
_LOUD = 2.0
#: Largest magnitude of a mean in steps.
_MEAN_LEVELS = 127


class KeyScales(NamedTuple):
    """What a page keeps of its rotated keys besides codes.

    Attributes:
        mean: int8 (..., d), the mean over the page in units of `step`.
        step: float16 (...).
        magnitude: uint8 (..., d), the largest magnitude of key - mean, logarithmic.
    """

    mean: Tensor
    step: Tensor
    magnitude: Tensor


def blocks_of(head_dim: int) -> list[int]:
    """Powers of two, largest first, that add up to head_dim: sizes of the rotation's blocks. 80 -> [64, 16]."""
    return [1 << i for i in range(head_dim.bit_length() - 1, -1, -1) if head_dim >> i & 1]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # who asks later may train
def hadamard(head_dim: int, device: torch.device) -> Tensor:
    """float32 (d, d), symmetric and its own inverse: Hadamard matrices of `blocks_of(d)` along the diagonal."""
    out = torch.zeros(head_dim, head_dim)
    at = 0
    for size in blocks_of(head_dim):
        block = torch.ones(1, 1)
        while block.shape[0] < size:
            block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
        out[at : at + size, at : at + size] = block / size**0.5
        at += size
    return out.to(device)


def rotate(x: Tensor) -> Tensor:
    """x (..., d) -> float32 (..., d), rotated; the rotation is its own inverse."""
    return x.float() @ hadamard(x.shape[-1], x.device)


def equaliser(keys: Tensor) -> Tensor:
    """Keys (H, T, d) of the first tokens that become pages -> float32 (H, d): what to divide channels by before rotating.

    A channel that is far louder than the others would drown them all, once rotated: by how much it exceeds twice the median
    channel, as a power of the square root of two; 1 for all others. Queries are multiplied by it, so that scores stay.
    """
    spread = keys.float().std(-2, correction=0)
    usual = spread.median(-1, keepdim=True).values.clamp_min(1e-12)
    return torch.exp2((spread / (_LOUD * usual)).clamp_min(1.0).log2().mul_(2).round_() / 2)


def normalise(which: Side, rotated: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`normalise_keys` or `normalise_values`: (what is coded, its scales by the names that `PageLayout` gives them)."""
    if which == "key":
        coded, scales = normalise_keys(rotated)
        return coded, scales._asdict()
    coded, magnitude = normalise_values(rotated)
    return coded, {"magnitude": magnitude}


def normalise_keys(rotated: Tensor) -> tuple[Tensor, KeyScales]:
    """Rotated keys float32 (..., P, d) of whole pages -> (what is coded, of magnitude about 1; its scales)."""
    mean = rotated.mean(-2)
    step = (mean.abs().amax(-1) / _MEAN_LEVELS).to(torch.float16)
    levels = (mean / step.float().clamp_min(1e-24)[..., None]).round_().clamp_(-_MEAN_LEVELS, _MEAN_LEVELS).to(torch.int8)
    centred = rotated - _mean(levels, step)
    magnitude = _to_byte(centred.abs().amax(-2))
    return centred / _from_byte(magnitude)[..., None, :], KeyScales(levels, step, magnitude)


def restore_keys(coded: Tensor, scales: KeyScales) -> Tensor:
    """The inverse of `normalise_keys`: float32 (..., P, d) -> rotated keys."""
    return coded.float() * _from_byte(scales.magnitude)[..., None, :] + _mean(scales.mean, scales.step)


def normalise_values(rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated values float32 (..., P, d) -> (what is coded; uint8 (..., P), each token's largest magnitude)."""
    magnitude = _to_byte(rotated.abs().amax(-1))
    return rotated / _from_byte(magnitude)[..., None], magnitude


def restore_values(coded: Tensor, magnitude: Tensor) -> Tensor:
    """The inverse of `normalise_values`."""
    return coded.float() * _from_byte(magnitude)[..., None]


def _mean(levels: Tensor, step: Tensor) -> Tensor:
    return (levels.float() * step.float()[..., None])[..., None, :]


def _to_byte(magnitude: Tensor) -> Tensor:
    return (magnitude.log2() * _STEPS).round_().add_(_ORIGIN).clamp_(0, 255).to(torch.uint8)


def _from_byte(byte: Tensor) -> Tensor:
    return torch.exp2((byte.float() - _ORIGIN) / _STEPS)
