"""A transformers Cache over any quantizer: first and newest tokens exact, those between packed; knows no quantizer by name.

Plain and slow: all codes are decoded whenever attention asks. Layers that do not keep every token (sliding windows,
recurrent states) stay transformers' own. Left padding counts as tokens, as in transformers' QuantizedCache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from hf_pqcache.models.support import full_attention


class Quantizer(Protocol):
    """Keys or values to packed parts and back. B rows, H KV heads, T tokens, d head_dim.

    Every part is (B, H, n, ...) with n the tokens, or groups of `tokens_together` tokens, so that parts of later tokens go
    behind those of earlier ones.
    """

    #: T is a multiple of this.
    tokens_together: int

    def fit(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is settled by the first tokens (B, H, T, d) that are encoded: tensors (B, ...), or none."""

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """x (B, H, T, d) -> parts."""

    def decode(self, parts: tuple[Tensor, ...], fitted: tuple[Tensor, ...], head_dim: int) -> Tensor:
        """parts -> float32 (B, H, T, d)."""

    def bits(self, head_dim: int) -> float:
        """Bits of a number: codes, and every scale, offset, norm and index that comes with each token or group."""


@dataclass(frozen=True)
class Window:
    """Which tokens stay exact: the first `sinks`, and the newest, of which `recent` at least; older ones leave `block` at
    a time."""

    sinks: int = 0
    recent: int = 0
    block: int = 1

    def coded(self, length: int) -> int:
        """How many of `length` tokens are codes."""
        return max(0, length - self.sinks - self.recent) // self.block * self.block


class QuantizedSide:
    """Keys, or values, of one layer."""

    def __init__(self, quantizer: Quantizer, window: Window) -> None:
        if window.block % quantizer.tokens_together:
            raise ValueError(f"blocks of {window.block} tokens are no multiple of groups of {quantizer.tokens_together}")
        self.quantizer, self.window = quantizer, window
        self.sinks: Tensor | None = None
        self.recent: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()
        self.fitted: tuple[Tensor, ...] = ()
        self.num_coded = 0

    def seen(self) -> Tensor:
        """All tokens as they are kept, (B, H, n, d) in the dtype that they came in."""
        assert self.sinks is not None
        assert self.recent is not None
        if not self.num_coded:
            return torch.cat([self.sinks, self.recent], 2)
        decoded = self.quantizer.decode(self.parts, self.fitted, self.recent.shape[-1])
        return torch.cat([self.sinks, decoded.to(self.recent.dtype), self.recent], 2)

    def append(self, x: Tensor) -> None:
        """Take x (B, H, T, d); tokens that leave the window are encoded, once and for all."""
        if self.sinks is None or self.recent is None:
            self.sinks, self.recent = x[:, :, :0], x[:, :, :0]
        if (missing := self.window.sinks - self.sinks.shape[2]) > 0:
            self.sinks, x = torch.cat([self.sinks, x[:, :, :missing]], 2), x[:, :, missing:]
        self.recent = torch.cat([self.recent, x], 2)
        length = self.sinks.shape[2] + self.num_coded + self.recent.shape[2]
        if leaving := self.window.coded(length) - self.num_coded:
            old = self.recent[:, :, :leaving]
            self.recent = self.recent[:, :, leaving:].clone()  # not a view: the memory of those that left is free
            if not self.num_coded:
                self.fitted = self.quantizer.fit(old)
            new = self.quantizer.encode(old, self.fitted)
            self.parts = tuple(torch.cat(pair, 2) for pair in zip(self.parts, new, strict=True)) if self.parts else new
            self.num_coded += leaving

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, whose first dimension is the rows."""
        if self.sinks is not None and self.recent is not None:
            self.sinks, self.recent = change(self.sinks), change(self.recent)
        self.parts = tuple(map(change, self.parts))
        self.fitted = tuple(map(change, self.fitted))

    def nbytes(self) -> dict[str, int]:
        """By kind: codes (scales and the like included), window (exact tokens), tables (what was settled at first)."""

        def total(tensors: Sequence[Tensor | None]) -> int:
            return sum(x.nbytes for x in tensors if x is not None)

        return {"codes": total(self.parts), "window": total([self.sinks, self.recent]), "tables": total(self.fitted)}


class QuantizedLayer(DynamicLayer):
    """One layer. New tokens see each other exactly, and older ones as they are kept."""

    is_croppable = False

    def __init__(self, keys: Callable[[], QuantizedSide], values: Callable[[], QuantizedSide]) -> None:
        super().__init__()
        self._make = keys, values
        self.sides = keys(), values()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        for side, x in zip(self.sides, (key_states, value_states), strict=True):
            side.append(x[:, :, :0])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        found = []
        for side, x in zip(self.sides, (key_states, value_states), strict=True):
            found.append(torch.cat([side.seen(), x], 2))
            side.append(x)
        self.length += key_states.shape[2]
        return found[0], found[1]

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        """Forget everything. Transformers' own would write zeros in place, which tensors of inference mode refuse."""
        self.sides = self._make[0](), self._make[1]()
        self.length, self.is_initialized = 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -tokens_to_remove tokens. Raises ValueError where some of them are codes already."""
        count = -tokens_to_remove
        if count < 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to remove")
        if not count or not self.is_initialized:
            return
        exact = min(side.recent.shape[2] for side in self.sides if side.recent is not None)
        if count > exact:
            raise ValueError(
                f"crop({tokens_to_remove}): the newest {exact} of {self.length} tokens are exact, and codes are not taken back"
            )
        for side in self.sides:
            assert side.recent is not None
            side.recent = side.recent[:, :, : side.recent.shape[2] - count]
        self.length -= count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices.to(x.device)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for side in self.sides:
            side.each(change)

    def offload(self) -> None:
        raise NotImplementedError("reference quantizers stay on their device: use transformers' DynamicCache to offload")

    prefetch = offload


class ReferenceQuantizedCache(Cache):
    """A Cache of `config`'s model whose full-attention layers keep keys and values through quantizers.

    Args:
        config: the model's config.
        keys, values: make one side of a layer.
    """

    def __init__(
        self, config: PreTrainedConfig, keys: Callable[[], QuantizedSide], values: Callable[[], QuantizedSide]
    ) -> None:
        layers: list[Any] = DynamicCache(config=config).layers
        for i in full_attention(config, layers):
            if type(layers[i]) is DynamicLayer:  # layers with a recurrent state besides stay exact
                layers[i] = QuantizedLayer(keys, values)
        super().__init__(layers=layers)

    def stats(self) -> dict[str, Any]:
        """tokens; bytes by kind and bytes_reserved, of the quantized layers; bytes_total."""
        total = {"codes": 0, "window": 0, "tables": 0}
        own = [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]
        for layer in own:
            for side in layer.sides:
                for kind, count in side.nbytes().items():
                    total[kind] += count
        whole = sum(total.values())
        length = max((layer.length for layer in own), default=0)
        return {"tokens": length, "bytes": total, "bytes_total": whole, "bytes_reserved": whole}
