"""The codebooks that every cache starts with: made of random numbers alone, so that they suit no model better than another.

After normalisation keys and values of any model look alike (`normalise`), and like normal random numbers that went the same
way. `shipped.safetensors` holds what `make` makes of those, for the widths in use; any other width is made when it is
first asked for, in a few seconds.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_pqcache.codebook import normalise
from hf_pqcache.codebook.calibrate import gain_of
from hf_pqcache.codebook.codebook import Codebook, to_float16
from hf_pqcache.codebook.kmeans import kmeans
from hf_pqcache.config import MAX_BITS, MIN_BITS, CodeShape, PQConfig, Side

FILE = Path(__file__).with_name("shipped.safetensors")
#: Numbers that a file's codebooks are for.
WIDTHS = (1, 2, 4, 8)
_HEAD_DIM, _PAGE, _PAGES, _SAMPLES, _SEED = 64, 64, 2048, 1 << 16, 0


def codebook(config: PQConfig, head_dim: int, value_dim: int) -> Codebook:
    """The shipped codebook for keys and values of so many numbers. Raises ValueError naming the legal subspaces."""
    return _codebook((config.codes("key", head_dim), head_dim), (config.codes("value", value_dim), value_dim))


@lru_cache(maxsize=64)
def _codebook(key: tuple[CodeShape, int], value: tuple[CodeShape, int]) -> Codebook:
    (keys, key_gain), (values, value_gain) = (
        side(which, dim // shape.num_subspaces, shape.num_bits) for which, (shape, dim) in (("key", key), ("value", value))
    )
    return Codebook(keys, values, (key_gain, value_gain), metadata={"model": "random numbers", "seed": _SEED})


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def side(which: Side, width: int, num_bits: int) -> tuple[Tensor, float]:
    """(centroids float16 (1, 2**num_bits, width), gain) of keys or of values."""
    name = f"{which}.{width}.{num_bits}"
    if name not in _file():
        return make(which, width, num_bits)
    # In a file a tensor begins anywhere; kernels read 16 bytes at a time, also where they run on a CPU.
    return _file()[name].clone(), float(_file()[f"{name}.gain"])


@lru_cache(maxsize=1)
def _file() -> dict[str, Tensor]:
    return load_file(FILE) if FILE.is_file() else {}


def make(which: Side, width: int, num_bits: int) -> tuple[Tensor, float]:
    """`side`, from normalised pages of normal random numbers; the same on every machine."""
    generator = torch.Generator().manual_seed(_SEED)
    pages = torch.randn(_PAGES, _PAGE, _HEAD_DIM, generator=generator)
    x = normalise.normalise(which, pages)[0]
    parts = x.flatten()[: x.numel() // width * width].view(-1, width)
    chosen = torch.randperm(parts.shape[0], generator=generator)[:_SAMPLES]
    found = kmeans(parts[chosen][None], 1 << num_bits, seed=_SEED)
    gain = gain_of(which, parts[-_SAMPLES:], found)
    return to_float16(gain * found, f"{which}s of {width} numbers"), gain


def write() -> None:
    """Make the file anew: `python -c "from hf_pqcache.codebook import shipped; shipped.write()"`, a minute or two."""
    tensors: dict[str, Tensor] = {}
    for which in get_args(Side):
        for width in WIDTHS:
            for num_bits in range(MIN_BITS, MAX_BITS + 1):
                name = f"{which}.{width}.{num_bits}"
                tensors[name], gain = make(which, width, num_bits)
                tensors[f"{name}.gain"] = torch.tensor(gain, dtype=torch.float64)
    save_file(tensors, FILE)
