"""Which KV heads of a codebook this process needs when tensor parallelism spreads a model's heads; knows no cache.

A codebook is one for all processes. Each of them gets keys and values of its own heads only, a run of equal length in the
order of the ranks: of H heads over `size` processes, rank r has heads r * H / size to (r + 1) * H / size - 1.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from hf_pqcache.codebook.codebook import LayerCodebook


def is_one_of_several() -> bool:
    """Whether torch.distributed runs this process beside others: a step may then hold collectives, which are not compiled
    unless asked for."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def local_part(book: LayerCodebook, num_heads: int, layer: int, rank: int | None) -> LayerCodebook:
    """The centroids of this process's `num_heads` KV heads, made once for all caches; the book itself if these are all.

    Args:
        rank: this process's among those that share the heads; None asks torch.distributed.

    Raises ValueError if it is not known which heads these are.
    """
    total = book.keys.shape[0]
    if total <= num_heads or num_heads < 1 or total % num_heads:
        return book  # nothing to divide, or no division: storage says what does not fit
    size = total // num_heads
    if rank is None:
        rank = _world_rank(layer, total, num_heads, size)
    if not 0 <= rank < size:
        raise ValueError(f"tp_rank={rank} is none of the {size} processes that share {total} KV heads, {num_heads} each")
    own = slice(rank * num_heads, (rank + 1) * num_heads)
    part: LayerCodebook = book.shared(("heads", rank, size), lambda: LayerCodebook(book.keys[own], book.values[own]))
    return part


def _world_rank(layer: int, total: int, num_heads: int, size: int) -> int:
    """This process's rank if all processes of torch.distributed share the heads."""
    found = f"layer {layer}: the codebook has {total} KV heads and this process is handed {num_heads} of them"
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"{found}, but torch.distributed is not initialized, so that it is unknown which; start the processes with "
            "torchrun, pass tp_rank, or calibrate a codebook if the model has other heads than it"
        )
    if dist.get_world_size() != size:
        raise ValueError(
            f"{found}, so {size} processes share them, and torch.distributed has {dist.get_world_size()}; pass tp_rank, "
            "this process's rank in its tensor-parallel group (cache.from_pretrained reads it from the model)"
        )
    return dist.get_rank()


def rank_of(model: Any) -> int | None:
    """A model's rank in its tensor-parallel group, as transformers' device mesh says; None without a mesh that knows."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return None
    names = mesh.mesh_dim_names or ()
    if "tp" in names:
        return int(mesh.get_local_rank("tp"))
    return int(mesh.get_local_rank()) if mesh.ndim == 1 and not names else None
