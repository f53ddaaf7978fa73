"""A decode step's way to the kernels is short: functions of the package that are under way when one is launched."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from tiny_models import SMALL, build, codebook_of, tokens

import hf_pqcache
from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.backends import jit, launch, selection
from hf_pqcache.models.names import cache_kwargs

MOST = 7
PACKAGE = str(Path(hf_pqcache.__file__).parent)


class Recorder:
    """In place of a compiled kernel: launches nothing, and notes who has asked."""

    ways: list[list[str]] = []  # noqa: RUF012 - one list for all

    def __init__(self, spec: Any, *_: Any) -> None:
        self.entry = spec.entry

    def launch(self, *_: Any) -> None:
        frame, way = sys._getframe(1), ["launch"]
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                way.append(frame.f_code.co_qualname)
            frame = frame.f_back  # type: ignore[assignment]
        self.ways.append(way[::-1])


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    monkeypatch.delenv("HF_PQCACHE_KERNEL", raising=False)
    monkeypatch.setattr(selection, "_why_no_cuda", lambda *_: None)
    monkeypatch.setattr(launch, "device_of", lambda _: harness.EMULATED)
    monkeypatch.setattr(jit, "load", Recorder)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    selection._select.cache_clear()
    Recorder.ways = []
    yield Recorder.ways
    selection._select.cache_clear()


@pytest.mark.parametrize("kind", ["codes", "exact"])
def test_few_functions_lie_between_a_model_and_a_launch(kind: str, ways: list[list[str]]) -> None:
    model = build("llama")
    half = torch.float16
    cache = PagedKVCache(model.config) if kind == "exact" else PagedPQCache(model.config, codebook_of("llama"), SMALL)
    with torch.no_grad(), torch.autocast("cpu", half):
        for count in (20, 1):
            ways.clear()
            model(tokens(1, count), **cache_kwargs(cache))
    assert {way[0] for way in ways} == {"PagedCache.update", "Dispatcher.__call__"}
    assert max(map(len, ways)) <= MOST, ways
