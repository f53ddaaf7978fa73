"""Which backend serves a layer, CUDA kernels where they can and plain torch elsewhere, and what it needs prepared."""

from __future__ import annotations

import logging

from torch import Tensor

from hf_pqcache.backends import cuda_backend, selection
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


def choose(state: DeviceState, layer: int, query: Tensor) -> selection.Choice:
    """The backend for attention of `query` (B, Hq, 1, d) over a layer; chosen once, said once in the log."""
    view = state.views[layer]
    group = query.shape[1] // view.window_keys.shape[1]
    choice: selection.Choice | None = state.choices.get((layer, group))
    if choice is not None:
        return choice
    choice = _select(view, group)
    if choice not in state.choices.values():
        is_unexpected = choice.name == "torch" and query.is_cuda and choice.reason != selection.FORCED
        level = logging.WARNING if is_unexpected else logging.INFO
        logger.log(level, "attention over pages runs on the %s backend: %s", choice.name, choice.reason)
    state.choices[layer, group] = choice
    return choice
