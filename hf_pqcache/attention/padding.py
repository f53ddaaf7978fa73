"""Left padding as attention masks and positions tell it; knows no cache.

A column that nobody sees is not padding for that alone: a later mask may show it. Padding is what the model does not
count either: the first column that is seen has position 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _seen(mask: Tensor, first: int, last: int) -> Tensor:
    """Side of the columns first..last-1 some head and query attends to: bool (B or 1, last - first).

    mask: (B, n), ones where a token is, or (B or 1, heads or 1, T, n), bool or additive.
    """
    part = mask[..., first:last]
    if mask.dim() == 2:
        return part.bool()
    allowed = part > torch.finfo(part.dtype).min / 2 if part.is_floating_point() else part.bool()
    return allowed.flatten(1, 2).any(1)


def _is_readable(mask: Any, batch: int) -> bool:
    return isinstance(mask, Tensor) and (mask.dim() == 4 or mask.dim() == 2) and mask.shape[0] in (1, batch)


def leading_padding(mask: Any, positions: Tensor | None, first: int, count: int, batch: int, is_generating: bool) -> list[int]:
    """How many of the new tokens at columns first..first+count-1 are left padding, for each row.

    Args:
        mask: what attention was given for the new tokens, see `_seen`.
        positions: (B or 1, count) position of each new token, or (k, B or 1, count) of several kinds; None where
            attention is not told.
        is_generating: whether `generate` runs: where positions do not tell, what its mask hides at the left is padding.

    A row whose new tokens are all hidden has only padding there if `generate` says so.
    """
    none = [0] * batch
    if not _is_readable(mask, batch) or mask.shape[-1] < first + count:
        return none
    if bool(_seen(mask, first, first + 1).all()):  # a column of the mask is enough, as a rule
        return none
    seen = _seen(mask, first, first + count).expand(batch, count)
    hidden: list[int] = torch.where(seen.any(-1), seen.int().argmax(-1), count).tolist()
    if positions is None or positions.shape[-1] != count or positions.dim() < 2:
        return hidden if is_generating else none
    counts = positions.reshape(-1, *positions.shape[-2:]).ne(0).any(0)  # (B or 1, count): whether not the first position
    counted: list[list[bool]] = counts.expand(batch, count).tolist()
    # A row without a visible token has none whose position would tell.
    is_padding = [is_generating if pad == count else not counted[row][pad] for row, pad in enumerate(hidden)]
    return [pad if told else 0 for pad, told in zip(hidden, is_padding, strict=True)]


def refuse_shown(mask: Any, left_pad: Sequence[int]) -> None:
    """Raise ValueError if `mask`, as in `leading_padding`, shows any of the first left_pad[r] columns of row r.

    They were left padding when they came, and were not stored. Waits for the device.
    """
    if _is_readable(mask, len(left_pad)):
        seen = _seen(mask, 0, max(left_pad)).expand(len(left_pad), -1)
        ends = torch.tensor(list(left_pad), device=seen.device)[:, None]
        rows = (seen & (torch.arange(seen.shape[1], device=seen.device) < ends)).any(1).tolist()
        shown = [row for row, is_shown in enumerate(rows) if is_shown]
    else:
        shown = [row for row, pad in enumerate(left_pad) if pad] if mask is None else []
    if shown:
        last = left_pad[shown[0]] - 1
        raise ValueError(
            f"the attention mask shows columns 0 to {last} of row {shown[0]}, which were left padding (hidden, "
            "and not counted as positions) when they came, and so are not in the cache. Pass an attention_mask with zeros "
            "there, or reset() the cache and pass the whole input again"
        )


def why_not_all_seen(mask: Any, count: int, batch: int) -> str | None:
    """Why it is not sure that every one of a prompt's `count` columns is seen, if so. Waits for the device."""
    if mask is None:
        return None
    if not _is_readable(mask, batch) or mask.shape[-1] < count:
        return "the attention mask is one that cannot be read"
    return None if bool(_seen(mask, 0, count).all()) else "the attention mask hides some of this one's"


def causal(count: int, device: torch.device) -> Tensor:
    """The mask of `count` tokens with nothing before them, bool (1, 1, count, count)."""
    return torch.ones(1, 1, count, count, dtype=torch.bool, device=device).tril()


def fitted(mask: Any, columns: int) -> Any:
    """The last `columns` columns of `mask` (..., n), whose last one is the newest token's; as seen where it has fewer.

    Layers whose prompts were pruned to different lengths are given a mask that was made for one of them.
    """
    if mask is None or mask.shape[-1] == columns:
        return mask
    if not isinstance(mask, Tensor):
        raise NotImplementedError("layers that were pruned to different lengths need a mask that is a tensor: use sdpa")
    if (missing := columns - mask.shape[-1]) < 0:
        return mask[..., -columns:]
    seen = mask.new_zeros(()) if mask.is_floating_point() else mask.new_ones(())
    return torch.cat([seen.expand(*mask.shape[:-1], missing), mask], dim=-1)
