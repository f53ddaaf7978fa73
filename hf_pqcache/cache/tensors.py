"""Keys and values of a layer in pages as tensors that others look at, and may replace; knows no attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_pqcache.attention.lazy_kv import KEY, VALUE
from hf_pqcache.backends import torch_backend
from hf_pqcache.config import Side
from hf_pqcache.storage.memory import out_of_memory_as_pqc004

if TYPE_CHECKING:
    from hf_pqcache.cache.forward_pass import ForwardPass
    from hf_pqcache.cache.pending import Pending
    from hf_pqcache.storage.storage import Storage


class LayerTensors:
    """What a layer's `keys` and `values` are.

    Encoder-decoder models and a few others look at them. Forward hooks of an attention module may do so right after a
    prompt's first pass, when they are still exact, and replace them: what is to be stored is then theirs. Of tokens that come
    behind others they may take back the last ones, which then are not stored at all.
    """

    storage: Storage
    index: int
    is_initialized: bool
    _pending: Pending | None
    _pass: ForwardPass

    def commit(self, mask: Any = None, positions: Tensor | None = None) -> None:
        raise NotImplementedError

    def dense(self, which: Side, new: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def keys(self) -> Tensor | None:
        return self._whole(KEY)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign(KEY, value)

    @property
    def values(self) -> Tensor | None:
        return self._whole(VALUE)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assign(VALUE, value)

    def _assign(self, which: Side, value: Tensor | None) -> None:
        """Replace a prompt's tokens, right after its attention; or crop, by a value that is what the layer begins with."""
        if value is None:
            return
        if (pending := self._pending) is not None and pending.seen_by is not None and not pending.before:
            pending.replace(which, value)
        elif not self._crop_to(which, value):
            raise AttributeError(
                "a compressed layer's keys and values cannot be assigned, but by a forward hook of the attention module right "
                "after a prompt's first pass (which is not compiled), or to remove the newest tokens; pass new ones to update()"
            )

    def _crop_to(self, which: Side, value: Tensor) -> bool:
        """Keep the first tokens only, if `value` is their keys or values."""
        whole = self._whole(which)
        if whole is None or value.dim() != 4 or value.dtype != whole.dtype or value.device != whole.device:
            return False
        if not torch.equal(value, whole[:, :, : value.shape[2]]):
            return False
        past = self.storage.lengths.columns(self.index)
        if self._pending is not None and value.shape[2] >= past:  # all of it came in this pass, and is not stored yet
            self._pending.keep_first(which, value.shape[2] - past)
            return True
        self.commit()
        with out_of_memory_as_pqc004("restoring the exact window"):
            self.storage.crop_layer(self.index, whole.shape[2] - value.shape[2])
        return True

    def replace(self, keys: Tensor, values: Tensor, press: str) -> None:
        """Let keys, values (B, H, n, d) stand for a prompt that attention has just seen. Positions go on behind the prompt.

        press: who has made them, for `stats`.

        Raises ValueError for other shapes, or a padded batch; nothing has been stored then.
        """
        assert self._pending is not None
        pending, self._pending.counts_removed = self._pending, True
        pending.replace(KEY, keys)
        pending.replace(VALUE, values)
        self.commit()
        self._pass.press = press

    def _whole(self, which: Side) -> Tensor | None:
        if not self.is_initialized:
            return None
        if self._pending is not None and self._pending.seen_by is not None:
            return self.dense(which, self._pending.side(which))
        self.commit()
        return self._decoded(which)

    def _decoded(self, which: Side) -> Tensor:
        storage = self.storage
        lengths, total = storage.lengths.seq_lens(self.index), storage.lengths.columns(self.index)
        storage.layers.state(self.index).calls["dense", "torch"] += 1
        return torch_backend.dense(storage.layers.views[self.index], which, lengths, storage.lengths.left_pad, total)
