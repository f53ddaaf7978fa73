"""Images under continuous batching, which knows tokens only: features of an image get token ids beyond the vocabulary.

Such an id is a row of a table beside the embedding, of fixed size, so that CUDA graphs hold. The same pixels get the same ids,
and ids are never given to other pixels; so prefixes with images are shared as those of text are. Knows models in which an
image is a run of features at token embeddings, with positions and attention of text.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_pqcache.models.images import image_token

#: model_type of models known to be such.
KNOWN = ("llava",)

_OF: WeakKeyDictionary[Any, Images] = WeakKeyDictionary()


class Images:
    """The features of one model's images, until `end`.

    Args:
        model: of KNOWN. rows: most tokens of images.
    """

    def __init__(self, model: Any, rows: int) -> None:
        self.model, self._embedding = model, model.get_input_embeddings()
        weight = self._embedding.weight
        self.table = weight.new_zeros(rows, weight.shape[1], requires_grad=False)
        self.used, self._known = 0, dict[bytes, range]()
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        plain, table, first = self._embedding.forward, self.table, self._embedding.num_embeddings

        def forward(ids: Tensor) -> Tensor:
            is_image = ids >= first
            found = plain(ids.masked_fill(is_image, 0))
            return torch.where(is_image[..., None], table[(ids - first).clamp(min=0)], found)

        self._embedding.forward = forward

    def end(self) -> None:
        del self._embedding.forward

    def ids_of(self, pixels: Tensor) -> list[range]:
        """Token ids of images (n, ...), computing the features of those that are new. They are there when this returns."""
        with self._lock:
            return self._ids_of(pixels)

    def _ids_of(self, pixels: Tensor) -> list[range]:
        keys = [hashlib.blake2b(one.detach().cpu().contiguous().view(torch.uint8).numpy()).digest() for one in pixels]
        new = [i for i, key in enumerate(keys) if key not in self._known and key not in keys[:i]]
        if new:
            with torch.no_grad():
                given = self.model.get_image_features(pixel_values=pixels[new].to(self.table.device, self.table.dtype))
            for i, features in zip(new, getattr(given, "pooler_output", given), strict=True):
                self._known[keys[i]] = self._add(features.reshape(-1, self.table.shape[1]))
            if self.table.device.type == "cuda":  # the engine reads them on a stream of its own
                torch.cuda.current_stream(self.table.device).synchronize()
        return [self._known[key] for key in keys]

    def _add(self, features: Tensor) -> range:
        begin, end = self.used, self.used + len(features)
        if end > len(self.table):
            raise ValueError(
                f"there is room for {len(self.table)} tokens of images, {begin} are taken, and {len(features)} more do not "
                "fit; raise images= of enable_batching. Calling it again forgets all images"
            )
        self.table[begin:end], self.used = features, end
        first = self._embedding.num_embeddings
        return range(first + begin, first + end)


def why_unfit(model: Any) -> str | None:
    """Why a model's images cannot be served over blocks, if so."""
    name, config = type(model).__name__, model.config
    if not hasattr(model, "get_image_features"):
        return f"{name} takes no images"
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if "mrope_section" in str(rope):
        return f"{name} gives the tokens of an image positions in several dimensions (M-RoPE), and an engine counts tokens"
    takes = inspect.signature(model.forward).parameters
    if "token_type_ids" in takes or getattr(config.get_text_config(), "use_bidirectional_attention", None):
        return f"{name} lets the tokens of an image attend to later ones, and an engine's attention is causal"
    if config.model_type not in KNOWN:
        return f"what {name} makes of images is not known here; known are models of type {', '.join(KNOWN)}"
    return None


def begin(model: Any, rows: int) -> None:
    """Let a model have images. Raises ValueError for one that does not fit."""
    if rows < 1:
        raise ValueError(f"images={rows}: give the number of tokens that images may have in all, 576 for each of LLaVA-1.5")
    if why := why_unfit(model):
        raise ValueError(f"{why}; use generate for its images")
    _OF[model] = Images(model, rows)


def end(model: Any) -> None:
    if (images := _OF.pop(model, None)) is not None:
        images.end()


def image_prompt(model: Any, input_ids: Sequence[int] | Tensor, pixel_values: Tensor) -> list[int]:
    """A prompt with images, as an engine takes it: what `add_request` and `generate_batch` are given.

    Args:
        model: after `enable_batching(model, images=...)`.
        input_ids: of one prompt, as the model's processor makes them: the image token for each feature of each image.
        pixel_values: (n, ...) of its images, in their order, as the processor makes them.

    Raises ValueError if there are more or fewer image tokens than features, or no room.
    """
    images = _OF.get(model)
    if images is None:
        raise ValueError("the model has no room for images: call enable_batching(model, images=...) first")
    ids = [int(token) for token in (input_ids.flatten().tolist() if isinstance(input_ids, Tensor) else input_ids)]
    place: Any = image_token(model.config)
    found = [token for run in images.ids_of(pixel_values) for token in run]
    if (count := ids.count(place)) != len(found):
        raise ValueError(f"the prompt has {count} image tokens, and its {len(pixel_values)} images have {len(found)} features")
    following = iter(found)
    return [next(following) if token == place else token for token in ids]
