"""The plain-torch backend: encode, decode and attend over one layer's pages and window; slow, and right anywhere.

Rows are handled one after the other because each has its own length. Lengths are passed as host integers where the
caller knows them, so that nothing is read from the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_pqcache.config import Side
from hf_pqcache.pages.layer_kv import LayerView

#: Pages encoded or decoded at once: bounds temporary memory whatever the length of the prompt.
PAGES_PER_CHUNK = 64


def _window(view: LayerView, which: Side) -> Tensor:
    return view.window_keys if which == "key" else view.window_values


def encode_pages(view: LayerView, which: Side, x: Tensor, pages: Sequence[int]) -> None:
    """Write x (H, n * page_size, d) into n pages."""
    size = view.config.page_size
    for i in range(0, len(pages), PAGES_PER_CHUNK):
        numbers = pages[i : i + PAGES_PER_CHUNK]
        part = x[:, i * size : (i + len(numbers)) * size]
        view.store.write(which, numbers, view.codec(which).encode(part))


def decode_pages(view: LayerView, which: Side, pages: Sequence[int]) -> Tensor:
    """The contents of n pages -> (H, n * page_size, d) in the model's dtype."""
    window, codec = _window(view, which), view.codec(which)
    if not pages:
        return window.new_empty(window.shape[1], 0, window.shape[3])
    view.store.prefetch()
    chunks = [pages[i : i + PAGES_PER_CHUNK] for i in range(0, len(pages), PAGES_PER_CHUNK)]
    parts = [codec.decode(view.store.read(which, chunk), window.dtype) for chunk in chunks]
    return torch.cat(parts, dim=1)


def window_spans(view: LayerView, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """(slot, token, count) of the unbroken runs of window slots that a row's tokens first..last-1 have: three at most.

    Raises ValueError for more tokens than the ring has slots.
    """
    sinks, slots = view.config.sink_tokens, view.window_slots
    if first < min(sinks, last):
        yield first, first, min(sinks, last) - first
    first = max(first, sinks)
    if last - first > slots:
        raise ValueError(f"tokens {first} to {last - 1} do not fit a window of {slots} slots")
    while first < last:
        place = (first - sinks) % slots
        count = min(last - first, slots - place)
        yield sinks + place, first, count
        first += count


def read_window(view: LayerView, which: Side, row: int, first: int, last: int) -> Tensor:
    """A row's exact tokens first..last-1 -> (H, last - first, d)."""
    window = _window(view, which)[row]
    parts = [window[:, slot : slot + count] for slot, _, count in window_spans(view, first, last)]
    return torch.cat(parts, dim=1) if parts else window[:, :0]


def write_window(view: LayerView, which: Side, row: int, first: int, x: Tensor) -> None:
    """Put x (H, T, d), a row's tokens from `first` on, into its window. Allocates nothing, so it cannot fail half-way."""
    window = _window(view, which)[row]
    for slot, token, count in window_spans(view, first, first + x.shape[1]):
        window[:, slot : slot + count].copy_(x[:, token - first : token - first + count])


def coded_tokens(view: LayerView, which: Side, row: int, first: int, last: int) -> Tensor:
    """A row's tokens first..last-1 as its pages have them -> (H, last - first, d); all of them must be in pages."""
    sinks, size = view.config.sink_tokens, view.config.page_size
    begin = (first - sinks) // size
    pages = view.page_numbers(row, begin, -(-(last - sinks) // size))
    skip = first - sinks - begin * size
    return decode_pages(view, which, pages)[:, skip : skip + last - first]


def row_tokens(view: LayerView, which: Side, row: int, length: int, in_pages: int | None = None) -> Tensor:
    """All tokens of a row that holds `length`, exact or decoded -> (H, length, d); `in_pages` as in `store.write_pages`."""
    coded = view.coded_tokens(length) if in_pages is None else in_pages
    pages = view.page_numbers(row, 0, coded // view.config.page_size)
    sinks = min(length, view.config.sink_tokens)
    return torch.cat(
        [
            read_window(view, which, row, 0, sinks),
            decode_pages(view, which, pages),
            read_window(view, which, row, sinks + coded, length),
        ],
        dim=1,
    )


def dense(view: LayerView, which: Side, lengths: Sequence[int], left_pad: Sequence[int], total: int) -> Tensor:
    """Keys or values as an uncompressed cache would hold them: (B, H, total, d), zeros where a row has no token."""
    window, size, sinks = _window(view, which), view.config.page_size, view.config.sink_tokens
    out = window.new_zeros(len(lengths), window.shape[1], total, window.shape[3])
    for rows in _rows_together([view.coded_tokens(length) // size for length in lengths]):
        pages = [view.page_numbers(row, 0, view.coded_tokens(lengths[row]) // size) for row in rows]
        decoded = decode_pages(view, which, [page for of_row in pages for page in of_row])
        for row, of_row in zip(rows, pages, strict=True):
            own, decoded = decoded.split([len(of_row) * size, decoded.shape[1] - len(of_row) * size], dim=1)
            length, coded = lengths[row], own.shape[1]
            parts = [read_window(view, which, row, 0, min(length, sinks)), own]
            parts.append(read_window(view, which, row, min(length, sinks) + coded, length))
            start = left_pad[row]
            out[row, :, start : start + length] = torch.cat(parts, dim=1)[:, : total - start]
    return out


def _rows_together(pages: Sequence[int]) -> Iterator[list[int]]:
    """Neighbouring rows, each with so many pages, that have few enough of them to be decoded at once; one row at least."""
    begin = together = 0
    for row, count in enumerate(pages):
        if row > begin and together + count > PAGES_PER_CHUNK:
            yield list(range(begin, row))
            begin, together = row, 0
        together += count
    yield list(range(begin, len(pages)))


def attend(
    view: LayerView,
    query: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    lengths: Sequence[int],
    left_pad: Sequence[int],
) -> Tensor:
    """Attention of one query token per row over everything the row holds, computed in float32.

    Args:
        query: (B, Hq, 1, d); Hq a multiple of the KV heads.
        mask: None, or (B or 1, 1, 1, n): bool (True attends) or additive float; column left_pad[row] + t is token t of
            a row, columns beyond n attend.
        sinks: None, or (Hq) logits that take part in the softmax and attend to nothing (GPT-OSS).
        softcap: 0, or the cap c of c * tanh(score / c) (Gemma 2).

    Returns:
        (B, 1, Hq, dv) in the query's dtype; zeros for a row that attends to nothing.
    """
    total = max((start + length for start, length in zip(left_pad, lengths, strict=True)), default=0)
    keys, values = (dense(view, which, lengths, left_pad, total) for which in ("key", "value"))
    return attend_dense(query, keys, values, mask, sinks, scale, softcap, lengths, left_pad)


def attend_dense(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    lengths: Sequence[int],
    left_pad: Sequence[int],
) -> Tensor:
    """As `attend`, over keys and values (B, H, total, d) as `dense` gives them."""
    batch, num_heads, _, head_dim = query.shape
    num_kv_heads, total = keys.shape[1:3]
    keys, values = keys.float(), values.float()
    scores = query.float().view(batch, num_kv_heads, -1, head_dim) @ keys.mT * scale  # (B, H, G, total)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    columns = torch.arange(total, device=query.device)
    begins = torch.tensor(list(left_pad), device=query.device)[:, None]
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
