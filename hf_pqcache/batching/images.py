"""Images under continuous batching, which knows tokens only: features of an image get token ids beyond the vocabulary.

Such an id is a row of a table beside the embedding, of fixed size, so that CUDA graphs hold. The same pixels get the same ids
while they are remembered, and ids are never given to other pixels; so prefixes with images are shared as those of text are.
Rows are taken in turn, the oldest image's first, but never one that a request under way may still have to look at. Knows models
in which an image is a run of features at token embeddings, with positions and attention of text.
"""

from __future__ import annotations

import hashlib
import inspect
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor

from hf_pqcache.batching.support import base_of
from hf_pqcache.models.images import image_token

#: model_type of models known to be such.
KNOWN = ("llava",)
#: Token ids are int32 in the engine.
MOST_IDS = 2**31

_OF: WeakKeyDictionary[Any, Images] = WeakKeyDictionary()


class ImagesExhaustedError(ValueError):
    """There is no room for an image now, or one that a request shows has had to make room."""


class Images:
    """The features of one model's images, until `end`.

    Args:
        model: of KNOWN. rows: tokens of images that are remembered at a time.
    """

    def __init__(self, model: Any, rows: int) -> None:
        self.model, self._embedding = model, model.get_input_embeddings()
        weight = self._embedding.weight
        self.table = weight.new_zeros(rows, weight.shape[1], requires_grad=False)
        self.first = int(self._embedding.num_embeddings)  # id of the first row, when it is used first
        self._next = 0  # id of the next token of an image, less `first`; its row is what is left of it by the number of rows
        self._known: dict[bytes, range] = {}  # of pixels, what is in the table; oldest first
        self._held: Counter[int] = Counter()  # by a range's start, requests that may look at it
        self._lock = threading.RLock()  # a hold may end in the middle of anything, as the last reference to a request goes
        self._begin()

    def _begin(self) -> None:
        plain, table, first = self._embedding.forward, self.table, self.first

        def forward(ids: Tensor) -> Tensor:
            is_image = ids >= first
            found = plain(ids.masked_fill(is_image, 0))
            return torch.where(is_image[..., None], table[(ids - first).clamp(min=0) % len(table)], found)

        self._embedding.forward = forward

    def end(self) -> None:
        del self._embedding.forward

    def ids_of(self, pixels: Tensor) -> tuple[list[range], Hold]:
        """Token ids of images (n, ...), and what keeps these; those that are new are looked at before this returns.

        Raises ImagesExhaustedError where requests under way need the room.
        """
        keys = [hashlib.blake2b(one.detach().cpu().contiguous().view(torch.uint8).numpy()).digest() for one in pixels]
        kept = Hold(self, ())  # what is known must not make room for the others
        with self._lock:
            new = [i for i, key in enumerate(keys) if not self._keep(key, kept) and key not in keys[:i]]
        if new:
            with torch.no_grad():
                given = self.model.get_image_features(pixel_values=pixels[new].to(self.table.device, self.table.dtype))
            for i, features in zip(new, getattr(given, "pooler_output", given), strict=True):
                with self._lock:
                    if not self._keep(keys[i], kept):
                        self._known[keys[i]] = self._add(features.reshape(-1, self.table.shape[1]))
                        self._keep(keys[i], kept)
            if self.table.device.type == "cuda":  # the engine reads them on a stream of its own
                torch.cuda.current_stream(self.table.device).synchronize()
        with self._lock:
            found = [self._known[key] for key in keys]
        return [range(self.first + one.start, self.first + one.stop) for one in found], kept

    def _keep(self, key: bytes, kept: Hold) -> bool:
        """Whether an image is known; it is kept then."""
        if key not in self._known:
            return False
        kept.add(self._known[key].start)
        return True

    def _add(self, features: Tensor) -> range:
        rows, count = len(self.table), len(features)
        found = self._room(count)
        for key, other in list(self._known.items()):
            if _meet(found, other, rows):
                del self._known[key]
        if found.stop > MOST_IDS - self.first:
            raise ImagesExhaustedError(f"all {MOST_IDS:,} token ids have been given away: call enable_batching again")
        at = found.start % rows
        self.table[at : at + count], self._next = features, found.stop
        return found

    def _room(self, count: int) -> range:
        """The next `count` ids whose rows nobody needs, in one piece."""
        rows, start = len(self.table), self._next
        held = [other for other in self._known.values() if self._held[other.start]]
        while start < self._next + rows and count <= rows:
            found = range(start, start + count)
            if start % rows + count > rows:
                start += rows - start % rows
            elif hit := next((other for other in held if _meet(found, other, rows)), None):
                start += (hit.stop - start) % rows or rows
            else:
                return found
        raise ImagesExhaustedError(
            f"there is room for {rows} tokens of images, {sum(map(len, held))} are of requests under way, and {count} more do "
            "not fit; ask again once some have ended, or raise images= of enable_batching"
        )

    def stats(self) -> dict[str, int]:
        """Tokens of images: room for them, remembered, and of those what requests under way may look at."""
        with self._lock:
            known = list(self._known.values())
            held = sum(len(one) for one in known if self._held[one.start])
        return {"room": len(self.table), "remembered": sum(map(len, known)), "held": held}

    def hold(self, ids: Iterable[int]) -> Hold | None:
        """Keep the images that a prompt shows; None if it shows none. Raises ImagesExhaustedError if they are forgotten."""
        shown = {token - self.first for token in ids if token >= self.first}
        if not shown:
            return None
        with self._lock:
            found = [known for known in self._known.values() if not shown.isdisjoint(known)]
            if not shown.issubset(token for known in found for token in known):
                raise ImagesExhaustedError(
                    "an image of this prompt has been forgotten, others came meanwhile: call image_prompt again, and if this "
                    "happens often, raise images= of enable_batching"
                )
            return Hold(self, [known.start for known in found])


class Hold:
    """Images that are not forgotten while this lives. A copy holds them, too: the engine copies a request that it forks.

    Args:
        starts: of their ranges, as in `Images._known`.
    """

    def __init__(self, images: Images, starts: Iterable[int]) -> None:
        self._images, self._starts = images, list[int]()
        for start in starts:
            self.add(start)
        finalize(self, _release, images, self._starts)

    def add(self, start: int) -> None:
        with self._images._lock:
            self._starts.append(start)
            self._images._held[start] += 1

    def __deepcopy__(self, memo: Any) -> Hold:
        return Hold(self._images, self._starts)


def _release(images: Images, starts: list[int]) -> None:
    with images._lock:
        images._held -= Counter(starts)


def _meet(a: range, b: range, rows: int) -> bool:
    """Whether two runs of ids share a row; neither goes over the table's end."""
    at, other = a.start % rows, b.start % rows
    return at < other + len(b) and other < at + len(a)


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


def of(model: Any) -> Images | None:
    """The images of a model that `enable_batching(model, images=...)` has made room for."""
    return _OF.get(base_of(model))


def image_prompt(model: Any, input_ids: Sequence[int] | Tensor, pixel_values: Tensor) -> list[int]:
    """A prompt with images, as an engine takes it: what `add_request` and `generate_batch` are given.

    Args:
        model: after `enable_batching(model, images=...)`.
        input_ids: of one prompt, as the model's processor makes them: the image token for each feature of each image.
        pixel_values: (n, ...) of its images, in their order, as the processor makes them.

    Its images are remembered while a request with it is under way, and as long as there is room. A request whose images have
    been forgotten before it came fails alone, and says so.

    Raises ValueError if there are more or fewer image tokens than features, ImagesExhaustedError if requests under way have
    taken all room.
    """
    return held_prompt(model, input_ids, pixel_values)[0]


def held_prompt(model: Any, input_ids: Sequence[int] | Tensor, pixel_values: Tensor) -> tuple[list[int], Hold]:
    """As `image_prompt`, with what keeps its images remembered as long as it lives."""
    images, base = of(model), base_of(model)
    if images is None:
        raise ValueError("the model has no room for images: call enable_batching(model, images=...) first")
    ids = [int(token) for token in (input_ids.flatten().tolist() if isinstance(input_ids, Tensor) else input_ids)]
    place: Any = image_token(base.config)
    runs, kept = images.ids_of(pixel_values)
    found = [token for run in runs for token in run]
    if (count := ids.count(place)) != len(found):
        raise ValueError(f"the prompt has {count} image tokens, and its {len(pixel_values)} images have {len(found)} features")
    following = iter(found)
    return [next(following) if token == place else token for token in ids], kept
