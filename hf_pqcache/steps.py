"""The forward pass under way in a cache: which tokens still wait to be stored, and how a broken pass is taken back.

A pass goes through the layers one after the other, so whatever ends it half-way, an exhausted pool, no memory, the
user's Ctrl-C, leaves some layers ahead of others. Knows layers only by what it asks of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch

from hf_pqcache.storage import Storage


class WaitingLayer(Protocol):
    """The part of a compressed layer that a pass uses."""

    index: int

    @property
    def num_pending(self) -> int: ...

    def commit(self) -> None: ...

    def discard_pending(self) -> None: ...


class Steps:
    """Shared by the layers of one cache.

    Attributes:
        pending: layers with new tokens that attention has not seen yet.
        exact_layers: the layers that transformers itself keeps; they go through the same passes.
        decoded: why a layer's codes were decoded for attention in its last pass, where they were.
        is_generating: whether passes come from `generate`.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.pending: list[WaitingLayer] = []
        self.exact_layers: Sequence[Any] = ()
        self.decoded: dict[int, str] = {}
        self.is_generating = False
        self._damage: str | None = None

    def settle(self) -> None:
        """Store what waits."""
        for layer in list(self.pending):
            layer.commit()

    def complete(self) -> int:
        """Positions that all compressed layers hold, or will once what waits is stored."""
        waiting = {layer.index: layer.num_pending for layer in self.pending}
        return min((self.storage.tokens(i) + waiting.get(i, 0) for i in self.storage.views), default=0)

    def begin(self, index: int) -> None:
        """A layer is about to get new tokens. The first one to get any takes back a pass that stopped before its end.

        Raises RuntimeError if that is beyond repair, and ValueError in a cache that holds sequences.
        """
        self.settle()
        self.storage.check_rows_advance_together()
        if self.storage.views and index == min(self.storage.views) and self.storage.is_uneven:
            self.take_back()
        if self._damage is not None:
            raise RuntimeError(self._damage)

    def give_up(self, index: int, most: int | None = None) -> None:
        """After an error in a layer: `take_back`, or leave that to the next pass if memory is short even for it.

        `most`: positions before the pass, where the layer may have stored what came with it; None if it has not.
        """
        with suppress(torch.OutOfMemoryError):
            self.take_back(self.storage.tokens(index) if most is None else most)

    def take_back(self, most: int | None = None) -> None:
        """Return to the positions that all layers hold, `most` at most. Pages written meanwhile are free again.

        Compressed layers restore what had left their window from pages, as `crop` does.
        """
        self._discard()
        complete = self.storage.roll_back(most)
        for layer in self.exact_layers:
            try:
                if (excess := layer.get_seq_length() - complete) > 0 and layer.is_initialized:
                    layer.crop(-excess)
            except (AttributeError, NotImplementedError, RuntimeError):
                self._damage = (
                    f"a forward pass stopped half-way, and {type(layer).__name__} of transformers, which this model has "
                    "too, cannot go back; call reset() on the cache and pass the whole input again"
                )

    def reset(self) -> None:
        self._discard()
        self._damage, self.is_generating = None, False

    def _discard(self) -> None:
        for layer in self.pending:
            layer.discard_pending()
        self.pending.clear()
