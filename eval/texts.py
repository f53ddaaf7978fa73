"""Reads text files; a file that is no UTF-8 text is named. Knows no task."""

from __future__ import annotations

import lzma
from pathlib import Path


def read_text(path: str | Path) -> str:
    """Contents of a UTF-8 text file, plain or .xz. Raises ValueError, naming the file, for anything else."""
    path = Path(path)
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
        return data.decode("utf-8")
    except lzma.LZMAError as error:
        raise ValueError(f"{path} is no .xz file, or is cut short: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text: byte {error.start} is {data[error.start]:#04x}; convert it first"
        ) from error
