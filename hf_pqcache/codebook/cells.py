"""Which centroids can be nearest in each cell of a grid, so that a kernel compares four of them and not all; knows no kernel.

For codes of two numbers. A cell's list holds every centroid that is nearest to some point of the cell: one that another
centroid beats at all four corners beats it everywhere between them, as what lies nearer to one of two points is a half-plane.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

#: Cells of a row, from -REACH to REACH; those at the border go on for ever. kernels/encode.cuh has the same numbers.
CELLS, REACH = 64, 1.125
#: In place of a list: more than four centroids. No list has a higher number before a lower one.
MANY = 0xFF
_MOST = 16  # centroids that are compared with each other
_MARGIN = 1e-5  # in squared distance: what kernels may round


def has_cells(width: int, num_bits: int) -> bool:
    """Whether codes of so many numbers and bits are searched by cells: fewer centroids are compared as fast as they are."""
    return width == 2 and num_bits > 4


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def cells(centroids: Tensor) -> Tensor:
    """float16 (1, C, 2), C up to 256 -> int32 (CELLS * CELLS) on its device, made once for a tensor.

    Number `CELLS * y + x` is the list of the cell that is number x by the first number of its vectors, y by the second: four
    indices, a byte each, the lowest first and first in memory, the last one repeated; or MANY.
    """
    points = centroids[0].double()
    edges = torch.linspace(-REACH, REACH, CELLS + 1, dtype=torch.float64, device=points.device)
    edges[0], edges[-1] = -1e4, 1e4
    distance = (edges[:, None] - points[:, 0]).square()[None] + (edges[:, None] - points[:, 1]).square()[:, None]
    corners = torch.stack([distance[:-1, :-1], distance[:-1, 1:], distance[1:, :-1], distance[1:, 1:]], 2).flatten(0, 1)
    # Beaten by one of those nearest to a corner: few are left, and these are compared with each other.
    nearest = corners.argmin(-1)[..., None, None].expand(-1, -1, 4, 1)
    best = corners[:, None].expand(-1, 4, -1, -1).gather(-1, nearest)  # (cells, who, corner, 1)
    beaten = (best + _MARGIN < corners[:, None]).all(2).any(1)
    is_close = (~beaten).sum(-1) <= _MOST
    number = torch.arange(points.shape[0], device=points.device).expand_as(beaten)
    left = number.masked_fill(beaten, 1 << 20).sort(-1).values[:, :_MOST]
    there = left < points.shape[0]
    left = left.where(there, left[:, :1])  # every cell has one
    of = corners.gather(-1, left[:, None].expand(-1, 4, -1))
    beaten = (of[..., None] + _MARGIN < of[..., None, :]).all(1).any(1) | ~there
    left = left.masked_fill(beaten, 1 << 20).sort(-1).values
    count = (left < 1 << 20).sum(-1)
    left = left[:, :4].where(
        torch.arange(4, device=points.device) < count[:, None], left.gather(-1, (count - 1).clamp(0, 3)[:, None])
    )
    lists = (left << torch.arange(0, 32, 8, device=points.device)).sum(-1).masked_fill(~is_close | (count > 4), MANY)
    return lists.where(lists < 1 << 31, lists - (1 << 32)).to(torch.int32)
