"""Runs what a layer's storage needs on the backend that serves it: CUDA kernels where they can, plain torch elsewhere.

Knows which backends there are and what they need prepared; knows no transformers.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from hf_pqcache.backends import cuda_backend, selection, store, torch_backend
from hf_pqcache.pages.device_state import DeviceState
from hf_pqcache.pages.layer_kv import LayerView

logger = logging.getLogger(__name__)


def _select(view: LayerView, group: int) -> selection.Choice:
    """The backend for a layer with `group` query heads per KV head."""
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
    """The backend for attention of `query` over a layer; chosen once, said once in the log."""
    group = query.shape[1] // view.window_keys.shape[1]
    if (known := state.choices.get((layer, group))) is not None:
        choice: selection.Choice = known
        return choice
    choice = _select(view, group)
    if choice not in state.choices.values():
        is_unexpected = choice.name == "torch" and query.is_cuda and choice.reason != selection.FORCED
        level = logging.WARNING if is_unexpected else logging.INFO
        logger.log(level, "attention over pages runs on the %s backend: %s", choice.name, choice.reason)
    state.choices[layer, group] = choice
    return choice


def attend(
    state: DeviceState,
    layer: int,
    seq_lens: Tensor,
    query: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention of query (B, Hq, 1, d) over everything a layer holds -> (B, 1, Hq, dv); see `torch_backend.attend`."""
    view = state.views[layer]
    name, _ = _choose(state, layer, view, query)
    if name == "torch" or view.kernels is None:
        state.calls["attend", "torch"] += 1
        return torch_backend.attend(view, query, mask, sinks, scale, softcap, seq_lens[:, 0].tolist(), state.left_pad.tolist())
    state.calls["attend", name] += 1
    if view.pages is not None:
        view.pages.prefetch()
    geometry = view.kernels.geometry
    return cuda_backend.attend(
        query,
        state.layer_ptrs,
        layer,
        seq_lens,
        state.left_pad,
        view.page_table,
        mask,
        sinks,
        geometry,
        scale,
        softcap,
        geometry.max_tokens,
        name,
    )


def append(state: DeviceState, layer: int, seq_lens: Tensor, keys: Tensor, values: Tensor) -> None:
    """Store one decode step's keys, values (B, H, T, d) of all rows and advance `seq_lens` (B, 2).

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
        cuda_backend.append(keys, values, state.layer_ptrs, layer, seq_lens, view.page_table, state.flags, geometry)
        return
    state.calls["append", "torch"] += 1
    lengths = seq_lens[:, 0].tolist()
    after = [length + keys.shape[2] for length in lengths]
    state.before_append(layer, after)
    for row, length in enumerate(lengths):
        store.write_pages(view, row, keys[row], values[row], length)
    for row, length in enumerate(lengths):
        store.write_recent_window(view, row, keys[row], values[row], length)
    # Into what was passed, not into the view's: a compiler that passes a copy copies it back.
    seq_lens.copy_(view.seq_lens_of(after), non_blocking=True)
