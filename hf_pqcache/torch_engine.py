"""The plain-torch engine: encode, decode and attend over one layer's pages and window; slow, and right anywhere.

Rows are handled one after the other because each has its own length. Lengths are passed as host integers where the
caller knows them, so that nothing is read from the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hf_pqcache import layout, pq
from hf_pqcache.pool import LayerView

Which = Literal["key", "value"]

#: Pages encoded or decoded at once: bounds temporary memory whatever the length of the prompt.
PAGES_PER_CHUNK = 64


def _storage(view: LayerView, which: Which) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pages, centroids, window, order) of the keys or the values."""
    config = view.config
    if which == "key":
        order = layout.key_order(config.page_size, view.num_subspaces, config.num_bits)
        return view.key_pages, view.key_centroids, view.window_keys, order
    order = layout.value_order(config.page_size, view.num_subspaces, config.num_bits)
    return view.value_pages, view.value_centroids, view.window_values, order


def encode_pages(view: LayerView, which: Which, x: Tensor, pages: Tensor) -> None:
    """Write x (H, n * page_size, d) as codes into the n pages whose numbers are in `pages` (n) int64."""
    store, centroids, _, order = _storage(view, which)
    size = view.config.page_size
    for i in range(0, pages.numel(), PAGES_PER_CHUNK):
        ids = pages[i : i + PAGES_PER_CHUNK]
        codes = pq.encode(x[:, i * size : (i + ids.numel()) * size], centroids)
        codes = codes.unflatten(1, (ids.numel(), size)).transpose(0, 1)  # (n, H, page_size, M)
        store[ids] = layout.pack_pages(codes, order, view.config.num_bits)


def decode_pages(view: LayerView, which: Which, pages: Tensor) -> Tensor:
    """The decoded contents of `pages` (n) int64 -> (H, n * page_size, d) in the model's dtype."""
    store, centroids, window, order = _storage(view, which)
    if not pages.numel():
        return window.new_empty(window.shape[1], 0, window.shape[3])
    parts = []
    for ids in pages.split(PAGES_PER_CHUNK):
        codes = layout.unpack_pages(store[ids], order, view.num_subspaces, view.config.num_bits)
        parts.append(pq.decode(codes.transpose(0, 1).flatten(1, 2), centroids, dtype=window.dtype))
    return torch.cat(parts, dim=1)


def window_slots(view: LayerView, first: int, last: int) -> Tensor:
    """Window slots of a row's tokens first..last-1: int64 (last - first)."""
    sinks = view.config.sink_tokens
    tokens = torch.arange(first, last, device=view.window_keys.device)
    return torch.where(tokens < sinks, tokens, sinks + (tokens - sinks) % view.window_slots)


def restore_window(view: LayerView, row: int, first: int, last: int) -> None:
    """Bring a row's coded tokens first..last-1 back into the window, decoded; they were crowded out of it before."""
    config = view.config
    size = config.page_size
    begin = (first - config.sink_tokens) // size
    ids = view.page_table[row, begin : -(-(last - config.sink_tokens) // size)].long()
    skip = first - config.sink_tokens - begin * size
    slots = window_slots(view, first, last)
    view.window_keys[row][:, slots] = decode_pages(view, "key", ids)[:, skip : skip + last - first]
    view.window_values[row][:, slots] = decode_pages(view, "value", ids)[:, skip : skip + last - first]


def row_tokens(view: LayerView, which: Which, row: int, length: int) -> Tensor:
    """All tokens of a row that holds `length`, exact or decoded -> (H, length, d)."""
    config, window = view.config, view.window_keys if which == "key" else view.window_values
    coded = view.coded_tokens(length)
    ids = view.page_table[row, : coded // config.page_size].long()
    sinks = min(length, config.sink_tokens)
    return torch.cat(
        [
            window[row][:, :sinks],
            decode_pages(view, which, ids),
            window[row][:, window_slots(view, sinks + coded, length)],
        ],
        dim=1,
    )


def dense(view: LayerView, which: Which, lengths: Sequence[int], starts: Sequence[int], total: int) -> Tensor:
    """Keys or values as an uncompressed cache would hold them: (B, H, total, d), zeros where a row has no token."""
    window = view.window_keys if which == "key" else view.window_values
    out = window.new_zeros(len(lengths), window.shape[1], total, window.shape[3])
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        out[row, :, start : start + length] = row_tokens(view, which, row, length)[:, : total - start]
    return out


def attend(
    view: LayerView,
    query: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    lengths: Sequence[int],
    starts: Sequence[int],
) -> Tensor:
    """Attention of one query token per row over everything the row holds, computed in float32.

    Args:
        query: (B, Hq, 1, d); Hq a multiple of the KV heads.
        mask: None, or (B or 1, 1, 1, n): bool (True attends) or additive float; column starts[row] + t is token t of
            a row, columns beyond n attend.
        sinks: None, or (Hq) logits that take part in the softmax and attend to nothing (GPT-OSS).
        softcap: 0, or the cap c of c * tanh(score / c) (Gemma 2).

    Returns:
        (B, 1, Hq, dv) in the query's dtype; zeros for a row that attends to nothing.
    """
    batch, num_heads, _, head_dim = query.shape
    total = max((start + length for start, length in zip(starts, lengths, strict=True)), default=0)
    keys, values = (dense(view, which, lengths, starts, total).float() for which in ("key", "value"))
    num_kv_heads = keys.shape[1]
    scores = query.float().view(batch, num_kv_heads, -1, head_dim) @ keys.mT * scale  # (B, H, G, total)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    columns = torch.arange(total, device=query.device)
    begins = torch.tensor(list(starts), device=query.device)[:, None]
    ends = begins + torch.tensor(list(lengths), device=query.device)[:, None]
    scores = scores.masked_fill(~((columns >= begins) & (columns < ends))[:, None, None], float("-inf"))
    if mask is not None:
        part = mask[..., :total]
        if part.dtype == torch.bool:
            bias = torch.zeros(part.shape, device=query.device).masked_fill(~part, float("-inf"))
        else:
            bias = part.float().masked_fill(part <= torch.finfo(part.dtype).min / 2, float("-inf"))
        scores = scores + torch.nn.functional.pad(bias, (0, total - part.shape[-1]))
    if sinks is not None:
        extra = sinks.float().view(1, num_kv_heads, -1, 1).expand(batch, -1, -1, 1)
        weights = torch.cat([scores, extra], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).nan_to_num(0.0)
    out = weights @ values
    return out.reshape(batch, 1, num_heads, -1).to(query.dtype)
