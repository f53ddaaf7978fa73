"""Product quantization in plain torch: encode, decode, attention over codes. The ground truth of every kernel.

Letters in shapes: B batch, Hq query heads, H KV heads (Hq a multiple of H), T tokens, n cached tokens, d head_dim,
M subspaces, C centroids of a subspace. A vector of d numbers is cut into M parts of d/M neighbouring numbers; each part
is replaced by the index of its nearest centroid (Jégou, Douze, Schmid 2011, "Product quantization for nearest neighbor
search", section II-B).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Distances held at once: 1 MiB, so that they stay in a core's L2 cache, or 256 MiB on a GPU.
_CHUNK_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 26}


def encode(x: Tensor, centroids: Tensor) -> Tensor:
    """x (..., H, T, d) float, centroids (H, M, C, d/M) float -> codes (..., H, T, M) uint8, nearest by squared L2.

    Distances are sums of squared differences in float32 in the order of the numbers; of equal ones the lowest index
    wins. A vector with NaN or infinity gets code 0 in the subspaces concerned. Raises ValueError if the shapes do not
    fit each other. Temporary memory is bounded whatever T is.
    """
    heads, subspaces, num_centroids, width = _check_centroids(centroids)
    if x.dim() < 3 or x.shape[-3] != heads or x.shape[-1] != subspaces * width:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; centroids {tuple(centroids.shape)} ask for (..., {heads}, T, {subspaces * width})"
        )
    *lead, _, tokens, head_dim = x.shape
    batch = math.prod(lead)  # not -1, which is ambiguous for zero tokens
    rows = x.reshape(batch, heads, tokens, head_dim).transpose(1, 2).reshape(batch * tokens, heads, subspaces, width)
    table = centroids.float().permute(3, 0, 1, 2).contiguous()  # (d/M, H, M, C): each number's row is contiguous
    codes = torch.empty(rows.shape[:-1], dtype=torch.uint8, device=x.device)
    step = max(1, _CHUNK_NUMBERS.get(x.device.type, 1 << 24) // (heads * subspaces * num_centroids))
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step].float()
        distance = (part[..., 0, None] - table[0]).square_()
        for i in range(1, width):
            difference = part[..., i, None] - table[i]
            distance.addcmul_(difference, difference)
        codes[start : start + step] = _first_minimum(distance)
    return codes.view(batch, tokens, heads, subspaces).transpose(1, 2).reshape(*lead, heads, tokens, subspaces)


def decode(codes: Tensor, centroids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes (..., H, T, M) uint8, centroids (H, M, C, d/M) float -> (..., H, T, d) of `dtype`.

    Raises ValueError if the shapes do not fit each other, IndexError (on CPU) for a code that has no centroid.
    """
    heads, subspaces, _, _ = _check_centroids(centroids)
    if codes.dim() < 3 or codes.shape[-3] != heads or codes.shape[-1] != subspaces:
        raise ValueError(
            f"codes have shape {tuple(codes.shape)}; centroids {tuple(centroids.shape)} ask for (..., {heads}, T, {subspaces})"
        )
    head = torch.arange(heads, device=codes.device)[:, None, None]
    subspace = torch.arange(subspaces, device=codes.device)
    return centroids.to(dtype)[head, subspace, codes.long()].flatten(-2)


def attention(
    q: Tensor,
    key_codes: Tensor,
    value_codes: Tensor,
    key_centroids: Tensor,
    value_centroids: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of q over n coded tokens by look-up tables, without decoding them (MILLION, Wang et al. 2025).

    Scores: a query's dot products with all C centroids of a subspace are one table, and a token's score is the sum of M
    table entries picked by its codes (asymmetric distance computation, Jégou 2011, section III). Output: the
    probabilities of all tokens that share a centroid are added up, and centroids are averaged with these sums.
    All arithmetic is in float32.

    Args:
        q: float (B, Hq, T, d).
        key_codes, value_codes: uint8 (B, H, n, M); M of keys and of values may differ.
        key_centroids, value_centroids: float (H, M, C, d/M) and (H, M, C, dv/M).
        scale: factor of the scores.
        mask: broadcastable to (B, Hq, T, n): bool (True takes part) or float (added to the scores). None is no mask.

    Returns:
        (B, Hq, T, dv) of q's dtype. A query that sees no token gets zeros.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    heads, key_subspaces, _, _ = _check_centroids(key_centroids)
    value_heads, value_subspaces, num_values, _ = _check_centroids(value_centroids)
    batch, query_heads, tokens, head_dim = q.shape
    if query_heads % heads or value_heads != heads or head_dim != key_subspaces * key_centroids.shape[-1]:
        raise ValueError(
            f"q {tuple(q.shape)} does not fit key centroids {tuple(key_centroids.shape)} and value centroids "
            f"{tuple(value_centroids.shape)}: Hq must be a multiple of H, and d = M * width"
        )
    length = key_codes.shape[2]
    for name, codes, m in (("key", key_codes, key_subspaces), ("value", value_codes, value_subspaces)):
        if codes.shape != (batch, heads, length, m):
            raise ValueError(f"{name} codes have shape {tuple(codes.shape)}, expected {(batch, heads, length, m)}")

    # Query heads that share a KV head stand as rows of it: (B, H, Hq/H * T, ...).
    grouped = q.float().reshape(batch, heads, -1, head_dim)
    shape = (*grouped.shape[:3], length)
    scores = grouped.new_zeros(shape)
    for m, part in enumerate(grouped.chunk(key_subspaces, dim=-1)):
        table = part @ key_centroids[:, m].float().transpose(1, 2)  # (B, H, rows, C)
        scores += table.gather(-1, key_codes[:, :, None, :, m].long().expand(shape))
    scores = (scores * scale).view(batch, query_heads, tokens, length)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    blind = (scores == float("-inf")).all(-1, keepdim=True)
    probs = scores.softmax(-1).masked_fill(blind, 0.0).view(shape)

    out = []
    for m in range(value_subspaces):
        sums = probs.new_zeros(*shape[:3], num_values)
        sums.scatter_add_(-1, value_codes[:, :, None, :, m].long().expand(shape), probs)
        out.append(sums @ value_centroids[:, m].float())
    return torch.cat(out, dim=-1).view(batch, query_heads, tokens, -1).to(q.dtype)


def _check_centroids(centroids: Tensor) -> tuple[int, int, int, int]:
    """(H, M, C, d/M) of a centroid tensor. Raises ValueError if it has another rank or more than 256 centroids."""
    if centroids.dim() != 4 or not 1 <= centroids.shape[2] <= 256:
        raise ValueError(f"centroids have shape {tuple(centroids.shape)}, expected (H, M, C, d/M) with C from 1 to 256")
    heads, subspaces, num_centroids, width = centroids.shape
    return heads, subspaces, num_centroids, width


def _first_minimum(distance: Tensor) -> Tensor:
    """distance (..., C) float32, overwritten -> (...) uint8, the lowest index of the smallest."""
    if distance.device.type != "cpu":
        return distance.argmin(-1).to(torch.uint8)
    # torch's argmin is scalar code on CPU (0.5 ns a number), amin is vectorized (0.04): take amin twice. The bits of a
    # positive float, read as an integer, are positive, so clamping leaves 0 at the minima and 1 elsewhere.
    index = torch.arange(distance.shape[-1], dtype=torch.int32)
    is_larger = distance.sub_(distance.amin(-1, keepdim=True)).view(torch.int32).clamp_(max=1)
    return torch.add(index, is_larger, alpha=256, out=is_larger).amin(-1).to(torch.uint8)
