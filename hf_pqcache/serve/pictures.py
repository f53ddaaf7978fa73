"""Images of a chat, as OpenAI's clients send them: a data: URL becomes a picture; knows no model, and fetches nothing."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import Any

from hf_pqcache.serve.errors import ApiError, refused

#: Pixels of one image: a small file may unpack to gigabytes.
MOST_PIXELS = 64 * 2**20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DATA = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


def picture_of(url: str, name: str) -> Any:
    """A PIL image, RGB, of a data: URL; of an animated one the first. name: of the field, for messages. Raises ApiError."""
    if (begin := _DATA.match(url)) is None:
        given = "data:" if url.startswith("data:") else url.split(":", 1)[0][:20] + ":" if ":" in url[:20] else "no scheme"
        raise refused(
            name,
            f"{name}.url: only data:image/png;base64,... and its like are taken, got {given}; this server fetches nothing",
            "unsupported_image_url",
        )
    try:
        return _decoded(base64.b64decode(url[begin.end() :], validate=True), name)
    except binascii.Error as error:
        raise refused(name, f"{name}.url is no base64: {error}") from None


def _decoded(data: bytes, name: str) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ApiError(500, "images need Pillow where the server runs; type: pip install pillow") from None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if (pixels := picture.width * picture.height) > MOST_PIXELS:
                raise refused(name, f"{name} has {pixels:,} pixels; {MOST_PIXELS:,} at most are taken")
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        told = " ".join(str(error).split())[:200]
        raise refused(name, f"{name} is no image of {', '.join(FORMATS)} that can be read: {told}") from None
