"""The custom ops that compiled and eager models call: find the storage, hand it to a backend; knows no transformers.

Registered with `torch.library.Library` rather than `custom_op`, whose wrapper costs 25-55 us a call on the host. The
storage behind an op is addressed by its tensor of layers' pointers, never passed: a graph with hundreds of pool tensors as
inputs would spend its time checking them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_pqcache.backends import dispatch, torch_backend
from hf_pqcache.pages.device_state import DeviceState, state_of
from hf_pqcache.pages.slabs import Which

_LIBRARY = torch.library.Library("hf_pqcache", "DEF")
_LIBRARY.define("append(Tensor key, Tensor value, Tensor(a!) seq_lens, Tensor layer_ptrs, int layer) -> ()")
_LIBRARY.define(
    "attend(Tensor query, Tensor seq_lens, Tensor layer_ptrs, Tensor? mask, Tensor? sinks, int layer, float scale, "
    "float softcap, int value_dim) -> Tensor"
)
# It reads lengths on the host, so no CUDA graph can hold it: compilers cut theirs there, or make none.
_LIBRARY.define(
    "dense(Tensor like, Tensor seq_lens, Tensor layer_ptrs, int layer, str which, int total) -> Tensor",
    tags=[tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) is not None else [],
)


def _of_layer(state: DeviceState, seq_lens: Tensor, layer: int) -> Tensor:
    """The layer's part of `seq_lens`: the view that storage keeps, unless a compiler passed a copy of the whole."""
    return state.views[layer].seq_lens if seq_lens.data_ptr() == state.seq_lens.data_ptr() else seq_lens[layer]


def _append(key: Tensor, value: Tensor, seq_lens: Tensor, layer_ptrs: Tensor, layer: int) -> None:
    """Store one decode step's key and value (B, H, T, d) and advance the layer's `seq_lens`; see `dispatch.append`."""
    state = state_of(layer_ptrs)
    dispatch.append(state, layer, _of_layer(state, seq_lens, layer), key, value)


def _attend(
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
    """Attention of query (B, Hq, 1, d) over everything the layer holds -> (B, 1, Hq, value_dim)."""
    state = state_of(layer_ptrs)
    return dispatch.attend(state, layer, _of_layer(state, seq_lens, layer), query, mask, sinks, scale, softcap)


def _dense(like: Tensor, seq_lens: Tensor, layer_ptrs: Tensor, layer: int, which: Which, total: int) -> Tensor:
    """Keys or values decoded: (B, H, total, d), zeros where there is no token."""
    state = state_of(layer_ptrs)
    state.calls["dense", "torch"] += 1
    return torch_backend.dense(state.views[layer], which, seq_lens[layer, :, 0].tolist(), state.left_pad.tolist(), total)


for _name, _function in (("append", _append), ("attend", _attend), ("dense", _dense)):
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _key)


@torch.library.register_fake("hf_pqcache::append")
def _(key: Tensor, value: Tensor, seq_lens: Tensor, layer_ptrs: Tensor, layer: int) -> None:
    return None


@torch.library.register_fake("hf_pqcache::attend")
def _(query, seq_lens, layer_ptrs, mask, sinks, layer, scale, softcap, value_dim):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value_dim)


@torch.library.register_fake("hf_pqcache::dense")
def _(like, seq_lens, layer_ptrs, layer, which, total):  # type: ignore[no-untyped-def]
    return like.new_empty(like.shape[0], like.shape[1], total, like.shape[3])
