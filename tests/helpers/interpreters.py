"""Finds the Pythons of this machine by version, wherever they were installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def _says(*command: str) -> str:
    """Its output; empty where it fails, as the shims of pyenv do for a version that is not chosen."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _candidates(version: str) -> Iterator[str]:
    yield sys.executable
    yield f"python{version}"
    if shutil.which("pyenv"):
        root = _says("pyenv", "root")
        yield from sorted(str(path) for path in Path(root).glob(f"versions/{version}*/bin/python")) if root else ()
    if shutil.which("uv"):
        yield _says("uv", "python", "find", version)
    if shutil.which("py"):  # Windows
        yield _says("py", f"-{version}", "-c", "import sys; print(sys.executable)")


def find(version: str) -> str | None:
    """A Python of this version ("3.12") that runs; None if there is none."""
    for candidate in filter(None, _candidates(version)):
        ask = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2], sys._base_executable or sys.executable)"
        said = _says(candidate, "-c", ask).partition(" ")
        if said[0] == version:
            return said[2]
    return None
