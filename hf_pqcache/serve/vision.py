"""Chats with images become prompts of a model that takes them; knows pictures and an engine's images, no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_pqcache.batching.images import ImagesExhaustedError, held_prompt, of
from hf_pqcache.models.images import image_token
from hf_pqcache.models.processor import load_processor
from hf_pqcache.serve.errors import ApiError, refused
from hf_pqcache.serve.manager import EngineSettings, image_room
from hf_pqcache.serve.pictures import picture_of


class Vision:
    """A model's processor, if it has one, and whether its images are taken.

    Args:
        model: with an engine of `settings`.

    Attributes:
        why_not: why images are not taken; empty if they are.
    """

    def __init__(self, model: Any, settings: EngineSettings) -> None:
        self.model, self.processor = model, None
        self.why_not = image_room(model, settings)[1]
        if image_token(model.config) is None:
            return
        try:
            self.processor = load_processor(model.config._name_or_path, getattr(model.config, "_commit_hash", None))
        except (OSError, ValueError, ImportError) as error:
            self.why_not = self.why_not or str(error)

    @property
    def has_template(self) -> bool:
        """Whether it makes all chats: its template takes contents as lists of parts, of texts alone as well."""
        return getattr(self.processor, "chat_template", None) is not None

    def prompt(self, messages: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> tuple[list[int], Any]:
        """(token ids of a chat, what keeps its images remembered as long as it lives).

        Raises ApiError where images are not taken, for what is no image, for more than there can be, and where there is no
        room now.
        """
        parts = [_parts(message["content"]) for message in messages]
        if any(part["type"] == "image" for content in parts for part in content) and self.why_not:
            raise refused("messages", f"images are not taken here: {self.why_not}", "images_not_supported")
        if self.processor is None or not self.has_template:
            raise refused("messages", "this model's processor has no chat template, which images need", "no_chat_template")
        told = [
            {**message, "content": [_shown(part) for part in content]} for message, content in zip(messages, parts, strict=True)
        ]
        options = {**template, "add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        made = self.processor.apply_chat_template(told, **options)
        ids = made["input_ids"][0].tolist()
        if (pixels := made.get("pixel_values")) is None:
            return ids, None
        room, count = len(of(self.model).table), ids.count(image_token(self.model.config))  # type: ignore[union-attr]
        if count > room:
            raise refused("messages", f"the images are {count} tokens, and this server takes {room} at a time; show fewer")
        try:
            return held_prompt(self.model, ids, pixels)
        except ImagesExhaustedError as error:
            raise ApiError(503, str(error), code="images_exhausted") from error


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _shown(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "image": picture_of(part["url"], part["field"])} if part["type"] == "image" else part
