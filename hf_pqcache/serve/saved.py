"""An engine's prefixes in a file, from one start of a server to the next; knows no HTTP."""

from __future__ import annotations

import os
from pathlib import Path

from hf_pqcache.serve import log
from hf_pqcache.serve.engine import Engine


def load(engine: Engine, path: Path) -> None:
    """Take up what `save` has written; before anything else is asked. Without a file nothing happens.

    Raises ValueError that names the file if it does not fit, OSError.
    """
    if not path.exists():
        return
    try:
        taken = engine.import_prefixes(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Name another file, or delete this one") from error
    log.tell("prefixes_loaded", **taken._asdict())


def save(engine: Engine, path: Path, most_bytes: int) -> None:
    """Write what the engine has stored of its last texts; at no moment is there half a file. Raises OSError.

    The file says what clients have asked, so it is for its owner's eyes only.
    """
    data = engine.export_prefixes(engine.recent.texts(), most_bytes)
    half = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    log.tell("prefixes_saved", bytes=len(data))
