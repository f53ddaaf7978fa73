"""The error of a cache for which there is no memory left; knows nothing that a cache stores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hf_pqcache.errors import CacheOutOfMemoryError


@contextmanager
def out_of_memory_as_pqc004(what: str) -> Iterator[None]:
    """Turns an out-of-memory error of a device or the host into CacheOutOfMemoryError (PQC004)."""
    try:
        yield
    except RuntimeError as error:
        # The CPU and pinned memory have no error class of their own.
        says_so = any(words in str(error) for words in ("out of memory", "can't allocate memory"))
        if not says_so and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise CacheOutOfMemoryError(
            f"there is no memory left for {what}; use fewer bits or sequences, offload=True, or free memory. ({error})"
        ) from error
