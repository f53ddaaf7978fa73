"""What `update` hands to attention instead of decoded keys and values; knows layers only by what it asks of them.

In eager code a handle must pass for a tensor, since a model may do arithmetic on keys after `update`; in compiled code
dynamo traces a plain object best.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hf_pqcache.config import Side

KEY: Side = "key"
VALUE: Side = "value"

#: Why codes are decoded at every step for models that read them before, or without, transformers' attention interface.
DECODED = "the model reads keys and values itself; they are decoded for it at every step"


class HandledLayer(Protocol):
    """The part of a cache layer that handles and the attention dispatcher use.

    eager_facts: what the dispatcher has found out in the last eager pass about the eager attention function of the layer's
    model; a graph may know no more of it.
    """

    eager_facts: Any

    def fitted(self, mask: Any, queries: int) -> Any: ...

    def dense(self, which: Side, new: Tensor) -> Tensor: ...

    def dense_traced(self, which: Side, new: Tensor) -> Tensor: ...

    def attend(
        self, query: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float, value_dim: int
    ) -> Tensor: ...

    def check_mask(self, mask: Any) -> None: ...

    def note_decoded(self, reason: str | None) -> None: ...

    def note_seen(self, module: nn.Module, mask: Any, positions: Tensor | None) -> None: ...

    def commit(self, mask: Any = None, positions: Tensor | None = None) -> None: ...

    def abort_pass(self) -> None: ...


class KVHandle:
    """Keys or values of a layer in compiled code; `fresh` are this step's own, (B, H, T, d)."""

    def __init__(self, layer: HandledLayer, which: Side, new: Tensor) -> None:
        self.layer = layer
        self.which = which
        self.fresh = new

    @property
    def dtype(self) -> torch.dtype:
        return self.fresh.dtype

    @property
    def device(self) -> torch.device:
        return self.fresh.device

    @property
    def shape(self) -> torch.Size:
        return self.fresh.shape

    def to(self, *args: Any, **kwargs: Any) -> KVHandle:
        return self

    def dense(self) -> Tensor:
        """The plain tensor (B, H, n, d), decoded in the graph."""
        return self.layer.dense_traced(self.which, self.fresh)

    # Whoever computes with it gets the plain tensor's answer. Layers where an eager pass has shown that somebody does hand
    # out tensors in the first place.
    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(KVHandle, KVHandle.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


class LazyKV(Tensor):
    """Keys or values of a layer in eager code: shape, dtype and device of the whole, decoded only if somebody looks.

    The attention dispatcher recognises it and reads codes; everybody else gets dense, decoded data: slower, never
    wrong.

    Attributes:
        is_touched: whether anybody but the dispatcher has looked at its values.
    """

    layer: HandledLayer
    which: Side
    fresh: Tensor
    is_touched: bool
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, layer: HandledLayer, which: Side, new: Tensor, total: int) -> LazyKV:
        shape = (*new.shape[:2], total, new.shape[3])
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=new.dtype, device=new.device)
        self.layer, self.which, self.fresh, self._dense = layer, which, new, None
        self.is_touched = False
        return self

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def dense(self) -> Tensor:
        """The plain tensor (B, H, n, d). Kept, since the layer may move on before somebody looks again."""
        if self._dense is None:
            self._dense = self.layer.dense(self.which, self.fresh)
        return self._dense

    def _touched(self) -> Tensor:
        if not self.is_touched:
            self.is_touched = True
            self.layer.note_decoded(DECODED)
        return self.dense()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"LazyKV(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **(kwargs or {}))
            args, kwargs = tree_map_only(LazyKV, LazyKV._touched, (args, kwargs or {}))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(LazyKV, LazyKV._touched, (args, kwargs or {}))
        return func(*args, **kwargs)


def _forward_operators() -> None:
    """Python looks operators up on the class, past `__getattr__`."""

    def forwarding(name: str) -> Any:
        def operator(self: KVHandle, *args: Any) -> Any:
            return getattr(self.dense(), name)(*args)

        return operator

    binary = ("add", "sub", "mul", "truediv", "matmul", "pow")
    names = [*binary, *(f"r{name}" for name in binary), "getitem", "neg", "abs", "len"]
    for name in names:
        setattr(KVHandle, f"__{name}__", forwarding(f"__{name}__"))


_forward_operators()

#: What can be answered without decoding.
_METADATA = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
}
