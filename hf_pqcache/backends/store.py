"""Stores a sequence's new tokens in one layer: whole pages first, then the recent window; knows no transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_pqcache.backends import cuda_backend, torch_backend
from hf_pqcache.backends.torch_backend import read_window, write_window
from hf_pqcache.codebook.normalise import EQUALISER_TOKENS
from hf_pqcache.config import Side
from hf_pqcache.errors import WindowOverflowError
from hf_pqcache.pages.layer_kv import LayerView


def _encode_pages(view: LayerView, which: Side, x: Tensor, row: int, first: int) -> None:
    """Write x (H, n * page_size, d) into the n pages of a row from its page `first` on. Waits for no device."""
    last = first + x.shape[1] // view.config.page_size
    numbers = view.page_numbers(row, first, last)
    view.store.prefetch()
    if view.kernels is not None and view.has_codes:  # exact pages are a copy, which torch makes as fast
        cuda_backend.encode_pages(view, which, x, view.page_table[row, first:last])
    else:
        torch_backend.encode_pages(view, which, x, numbers)


def write_pages(view: LayerView, row: int, keys: Tensor, values: Tensor, length: int, in_pages: int | None = None) -> None:
    """Write the pages that leave the window when a row that holds `length` gets keys, values (H, T, d).

    in_pages: how many of its tokens are in pages where that does not follow from its length, as it began with another row's.

    Nothing that the row holds so far is touched: its pages must be in the page table, and new. Pages that begin in the
    window are encoded from a copy of at most a window, all others straight from the new tokens, so that temporary memory
    does not grow with their number.
    """
    config, new_length = view.config, length + keys.shape[1]
    size, old_coded = config.page_size, view.coded_tokens(length) if in_pages is None else in_pages
    coded = max(old_coded, view.coded_tokens(new_length))
    if (exact := new_length - config.sink_tokens - coded) > view.window_slots:
        raise WindowOverflowError(
            f"{exact} tokens do not fit an exact window of {view.window_slots}; report it, with the settings"
        )
    if coded == old_coded:
        return
    first, page, count = config.sink_tokens + old_coded, old_coded // size, (coded - old_coded) // size
    begun = min(count, max(0, -(-(length - first) // size)))  # pages whose first tokens are in the window
    straight = first + begun * size
    if view.has_codes and not view.is_equalised:
        end = first + min(count * size, EQUALISER_TOKENS)
        old = read_window(view, "key", row, first, max(first, min(end, length)))
        view.equalise(torch.cat([old, keys[:, max(0, first - length) : max(0, end - length)]], dim=1))
    sides: tuple[tuple[Side, Tensor], ...] = (("key", keys), ("value", values))
    for which, x in sides:
        if begun:
            old = read_window(view, which, row, first, min(straight, length))
            _encode_pages(view, which, torch.cat([old, x[:, : max(0, straight - length)]], dim=1), row, page)
        if begun < count:
            at = straight - length
            _encode_pages(view, which, x[:, at : at + (count - begun) * size], row, page + begun)


def write_recent_window(view: LayerView, row: int, keys: Tensor, values: Tensor, length: int) -> None:
    """Put the newest of a row's new tokens keys, values (H, T, d) into its window; what leaves must be in pages.

    Allocates nothing, so that it cannot fail half-way. Does not change `view.seq_lens`.
    """
    new_length, sinks = length + keys.shape[1], view.config.sink_tokens
    kept = max(length, sinks, new_length - view.window_slots)
    sides: tuple[tuple[Side, Tensor], ...] = (("key", keys), ("value", values))
    for which, x in sides:
        write_window(view, which, row, length, x[:, : max(0, sinks - length)])
        write_window(view, which, row, kept, x[:, kept - length :])
