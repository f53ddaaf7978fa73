"""A compressed layer of a model whose layers keep a recurrent state besides their tokens, such as Falcon-H1 and Zamba2.

The state is transformers' own, in a layer of its own here; all that is asked of it goes there.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from hf_pqcache.cache.layer import PagedLayer


def new_states(count: int) -> LinearAttentionLayer:
    """So many states of a layer, without content."""
    return LinearAttentionLayer(number_of_states=count)


class HybridLayer(PagedLayer):
    """Keys and values in pages, as in PagedLayer; conv and recurrent states as transformers keeps them, in `states`."""

    supports_early_init = False

    def __init__(self, *args: Any, number_of_states: int) -> None:
        self.states = new_states(number_of_states)
        super().__init__(*args)

    def __getattr__(self, name: str) -> Any:
        """conv_states, has_previous_state, update_conv_state and the like."""
        if name == "states":  # not there yet
            raise AttributeError(name)
        return getattr(self.states, name)

    @property
    def record_past(self) -> bool:
        return self.states.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.states.record_past = value

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.states.is_croppable

    def stock(self) -> DynamicLayer:
        """transformers' own layer with these states, and no tokens."""
        layer = LinearAttentionAndFullAttentionLayer(number_of_states=self.states.number_of_states)
        vars(layer).update(vars(self.states))
        return layer


# transformers asks whether a layer is one of these before it asks for states; as a base class it would bring its own
# `reset`, `crop`, `device` and so on beside those of PagedLayer.
LinearAttentionCacheLayerMixin.register(HybridLayer)


def paged_layer(stock: DynamicLayer, *args: Any) -> PagedLayer:
    """The compressed layer in place of one of transformers'; `args` as PagedLayer takes them."""
    if isinstance(stock, LinearAttentionCacheLayerMixin):
        return HybridLayer(*args, number_of_states=stock.number_of_states)
    return PagedLayer(*args)
