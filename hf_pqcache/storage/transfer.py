"""One sequence taken out of a storage as tensors, and put into another one as it was; knows no file and no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from hf_pqcache.backends import torch_backend
from hf_pqcache.config import PQConfig, Side
from hf_pqcache.pages.codec import CodedPages
from hf_pqcache.pages.layer_kv import LayerView
from hf_pqcache.storage.storage import Storage


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """What one layer stores of a sequence.

    Attributes:
        length: its tokens.
        reused: its tokens before this one have lost their window slot, as `Lengths` counts them.
        key_pages, value_pages: (n, ...), as `PageCodec` stores them.
        window_keys, window_values: (H, t, d): the sinks, then the tokens from `first` on, see `exact_tokens`.
        equaliser: float32 (H, d) that the codes were made with; None without codes.
        removed: positions of the prompt that a press has pruned, see `Lengths`.
    """

    length: int
    reused: int
    key_pages: Tensor
    value_pages: Tensor
    window_keys: Tensor
    window_values: Tensor
    equaliser: Tensor | None = None
    removed: int = 0

    def pages(self, which: Side) -> Tensor:
        return self.key_pages if which == "key" else self.value_pages

    def window(self, which: Side) -> Tensor:
        return self.window_keys if which == "key" else self.window_values

    @property
    def num_pages(self) -> int:
        return self.key_pages.shape[0]


def exact_tokens(config: PQConfig, length: int, reused: int) -> tuple[int, int]:
    """(sinks, first): of `length` tokens the window has the first `sinks`, and all from `first` on.

    Those are what no page has, and before them such as are in pages and still have their slot.
    """
    sinks = min(length, config.sink_tokens)
    return sinks, max(sinks, min(reused, sinks + config.coded_tokens(length)))


def take(storage: Storage, layer: int, seq: int) -> StoredLayer:
    """What `layer` stores of a sequence, in tensors of their own on the layer's device."""
    view, lengths = storage.layers.views[layer], storage.lengths
    length = lengths.seq_lens(layer)[seq]
    reused = lengths.reused[layer][seq]
    sinks, first = exact_tokens(view.config, length, reused)
    numbers = view.page_numbers(seq, 0, view.coded_tokens(length) // view.config.page_size)
    view.store.prefetch()
    pages, windows = [], []
    for which in get_args(Side):
        parts = [torch_backend.read_window(view, which, seq, *span) for span in ((0, sinks), (first, length))]
        windows.append(torch.cat(parts, dim=1))
        spec = view.codec(which).spec
        empty = torch.empty((0, *spec.shape), dtype=spec.dtype, device=view.device)
        pages.append(view.store.read(which, numbers).clone() if numbers else empty)
    equaliser = view.key_codec.equaliser.clone() if numbers and isinstance(view.key_codec, CodedPages) else None
    removed = lengths.removed.get(layer, 0)
    return StoredLayer(length, reused, pages[0], pages[1], windows[0], windows[1], equaliser, removed)


def check_equalisers(storage: Storage, new: Mapping[int, StoredLayer]) -> None:
    """Raises ValueError where pages of the storage were made with another equaliser: one serves all pages of a layer."""
    for layer, stored in new.items():
        view = storage.layers.views.get(layer)
        if view is None or stored.equaliser is None or not view.is_equalised or not isinstance(view.key_codec, CodedPages):
            continue
        if not torch.equal(view.key_codec.equaliser, stored.equaliser.to(view.device)):
            raise ValueError(
                f"layer {layer}: the keys of this cache are equalised by those of its first sequence, and the exported ones by "
                "others. Import into a cache without tokens; caches that begin with the same imported sequence, such as a "
                "common prefix, can exchange all that follow"
            )


def put(storage: Storage, seq: int, new: Mapping[int, StoredLayer], pruned: tuple[int, bool] = (0, True)) -> None:
    """Store a sequence at an empty place whose layers are open.

    pruned: `pruned_until` and `counts_removed` of `Lengths`; a sequence of which something was removed is the only one.

    Raises PagesExhaustedError, CacheOutOfMemoryError; nothing has changed then.
    """
    views = {layer: storage.layers.views[layer] for layer in new}
    with storage.reservation.given_back_on_failure():
        storage.reservation.reserve_pages(seq, max((stored.num_pages for stored in new.values()), default=0))
        windows = {layer: _windows(stored, views[layer]) for layer, stored in new.items()}
        for layer, stored in new.items():
            _write_pages(views[layer], seq, stored)
    for layer, stored in new.items():  # nothing of this can fail
        view = views[layer]
        sinks, first = exact_tokens(view.config, stored.length, stored.reused)
        for which, x in zip(get_args(Side), windows[layer], strict=True):
            torch_backend.write_window(view, which, seq, 0, x[:, :sinks])
            torch_backend.write_window(view, which, seq, first, x[:, sinks:])
        if stored.equaliser is not None and isinstance(view.key_codec, CodedPages):
            view.key_codec.equaliser.copy_(stored.equaliser)
            view.is_equalised = True
        if stored.removed:
            storage.lengths.note_removed(layer, stored.removed, *pruned)
        storage.lengths.place(layer, seq, stored.length, stored.reused)
        storage.lengths.publish_layer(layer)
    storage.lengths.publish_ahead()


def _windows(stored: StoredLayer, view: LayerView) -> list[Tensor]:
    return [stored.window(which).to(view.device) for which in get_args(Side)]


def _write_pages(view: LayerView, seq: int, stored: StoredLayer) -> None:
    numbers = view.page_numbers(seq, 0, stored.num_pages)
    if not numbers:
        return
    view.store.prefetch()
    for which in get_args(Side):
        view.store.write(which, numbers, stored.pages(which).to(view.device))
    view.store.write_back(numbers)
