"""A decode step's way to the kernels is short: functions of the package that are under way when one is launched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from on_kernels import kernels_on_cpu
from tiny_models import SMALL, build, codebook_of, tokens

import hf_pqcache
from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.models.names import cache_kwargs

MOST = 7
PACKAGE = str(Path(hf_pqcache.__file__).parent)


class Recorder:
    """In place of a compiled kernel: launches nothing, and notes who has asked."""

    ways: list[list[str]] = []  # noqa: RUF012 - one list for all

    def __init__(self, *_: Any) -> None: ...

    def launch(self, *_: Any) -> None:
        frame, way = sys._getframe(1), ["launch"]
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                way.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
            frame = frame.f_back  # type: ignore[assignment]
        self.ways.append(way[::-1])


@pytest.mark.parametrize("kind", ["codes", "exact"])
def test_few_functions_lie_between_a_model_and_a_launch(kind: str) -> None:
    model, ways = build("llama"), Recorder.ways
    cache = PagedKVCache(model.config) if kind == "exact" else PagedPQCache(model.config, codebook_of("llama"), SMALL)
    with torch.no_grad(), torch.autocast("cpu", torch.float16), kernels_on_cpu(Recorder):
        for count in (20, 1):
            ways.clear()
            model(tokens(1, count), **cache_kwargs(cache))
    assert {way[0] for way in ways} == {"base.update", "interface.__call__"}
    assert max(map(len, ways)) <= MOST, ways
