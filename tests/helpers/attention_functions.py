"""An attention function such as users register, and a place to register it that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def registrations() -> Iterator[None]:
    """What is registered within is gone after it."""
    before = dict(AttentionInterface._global_mapping), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    masks = dict(AttentionMaskInterface._global_mapping)
    try:
        yield
    finally:
        for mapping, entries in (
            (AttentionInterface._global_mapping, before[0]),
            (ALL_ATTENTION_FUNCTIONS._local_mapping, before[1]),
            (AttentionMaskInterface._global_mapping, masks),
        ):
            mapping.clear()
            mapping.update(entries)


def cold(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """sdpa at another scale, which needs tensors and no subclass of them."""
    assert type(key) is type(value) is Tensor
    kwargs["scaling"] = 3 * kwargs["scaling"]
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
