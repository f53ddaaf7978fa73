"""Which of several processes this one is, and how their findings come together; one process needs nothing of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def world() -> tuple[int, int]:
    """(index of this process, number of processes) as `accelerate launch` or torchrun set them; (0, 1) without."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return world()[0] == 0


def local_device() -> str | None:
    """The GPU that belongs to this process if there are several processes; None leaves the choice open."""
    import torch

    if world()[1] == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def _state() -> Any:
    """accelerate's state; the first call joins the process group."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


@contextmanager
def main_first() -> Iterator[None]:
    """The main process runs the block before the others do."""
    if world()[1] == 1:
        yield
        return
    with _state().main_process_first():
        yield


def gather(found: dict[int, Any]) -> dict[int, Any]:
    """The union of all processes' dicts, in all processes; waits for the slowest."""
    if world()[1] == 1:
        return found
    from accelerate.utils import gather_object

    _state()
    merged: dict[int, Any] = {}
    for part in gather_object([found]):
        merged.update(part)
    return merged
