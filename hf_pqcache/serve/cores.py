"""Cores of this machine for processes that shall not share them (Linux); knows no server."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

import torch

T = TypeVar("T")

#: Locks of this process: they last as long as it does, however it ends.
_HELD: list[IO[str]] = []


def claim() -> int:
    """A core that nobody has claimed, until this process ends. Raises RuntimeError if there is none."""
    allowed = sorted(os.sched_getaffinity(0))
    folder = Path(tempfile.gettempdir()) / f"pqcache-cores-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for core in allowed:
        lock = (folder / str(core)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        _HELD.append(lock)
        return core
    raise RuntimeError(f"each of {len(allowed)} cores belongs to a process already: start fewer replicas, or leave out --pin")


def pinned(load: Callable[[], T]) -> T:
    """What `load` makes, in a process that has a core of its own from now on: all its threads, and those that it will start.

    Raises RuntimeError as `claim`.
    """
    core = claim()
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})
    torch.set_num_threads(1)
    return load()
