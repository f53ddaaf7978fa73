"""The custom ops that compiled and eager models call: find the storage, hand it to the backend that serves it.

Registered with `torch.library.Library` rather than `custom_op`, whose wrapper costs 25-55 us a call on the host. The
storage behind an op is addressed by its tensor of layers' pointers, never passed: a graph with hundreds of pool tensors as
inputs would spend its time checking them. Knows no transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_pqcache.backends import cuda_backend, dispatch, store, torch_backend
from hf_pqcache.backends.cuda_backend import Place
from hf_pqcache.config import Side
from hf_pqcache.pages.device_state import DeviceState, state_of


def _of_layer(state: DeviceState, seq_lens: Tensor, layer: int) -> Tensor:
    """The layer's part of `seq_lens`: the view that storage keeps, unless a compiler passed a copy of the whole."""
    return state.views[layer].seq_lens if seq_lens.data_ptr() == state.seq_lens.data_ptr() else seq_lens[layer]


def append(keys: Tensor, values: Tensor, seq_lens: Tensor, layer_ptrs: Tensor, layer: int) -> None:
    """Store one decode step's keys, values (B, H, T, d) of all sequences and advance the layer's `seq_lens`.

    Raises PagesExhaustedError, nothing changed, if there are no pages for them. Launches that are captured in a CUDA graph
    cannot ask: their pages must be reserved.
    """
    state = state_of(layer_ptrs)
    view, advanced = state.views[layer], _of_layer(state, seq_lens, layer)
    if view.kernels is not None and keys.shape[2] == 1:
        if not (keys.is_cuda and torch.cuda.is_current_stream_capturing()):
            state.before_append(layer, None)
        view.store.prefetch()
        state.calls["append", "cuda"] += 1
        place = Place(layer_ptrs, layer, advanced, state.left_pad, view.page_table, view.kernels.geometry)
        cuda_backend.append(keys, values, place, state.flags)
        return
    state.calls["append", "torch"] += 1
    lengths = advanced[:, 0].tolist()
    after = [length + keys.shape[2] for length in lengths]
    state.before_append(layer, after)
    for seq, length in enumerate(lengths):
        store.write_pages(view, seq, keys[seq], values[seq], length)
    for seq, length in enumerate(lengths):
        store.write_recent_window(view, seq, keys[seq], values[seq], length)
    # Into what was passed, not into the view's: a compiler that passes a copy copies it back.
    advanced.copy_(view.seq_lens_of(after), non_blocking=True)


def attend(
    query: Tensor,
    seq_lens: Tensor,
    layer_ptrs: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    layer: int,
    scale: float,
    softcap: float,
    value_dim: int,
) -> Tensor:
    """Attention of query (B, Hq, 1, d) over everything a layer holds -> (B, 1, Hq, value_dim); see `torch_backend.attend`."""
    state = state_of(layer_ptrs)
    view, lengths = state.views[layer], _of_layer(state, seq_lens, layer)
    name = dispatch.choose(state, layer, query).name
    state.calls["attend", name] += 1
    if name == "torch":
        return torch_backend.attend(view, query, mask, sinks, scale, softcap, lengths[:, 0].tolist(), state.left_pad.tolist())
    view.store.prefetch()
    place = Place(layer_ptrs, layer, lengths, state.left_pad, view.page_table, view.kernels.geometry)
    return cuda_backend.attend(query, place, mask, sinks, scale, softcap, place.geometry.max_tokens)


def dense(like: Tensor, seq_lens: Tensor, layer_ptrs: Tensor, layer: int, which: Side, total: int) -> Tensor:
    """Keys or values decoded: (B, H, total, d), zeros where there is no token."""
    state = state_of(layer_ptrs)
    state.calls["dense", "torch"] += 1
    return torch_backend.dense(state.views[layer], which, seq_lens[layer, :, 0].tolist(), state.left_pad.tolist(), total)


IMPLEMENTATIONS = {"append": append, "attend": attend, "dense": dense}

_LIBRARY = torch.library.Library("hf_pqcache", "DEF")
_LIBRARY.define("append(Tensor keys, Tensor values, Tensor(a!) seq_lens, Tensor layer_ptrs, int layer) -> ()")
_LIBRARY.define(
    "attend(Tensor query, Tensor seq_lens, Tensor layer_ptrs, Tensor? mask, Tensor? sinks, int layer, float scale, "
    "float softcap, int value_dim) -> Tensor"
)
# It reads lengths on the host, so no CUDA graph can hold it: compilers cut theirs there, or make none.
_LIBRARY.define(
    "dense(Tensor like, Tensor seq_lens, Tensor layer_ptrs, int layer, str which, int total) -> Tensor",
    tags=[tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) is not None else [],
)
for _name, _function in IMPLEMENTATIONS.items():
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _key)


@torch.library.register_fake("hf_pqcache::append")
def _(keys: Tensor, values: Tensor, seq_lens: Tensor, layer_ptrs: Tensor, layer: int) -> None:
    return None


@torch.library.register_fake("hf_pqcache::attend")
def _(query, seq_lens, layer_ptrs, mask, sinks, layer, scale, softcap, value_dim):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value_dim)


@torch.library.register_fake("hf_pqcache::dense")
def _(like, seq_lens, layer_ptrs, layer, which, total):  # type: ignore[no-untyped-def]
    return like.new_empty(like.shape[0], like.shape[1], total, like.shape[3])
