"""How many tokens each sequence holds in each layer, as the host counts them; knows no page and stores nothing.

Under `generate` all sequences advance together, one position at a time; each begins after its own left padding, which is
never stored. Of a prompt a layer may hold fewer tokens than it has positions (a press has pruned it), as many in all
sequences. Sequences that are handled one by one (cache/sequences.py) start at 0 and advance each by itself. Compiled steps
advance the device's numbers unseen by the host, which reads them when it must.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.pages.device_state import FLAG_PAGES_EXHAUSTED
from hf_pqcache.storage.layers import Layers


class Lengths:
    """The tokens of each sequence in each of `layers`.

    Attributes:
        left_pad: left padding of each sequence.
        removed: positions of the prompt that a layer holds no token of.
        pruned_until: the end of the prompt that was pruned; 0 if none was.
        counts_removed: whether transformers is told positions. If not, only what a layer holds, as if the rest had never been.
        is_stale: compiled steps have advanced the device's lengths unseen by the host.
        unread_steps, unread_appends: steps, and tokens stored by them, since the device's lengths were read.
        reused: tokens before this one have lost their window slot, of each sequence in each layer.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self.left_pad: list[int] = []
        self.removed: dict[int, int] = {}
        self.pruned_until = 0
        self.counts_removed = True
        self.is_stale = False
        self.unread_steps = self.unread_appends = 0
        self.reused: dict[int, list[int]] = {}
        self._positions: dict[int, list[int]] = {}  # left padding included
        self._padding_known = 0  # positions up to which left padding has been looked at

    # -- asking ----------------------------------------------------------------------------------------------------
    def tokens(self, layer: int) -> int:
        """Positions that `layer` has seen, left padding included; those of the longest sequence where they differ."""
        return max(self.positions(layer), default=0)

    def positions(self, layer: int) -> list[int]:
        """Positions of each sequence in `layer`, left padding included."""
        if self.is_stale:
            self.refresh()
        return self.last_known(layer)

    def last_known(self, layer: int) -> list[int]:
        """As `positions`, without what compiled steps have added since the device was read."""
        return self._positions.get(layer) or [0] * self._layers.batch

    def seq_lens(self, layer: int) -> list[int]:
        """Tokens that each sequence holds in `layer`."""
        return self.at(layer, self.positions(layer))

    def at(self, layer: int, positions: Sequence[int]) -> list[int]:
        """Tokens that each sequence holds in `layer` at the given positions."""
        removed = self.removed.get(layer, 0)
        return [max(0, position - pad - removed) for position, pad in zip(positions, self.left_pad, strict=True)]

    def columns(self, layer: int) -> int:
        """Tokens that `layer` holds, left padding included: what attention masks have columns for."""
        return max(0, self.tokens(layer) - self.removed.get(layer, 0))

    def untold(self, layer: int) -> int:
        """Positions of `layer` that transformers is not told of."""
        return 0 if self.counts_removed else self.removed.get(layer, 0)

    @property
    def is_ragged(self) -> bool:
        """Whether layers hold different numbers of tokens at the same position."""
        return len({self.removed.get(layer, 0) for layer in self._layers.views}) > 1

    def num_pages(self, layer: int, positions: Sequence[int] | None = None) -> list[int]:
        """Pages that each sequence has written in `layer` at the given positions, or at its own."""
        view = self._layers.views[layer]
        lengths = self.at(layer, self.positions(layer) if positions is None else positions)
        return [view.coded_tokens(length) // view.config.page_size for length in lengths]

    def written_pages(self) -> list[int]:
        """Pages that each sequence has written in some layer; it may own more, reserved ahead."""
        layers = [self.num_pages(layer) for layer in self._layers.views]
        return [max(pages) for pages in zip(*layers, strict=True)] or [0] * self._layers.batch

    @property
    def is_uneven(self) -> bool:
        """Whether some layers hold more positions than others, as in the middle of a forward pass."""
        return len({self.tokens(layer) for layer in self._layers.views}) > 1

    def complete(self) -> int:
        """Positions that all layers hold."""
        return min((self.tokens(layer) for layer in self._layers.views), default=0)

    # -- counting --------------------------------------------------------------------------------------------------
    def count(self, layer: int, positions: list[int]) -> None:
        """Each sequence is at the given position in `layer`."""
        slots = self._layers.views[layer].window_slots
        self._positions[layer] = positions
        old, lengths = self.reused.get(layer) or [0] * len(positions), self.at(layer, positions)
        self.reused[layer] = [max(a, length - slots) for a, length in zip(old, lengths, strict=True)]

    def shorten(self, layer: int, positions: list[int]) -> None:
        """As `count`, for sequences that have lost tokens."""
        self.reused[layer] = [min(a, b) for a, b in zip(self.reused[layer], self.at(layer, positions), strict=True)]
        self.count(layer, positions)

    def place(self, layer: int, seq: int, length: int, reused: int) -> None:
        """A sequence without tokens or padding has got `length` tokens in `layer`; for `reused` see there."""
        positions = list(self.positions(layer))
        positions[seq] = length + self.removed.get(layer, 0)
        self.count(layer, positions)
        self.reused[layer][seq] = max(self.reused[layer][seq], reused)

    def refresh(self) -> None:
        """Read the lengths that compiled steps have advanced on the device. Raises PagesExhaustedError if one found no page."""
        self.is_stale, self.unread_steps, self.unread_appends = False, 0, 0
        flags = 0
        for state in self._layers.states.values():
            seq_lens, raised = state.seq_lens.tolist(), int(state.flags[0])
            for layer in state.views:
                sequences = zip(self._positions[layer], seq_lens[layer], self.left_pad, strict=True)
                gone = self.removed.get(layer, 0)
                self.count(layer, [max(position, length + pad + gone) for position, (length, _), pad in sequences])
            if raised:
                state.flags.zero_()
                flags |= raised
        if flags & FLAG_PAGES_EXHAUSTED:
            raise PagesExhaustedError(
                "a compiled step found no reserved page for its tokens; they are lost. Call the cache's "
                "get_mask_sizes() before every step, as generate does"
            )

    def publish(self) -> None:
        """Bring all lengths and left padding to the devices."""
        for state in self._layers.states.values():
            state.set_left_pad(self.left_pad)
        self.publish_ahead()
        for layer in self._layers.views:
            self.publish_layer(layer)

    def publish_ahead(self) -> None:
        for state in self._layers.states.values():
            state.set_ahead(self.removed if self.counts_removed else {})

    def publish_layer(self, layer: int) -> None:
        view = self._layers.views[layer]
        view.set_lengths(self.seq_lens(layer))
        view.is_equalised = view.is_equalised and any(self.num_pages(layer))

    # -- left padding ----------------------------------------------------------------------------------------------
    def wants_padding(self, first: int) -> bool:
        """Whether it is not yet known which of the positions from `first` on are left padding, and some may be.

        The first layer to store a position decides for all.
        """
        return self._padding_known <= first and (first == 0 or first in self.left_pad)

    def note_padding(self, layer: int, padding: Sequence[int]) -> None:
        """Skip the leading padding[i] of the new positions for every sequence i that holds nothing yet."""
        first = self.tokens(layer)
        pairs = zip(self.left_pad, padding, strict=True)
        self.left_pad = [first + more if pad == first or first == 0 else pad for pad, more in pairs]
        for state in self._layers.states.values():
            state.set_left_pad(self.left_pad)

    def padding_is_known(self, layer: int) -> None:
        """Up to the last position of `layer`."""
        self._padding_known = max(self._padding_known, self.tokens(layer))

    # -- pruned prompts --------------------------------------------------------------------------------------------
    def note_removed(self, layer: int, count: int, until: int, is_told: bool) -> None:
        """Of the first `until` positions, which `layer` is about to get, it gets all tokens but `count`.

        is_told: whether transformers is told positions, see `counts_removed`.
        """
        self.removed[layer], self.pruned_until, self.counts_removed = count, max(self.pruned_until, until), is_told

    def _forget_removed(self) -> None:
        self.removed.clear()
        self.pruned_until, self.counts_removed = 0, True

    # -- sequences come and go -------------------------------------------------------------------------------------
    def select(self, indices: Sequence[int | None]) -> None:
        """Sequence i becomes a copy of sequence indices[i], or an empty one."""
        self.left_pad = _pick(self.left_pad, indices)
        for numbers in (self._positions, self.reused):
            numbers |= {layer: _pick(old, indices) for layer, old in numbers.items()}

    def crop(self, tokens: int) -> None:
        """Forget left padding beyond the first `tokens` positions, and with the last of them what a press took away."""
        self.left_pad = [min(pad, tokens) for pad in self.left_pad]
        self._padding_known = min(self._padding_known, tokens)
        if tokens == 0:
            self._forget_removed()

    def reset(self) -> None:
        self.is_stale, self.unread_steps, self.unread_appends, self._padding_known = False, 0, 0, 0
        self._forget_removed()
        self.select([None] * self._layers.batch)

    def follow(self, other: Lengths) -> None:
        """Be as `other`, of a copy of the same layers."""
        self.left_pad, self._padding_known = list(other.left_pad), other._padding_known
        self._positions = {layer: list(numbers) for layer, numbers in other._positions.items()}
        self.reused = {layer: list(numbers) for layer, numbers in other.reused.items()}
        self.removed, self.pruned_until, self.counts_removed = dict(other.removed), other.pruned_until, other.counts_removed


def _pick(numbers: Sequence[int], indices: Sequence[int | None]) -> list[int]:
    return [0 if i is None else numbers[i] for i in indices]
