"""Compiled steps on a CPU: a back end that counts graphs, and what the tests compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from hf_pqcache.models.names import cache_kwargs

NEW = 24  # more than a page: steps cross a border


class Graphs:
    """A torch.compile back end that runs the captured graph as it is, and counts how often one was captured."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any, **options: Any) -> Any:
        self.count += 1
        return graph.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return self  # generate copies its settings

    @property
    def config(self) -> CompileConfig:
        config = CompileConfig(fullgraph=True, backend=self, mode=None)
        config._compile_all_devices = True  # generate compiles on accelerators only
        return config


def generate(model: Any, cache: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **cache_kwargs(cache), **(settings | options))
    return out.sequences, torch.stack(out.logits)


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
