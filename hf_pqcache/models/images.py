"""Which tokens of a prompt stand for features of an image; knows configs and token ids only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

#: What a press is told them by, among the arguments of an attention module: bool (B, T) on the host, None where it is not
#: known though there may be some, absent for a model that takes no images.
IMAGE_TOKENS = "image_tokens"


def image_token(config: Any) -> int | None:
    """The id that stands for a feature of an image in a model's prompts; None if it takes no images."""
    found = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if found is None else found


def told(config: Any, input_ids: Tensor | None) -> dict[str, Any]:
    """{IMAGE_TOKENS: ...} for a prompt's input_ids (B, T), None where embeddings came. Waits for the device."""
    token = image_token(config)
    if token is None:
        return {}
    return {IMAGE_TOKENS: None if input_ids is None else (input_ids == token).cpu()}
