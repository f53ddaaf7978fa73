"""The forward pass under way in a cache: which tokens still wait to be stored, and how a broken pass is rolled back.

A pass goes through the layers one after the other, so whatever ends it half-way, an exhausted pool, no memory, the
user's Ctrl-C, leaves some layers ahead of others. Knows layers only by what it asks of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch

from hf_pqcache.storage.storage import Storage


class WaitingLayer(Protocol):
    """The part of a compressed layer that a pass uses."""

    index: int

    @property
    def num_pending(self) -> int: ...

    @property
    def seen_by(self) -> Any: ...

    def commit(self) -> None: ...

    def discard_pending(self) -> None: ...


class ForwardPass:
    """Shared by the layers of one cache.

    Attributes:
        pending: layers with new tokens that attention has not seen yet.
        exact_layers: tells, by index, the layers that transformers itself keeps; they go through the same passes.
        without_positions: those of them whose tokens are no positions; no pass but the one that brings some changes them.
        entries: for these layers, the positions at which the last tokens came, and how many the layer held before.
        decoded: why a layer's codes were decoded for attention in its last pass, where they were.
        why_never: why no decode step of this cache is ever compiled, if so.
        eager_because: why those of the `generate` under way, or of the next one, are not; None where they may be.
        press: what has pruned the prompt, in words.
        generation: counts the calls of `generate`.
        is_generating: whether passes come from `generate`.
        compressed: the layers that a pass goes through, as the model's config says; those that a pass has not reached yet
            hold nothing.
    """

    def __init__(self, storage: Storage, exact_layers: Callable[[], dict[int, Any]], compressed: Sequence[int] = ()) -> None:
        self.storage = storage
        self.exact_layers = exact_layers
        self.compressed = compressed
        self.pending: list[WaitingLayer] = []
        self.without_positions: set[int] = set()
        self.entries: dict[int, tuple[int, int]] = {}
        self.decoded: dict[int, str] = {}
        self.why_never: str | None = None
        self.eager_because: str | None = None
        self.press: str | None = None
        self.generation = 0
        self.is_generating = False
        self._damage: str | None = None

    def settle(self) -> None:
        """Store what waits."""
        for layer in list(self.pending):
            layer.commit()

    def settle_seen(self) -> None:
        """Store a prompt that waits for hooks of attention alone: the pass that brought it is over."""
        for layer in list(self.pending):
            if layer.seen_by is not None:
                layer.commit()

    def complete(self) -> int:
        """Positions that all compressed layers hold, or will once what waits is stored."""
        if not self._has_reached_all():
            return 0
        waiting = {layer.index: layer.num_pending for layer in self.pending}
        return min((self.storage.lengths.tokens(i) + waiting.get(i, 0) for i in self.storage.layers.views), default=0)

    def _has_reached_all(self) -> bool:
        """Whether every compressed layer has had tokens, now or in a pass before."""
        return self.storage.layers.views.keys() >= set(self.compressed)

    def is_in_step(self, count: int) -> bool:
        """Whether `count` tokens, the first of a layer, are as many as the pass's first layer holds."""
        views = self.storage.layers.views
        waiting = {layer.index: layer.num_pending for layer in self.pending}
        return not views or count == self.storage.lengths.tokens(first := min(views)) + waiting.get(first, 0)

    def note_entry(self, index: int) -> None:
        """A layer whose tokens are no positions is about to get some. A pass that was broken off may have left others."""
        complete = self.complete()
        self._restore(index, complete)
        self.entries[index] = (complete, self.exact_layers()[index].get_seq_length())

    def _restore(self, index: int, complete: int) -> None:
        """Take a layer of `note_entry` back to before the pass that began at `complete` positions, if there was one."""
        positions, length = self.entries.get(index, (-1, 0))
        layer = self.exact_layers()[index]
        if positions >= complete and (excess := layer.get_seq_length() - length) > 0:
            layer.crop(-excess)

    def decide(self, why_decoded: str | None) -> None:
        """Settle whether `generate` may compile, by what the passes so far have shown.

        Called before it asks, for the answer must hold until it ends: masks and graphs are made for it. What a pass shows
        meanwhile is for the next time; layers whose codes must be decoded are, in the graph. `why_decoded`: why the next
        pass will, if that is known without it.
        """
        ragged = "layers hold different numbers of tokens" if self.storage.lengths.is_ragged else None
        self.eager_because = self.why_never or why_decoded or next(iter(self.decoded.values()), ragged)

    def rule_out(self, reason: str) -> None:
        """No step can be compiled any more."""
        self.why_never = self.why_never or reason
        self.eager_because = self.eager_because or reason

    def follow(self, other: ForwardPass) -> None:
        """Be in the state of another cache's, between passes."""
        self.decoded, self.why_never, self.eager_because = dict(other.decoded), other.why_never, other.eager_because
        self.is_generating, self.entries = other.is_generating, dict(other.entries)
        self.without_positions, self.press = set(other.without_positions), other.press

    def begin(self, index: int, count: int) -> None:
        """A layer is about to get `count` new tokens. The first one to get any rolls back a pass that stopped before its end.

        Raises RuntimeError if that is beyond repair, and ValueError in a cache that holds sequences.
        """
        self.settle()
        self.storage.check_in_step()
        views = self.storage.layers.views
        if views and index == min(views):
            if not self._has_reached_all() and self.storage.lengths.tokens(index):
                self._roll_back_first_pass(count)
            elif self.storage.lengths.is_uneven:
                self.roll_back()
        if self._damage is not None:
            raise RuntimeError(self._damage)

    def _roll_back_first_pass(self, count: int) -> None:
        """The first pass has not reached all layers: it was broken off, or the model has fewer than its config says.

        Who repeats the pass gives the whole input again. A single token after several is a next step instead, of a model
        that is not what its config says.
        """
        if count == 1 and self.storage.lengths.tokens(min(self.storage.layers.views)) > 1:
            missing = sorted(set(self.compressed) - self.storage.layers.views.keys())
            self._damage = (
                f"layers {missing} have never had a token. If a forward pass was interrupted, call reset() on the cache and "
                "pass the whole input again; if the model has fewer layers than its config says, set num_hidden_layers"
            )
            return
        self.roll_back(0)

    def abort(self, index: int, most: int | None = None) -> None:
        """After an error in a layer: `roll_back`, or leave that to the next pass if memory is short even for it.

        `most`: positions before the pass, where the layer may have stored what came with it; None if it has not.
        """
        with suppress(torch.OutOfMemoryError):
            self.roll_back(self.storage.lengths.tokens(index) if most is None else most)

    def roll_back(self, most: int | None = None) -> None:
        """Return to the positions that all layers hold, `most` at most. Pages written meanwhile are free again.

        Compressed layers restore what had left their window from pages, as `crop` does.
        """
        self._discard()
        complete = self.storage.roll_back(most)
        for index, layer in self.exact_layers().items():
            try:
                if index in self.without_positions:
                    self._restore(index, complete)
                elif (excess := layer.get_seq_length() - complete) > 0 and layer.is_initialized:
                    layer.crop(-excess)
            except (AttributeError, NotImplementedError, RuntimeError):
                self._damage = (
                    f"a forward pass stopped half-way, and {type(layer).__name__} of transformers, which this model has "
                    "too, cannot go back; call reset() on the cache and pass the whole input again"
                )

    def reset(self) -> None:
        self._discard()
        self.entries.clear()
        self._damage, self.is_generating, self.press = None, False, None

    def _discard(self) -> None:
        for layer in self.pending:
            layer.discard_pending()
        self.pending.clear()
