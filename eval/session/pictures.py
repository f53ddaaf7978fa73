"""Images with text from a file of the user's, as a model's processor makes them; knows no command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_pqcache.compressors.training import Sample
from hf_pqcache.models.images import image_token


def samples_of(path: Path, processor: Any, config: Any, answer: int) -> list[Sample]:
    """A sample of each line {"image": FILE or [FILE, ...], "text": TEXT} of `path`, the last `answer` tokens to be predicted.

    Image files are looked for beside `path`; a line may have none. The text has the processor's mark where an image goes.

    Raises ValueError naming the line that is wrong, ImportError without Pillow.
    """
    if image_token(config) is None:
        raise ValueError(f"a model of type {config.model_type} takes no images: give --text in place of --images")
    found = []
    for number, line in _lines(path):
        try:
            found.append(_sample(json.loads(line), path.parent, processor, image_token(config), answer))
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ValueError(f'{path}, line {number}: {error}; a line is {{"image": FILE, "text": TEXT}}') from None
    if not found:
        raise ValueError(f'{path} is empty: a line is {{"image": FILE, "text": TEXT}}')
    return found


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as lines:
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _sample(line: Any, folder: Path, processor: Any, token: int | None, answer: int) -> Sample:
    if not isinstance(line, dict) or not isinstance(line.get("text"), str):
        raise ValueError("there is no text")
    names = line.get("image", [])
    pictures = [_picture(folder / name) for name in ([names] if isinstance(names, str) else names)]
    made = processor(text=line["text"], images=pictures or None, return_tensors="pt")
    ids, pixels = made["input_ids"], made.get("pixel_values")
    prompt = ids.shape[1] - answer
    if prompt < 2:
        raise ValueError(f"it has {ids.shape[1]} tokens, of which {answer} are to be predicted: use a smaller --answer")
    if (ids[:, prompt:] == token).any():
        raise ValueError(f"an image is among its last {answer} tokens, which are to be predicted: use a smaller --answer")
    return Sample(ids, prompt, pixels)


def _picture(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("images need Pillow; type: pip install pillow") from None
    with Image.open(path) as picture:
        return picture.convert("RGB")
