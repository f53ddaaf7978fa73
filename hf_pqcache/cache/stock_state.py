"""What transformers' own layers hold of one sequence, as tensors, and layers made of such tensors; knows no pages.

They are read by the attributes that they have from 5.17 on, and made again by their own updates. Layers of other kinds are
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

#: Kinds of layers of which we know that tokens and states are all that they hold.
KNOWN = {"DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionLayer", "LinearAttentionAndFullAttentionLayer"}
KNOWN |= {"LinearAttentionAndSlidingWindowAttentionLayer"}
#: Layers that hold nothing of their own: they attend to another layer's tokens.
EMPTY = {"DummyLayer"}
#: Most positions that a layer can have counted.
_MOST = (1 << 31) - 1


def read(part: Any, index: int, row: int, padding: int) -> tuple[int, dict[str, Tensor]]:
    """(positions seen, tensors by name) of a sequence in one of transformers' layers, without its left padding.

    Raises NotImplementedError for a kind of layer that may hold more than is read.
    """
    if type(part).__name__ in EMPTY:
        return 0, {}
    if type(part).__name__ not in KNOWN:
        raise NotImplementedError(
            f"layer {index} is transformers' {type(part).__name__}, which may hold more than tokens and states: its sequences "
            "cannot be exported"
        )
    seen, tensors = 0, dict[str, Tensor]()
    if hasattr(part, "keys") and part.is_initialized and part.get_seq_length():
        seen = max(0, part.get_seq_length() - padding)
        there = part.keys.shape[2]
        first = there - min(seen, there, _kept(part))
        tensors |= {"keys": part.keys[row : row + 1, :, first:], "values": part.values[row : row + 1, :, first:]}
    if hasattr(part, "conv_states"):
        for i in range(part.number_of_states):
            if part.is_conv_states_initialized[i]:
                tensors[f"conv.{i}"] = part.conv_states[i][row : row + 1, ..., -part.conv_kernel_size[i] :]
            if part.is_recurrent_states_initialized[i]:
                tensors[f"recurrent.{i}"] = part.recurrent_states[i][row : row + 1]
    return seen, tensors


def _kept(part: Any) -> int:
    """Tokens that a layer keeps at most between passes."""
    return part.sliding_window - 1 if isinstance(part, DynamicSlidingWindowLayer) else _MOST


def check(part: Any, index: int, seen: int, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless a layer like `part` may hold such tensors after `seen` positions."""
    names = {f"{kind}.{i}" for kind in ("conv", "recurrent") for i in range(getattr(part, "number_of_states", 0))}
    names |= {"keys", "values"} if isinstance(part, DynamicLayer) else set()
    if not set(tensors) <= names:
        raise ValueError(f"layer {index} has {sorted(set(tensors) - names)}, which {type(part).__name__} does not hold")
    if ("keys" in tensors) != ("values" in tensors) or (seen > 0) != ("keys" in tensors):
        raise ValueError(f"layer {index}: keys, values and their number do not belong together")
    for name in ("keys", "values"):
        if name in tensors and (tensors[name].dim() != 4 or tensors[name].shape[:3] != _shape(part, tensors["keys"], seen)):
            raise ValueError(
                f"layer {index}: {name} are {tuple(tensors[name].shape)}, expected "
                f"{(*_shape(part, tensors['keys'], seen), 'd')}"
            )
    for name, x in tensors.items():
        if not x.is_floating_point() or x.dim() < 2 or x.shape[0] != 1 or not x.isfinite().all():
            raise ValueError(f"layer {index}: {name} must be finite numbers (1, ...), got {x.dtype} {tuple(x.shape)}")


def _shape(part: Any, keys: Tensor, seen: int) -> tuple[int, ...]:
    return 1, keys.shape[1] if keys.dim() == 4 else 0, min(seen, _kept(part))


def fill(part: Any, seen: int, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """`part`, a layer without tokens, with what `read` read; `check` comes first."""
    there = {name: x.to(device) for name, x in tensors.items()}
    for name, x in there.items():
        kind, _, number = name.partition(".")
        if kind == "conv":
            part.update_conv_state(x, state_idx=int(number))
        elif kind == "recurrent":
            part.update_recurrent_state(x, state_idx=int(number))
    if "keys" in there:
        part.update(there["keys"], there["values"])
        if isinstance(part, DynamicSlidingWindowLayer):
            part.cumulative_length = seen
    return part
