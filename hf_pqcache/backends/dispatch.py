"""Runs what a layer's storage needs on the engine that serves it: CUDA kernels where they can, plain torch elsewhere.

Knows which engines there are and what they need prepared; knows no transformers.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from hf_pqcache.backends import cuda_backend, selection, torch_backend
from hf_pqcache.backends.torch_backend import read_window, write_window
from hf_pqcache.pages.block_pool import LayerView
from hf_pqcache.pages.device_state import DeviceState
from hf_pqcache.pages.slabs import Which

logger = logging.getLogger(__name__)


def _select(view: LayerView, group: int) -> selection.Choice:
    """The engine for a layer with `group` query heads per KV head."""
    window, value_dim = view.window_keys, view.window_values.shape[3]
    head_dim = window.shape[3]
    if not view.codec.needs_centroids:
        return selection.select_paged(head_dim, value_dim, group, window.dtype, view.device)
    return selection.select(head_dim, value_dim, view.num_subspaces, view.config.num_bits, group, window.dtype, view.device)


def serves(view: LayerView, group: int) -> bool:
    """Whether attention of `group` query heads per KV head over a layer runs on kernels, which CUDA graphs can hold."""
    return _select(view, group).name != "torch"


def publish(state: DeviceState, layer: int, view: LayerView) -> None:
    """Register the storage of a layer with its device, after preparing what kernels need of it.

    To be called again whenever one of the view's tensors is replaced, or its centroids change.
    """
    choice = _select(view, 1)
    book, device = view.codebook, view.device
    if choice.name == "torch":
        view.kernels = None
        if book is not None:
            view.key_centroids, view.value_centroids = book.shared(
                ("centroids", device), lambda: (book.keys.to(device), book.values.to(device))
            )
    elif book is None:
        view.kernels = cuda_backend.prepare_layer(view)
    else:
        books = book.shared(
            ("books", device), lambda: tuple(cuda_backend.make_book(x.to(device)) for x in (book.keys, book.values))
        )
        view.kernels = cuda_backend.prepare_layer(view, books)
        # The books hold the centroids, too: they lie on the device once.
        view.key_centroids = cuda_backend.centroids_of(books[0], book.keys.shape)
        view.value_centroids = cuda_backend.centroids_of(books[1], book.values.shape)
    state.add_view(layer, view, () if view.kernels is None else view.kernels.tensors)


def _choose(state: DeviceState, layer: int, view: LayerView, query: Tensor) -> selection.Choice:
    """The engine for attention of `query` over a layer; chosen once, said once in the log."""
    group = query.shape[1] // view.window_keys.shape[1]
    if (known := state.choices.get((layer, group))) is not None:
        choice: selection.Choice = known
        return choice
    choice = _select(view, group)
    if choice not in state.choices.values():
        is_unexpected = choice.name == "torch" and query.is_cuda and choice.reason != selection.FORCED
        level = logging.WARNING if is_unexpected else logging.INFO
        logger.log(level, "attention over pages runs on the %s engine: %s", choice.name, choice.reason)
    state.choices[layer, group] = choice
    return choice


def attend(
    state: DeviceState,
    layer: int,
    counts: Tensor,
    query: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention of query (B, Hq, 1, d) over everything a layer holds -> (B, 1, Hq, dv); see `torch_engine.attend`."""
    view = state.views[layer]
    name, _ = _choose(state, layer, view, query)
    if name == "torch" or view.kernels is None:
        state.calls["attend", "torch"] += 1
        return torch_backend.attend(view, query, mask, sinks, scale, softcap, counts[:, 0].tolist(), state.starts.tolist())
    state.calls["attend", name] += 1
    if view.pages is not None:
        view.pages.prefetch()
    geometry = view.kernels.geometry
    return cuda_backend.attend(
        query,
        state.desc,
        layer,
        counts,
        state.starts,
        view.page_table,
        mask,
        sinks,
        geometry,
        scale,
        softcap,
        geometry.max_tokens,
        name,
    )


def append(state: DeviceState, layer: int, counts: Tensor, keys: Tensor, values: Tensor) -> None:
    """Store one decode step's keys, values (B, H, T, d) of all rows and advance `counts` (B, 2).

    Raises PagesExhaustedError, nothing changed, if there are no pages for them. Launches that are captured in a CUDA graph
    cannot ask: their pages must be reserved.
    """
    view = state.views[layer]
    if view.kernels is not None and keys.shape[2] == 1:
        if not (keys.is_cuda and torch.cuda.is_current_stream_capturing()):
            state.before_append(layer, None)
        if view.pages is not None:
            view.pages.prefetch()
        state.calls["append", "cuda"] += 1
        geometry = view.kernels.geometry
        cuda_backend.append(keys, values, state.desc, layer, counts, view.page_table, state.flags, geometry)
        return
    state.calls["append", "torch"] += 1
    lengths = counts[:, 0].tolist()
    after = [length + keys.shape[2] for length in lengths]
    state.before_append(layer, after)
    for row, length in enumerate(lengths):
        encode_row(view, row, keys[row], values[row], length)
    for row, length in enumerate(lengths):
        keep_row(view, row, keys[row], values[row], length)
    # Into what was passed, not into the view's: a compiler that passes a copy copies it back.
    counts.copy_(view.counts_of(after), non_blocking=True)


def encode_pages(view: LayerView, which: Which, x: Tensor, row: int, first: int) -> None:
    """Write x (H, n * page_size, d) into the n pages of a row from its page `first` on. Waits for no device."""
    last = first + x.shape[1] // view.config.page_size
    numbers = view.page_numbers(row, first, last)
    view.store.prefetch()
    if view.kernels is not None and view.codec.needs_centroids:  # exact pages are a copy, which torch makes as fast
        cuda_backend.encode_pages(view, which, x, view.page_table[row, first:last])
    else:
        torch_backend.encode_pages(view, which, x, numbers)


def encode_row(view: LayerView, row: int, keys: Tensor, values: Tensor, length: int) -> None:
    """Write the pages that leave the window when a row that holds `length` gets keys, values (H, T, d).

    Nothing that the row holds so far is touched: its pages must be in the page table, and new. Pages that begin in the
    window are encoded from a copy of at most a window, all others straight from the new tokens, so that temporary memory
    does not grow with their number.
    """
    config, new_length = view.config, length + keys.shape[1]
    size, old_coded, coded = config.page_size, view.coded_tokens(length), view.coded_tokens(new_length)
    if coded == old_coded:
        return
    first, page, count = config.sink_tokens + old_coded, old_coded // size, (coded - old_coded) // size
    begun = min(count, max(0, -(-(length - first) // size)))  # pages whose first tokens are in the window
    straight = first + begun * size
    sides: tuple[tuple[Which, Tensor], ...] = (("key", keys), ("value", values))
    for which, x in sides:
        if begun:
            old = read_window(view, which, row, first, min(straight, length))
            encode_pages(view, which, torch.cat([old, x[:, : max(0, straight - length)]], dim=1), row, page)
        if begun < count:
            at = straight - length
            encode_pages(view, which, x[:, at : at + (count - begun) * size], row, page + begun)


def keep_row(view: LayerView, row: int, keys: Tensor, values: Tensor, length: int) -> None:
    """Put the newest of a row's new tokens keys, values (H, T, d) into its window; what leaves must be in pages.

    Allocates nothing, so that it cannot fail half-way. Does not change `view.counts`.
    """
    new_length, sinks = length + keys.shape[1], view.config.sink_tokens
    kept = max(length, sinks, new_length - view.window_slots)
    sides: tuple[tuple[Which, Tensor], ...] = (("key", keys), ("value", values))
    for which, x in sides:
        write_window(view, which, row, length, x[:, : max(0, sinks - length)])
        write_window(view, which, row, kept, x[:, kept - length :])


def encode_window(view: LayerView, row: int, length: int) -> None:
    """Store as codes what the window holds beyond its share, once a layer has got its centroids."""
    coded, sinks = view.coded_tokens(length), view.config.sink_tokens
    if coded:
        encode_pages(view, "key", read_window(view, "key", row, sinks, sinks + coded), row, 0)
        encode_pages(view, "value", read_window(view, "value", row, sinks, sinks + coded), row, 0)
