"""The processor of a model that takes images beside text: what makes its prompts of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_processor(name: str | Path, revision: str | None = None) -> Any:
    """The processor of a model that takes images. Raises OSError, ValueError or ImportError in one line."""
    from transformers import AutoProcessor

    where = {"local_files_only": True} if Path(name).exists() else {"revision": revision}
    try:
        return AutoProcessor.from_pretrained(name, **where)
    except (OSError, ValueError, ImportError) as error:
        raise type(error)(f"cannot load the processor of {name}: {' '.join(str(error).split())}") from error
