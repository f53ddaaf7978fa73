"""Product quantization in plain torch: vectors to codes and back. The ground truth of every kernel.

Letters in shapes: d numbers of a vector, M subspaces, C centroids of a subspace. A vector is cut into M parts of d/M
neighbouring numbers; each part is replaced by the index of its nearest centroid (Jégou, Douze, Schmid 2011, "Product
quantization for nearest neighbor search", section II-B).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Distances held at once: 1 MiB, so that they stay in a core's L2 cache, or 256 MiB on a GPU.
_CHUNK_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 26}


def encode(x: Tensor, centroids: Tensor) -> Tensor:
    """x (..., d) float, centroids (1 or M, C, d/M) float -> codes (..., M) uint8, nearest by squared L2.

    Distances are sums of squared differences in float32 in the order of the numbers; of equal ones the lowest index
    wins. A vector with NaN or infinity gets code 0 in the subspaces concerned. Raises ValueError if the shapes do not
    fit each other. Temporary memory is bounded whatever the number of vectors is.
    """
    subspaces = _subspaces(x.shape[-1], centroids)
    rows = x.reshape(-1, subspaces, centroids.shape[2])
    table = centroids.float().permute(2, 0, 1).contiguous()  # (d/M, 1 or M, C): each number's row is contiguous
    codes = torch.empty(rows.shape[:-1], dtype=torch.uint8, device=x.device)
    step = max(1, _CHUNK_NUMBERS.get(x.device.type, 1 << 24) // (subspaces * centroids.shape[1]))
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step].float()
        distance = (part[..., 0, None] - table[0]).square_()
        for i in range(1, centroids.shape[2]):
            difference = part[..., i, None] - table[i]
            distance.addcmul_(difference, difference)
        codes[start : start + step] = _first_minimum(distance)
    return codes.view(*x.shape[:-1], subspaces)


def decode(codes: Tensor, centroids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes (..., M) uint8, centroids (1 or M, C, d/M) float -> (..., d) of `dtype`.

    Raises ValueError if the shapes do not fit each other, IndexError (on CPU) for a code that has no centroid.
    """
    sets, _, width = _check(centroids)
    if sets > 1 and codes.shape[-1] != sets:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; centroids {tuple(centroids.shape)} ask for (..., {sets})")
    chosen = torch.arange(sets, device=codes.device) if sets > 1 else 0
    return centroids.to(dtype)[chosen, codes.long()].view(*codes.shape[:-1], codes.shape[-1] * width)


def _subspaces(head_dim: int, centroids: Tensor) -> int:
    sets, _, width = _check(centroids)
    if head_dim % width or (sets > 1 and head_dim != sets * width):
        raise ValueError(f"vectors of {head_dim} numbers do not fit centroids {tuple(centroids.shape)}: d = M * width")
    return head_dim // width


def _check(centroids: Tensor) -> tuple[int, int, int]:
    """(1 or M, C, d/M) of a centroid tensor. Raises ValueError if it has another rank or more than 256 centroids."""
    if centroids.dim() != 3 or not 1 <= centroids.shape[1] <= 256:
        raise ValueError(f"centroids have shape {tuple(centroids.shape)}, expected (1 or M, C, d/M) with C from 1 to 256")
    sets, num_centroids, width = centroids.shape
    return sets, num_centroids, width


def _first_minimum(distance: Tensor) -> Tensor:
    """distance (..., C) float32, overwritten -> (...) uint8, the lowest index of the smallest."""
    if distance.device.type != "cpu":
        return distance.argmin(-1).to(torch.uint8)
    # torch's argmin is scalar code on CPU (0.5 ns a number), amin is vectorized (0.04): take amin twice. The bits of a
    # positive float, read as an integer, are positive, so clamping leaves 0 at the minima and 1 elsewhere.
    index = torch.arange(distance.shape[-1], dtype=torch.int32)
    is_larger = distance.sub_(distance.amin(-1, keepdim=True)).view(torch.int32).clamp_(max=1)
    return torch.add(index, is_larger, alpha=256, out=is_larger).amin(-1).to(torch.uint8)
