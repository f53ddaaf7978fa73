"""Lets kernels serve CPU tensors, as if they lay on an H200; what stands in for a compiled kernel is the caller's choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import harness
import pytest
import torch

from hf_pqcache.backends import dispatch, jit, launch


@contextmanager
def kernels_on_cpu(load: Callable[..., Any]) -> Iterator[None]:
    """`load` makes a kernel of what `jit.load` gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_PQCACHE_KERNEL", raising=False)
        patch.setattr(dispatch, "why_no_cuda", lambda *_: None)
        patch.setattr(launch, "device_of", lambda _: harness.EMULATED)
        patch.setattr(jit, "load", load)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
        dispatch._select.cache_clear()
        yield
    dispatch._select.cache_clear()
