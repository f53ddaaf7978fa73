"""Continuous batching on kernels, run on a CPU: rows in any order, beside prompts, and computed again after a soft reset."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import harness
import pytest
import tiny_models
import torch
from engine_runs import CODED, EXACT, engine, greedy, prompts, results
from on_kernels import kernels_on_cpu

from hf_pqcache.batching import disable_batching, enable_batching, support

if why := support.why_unsupported():
    pytest.skip(why, allow_module_level=True)
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is built with g++")
NEW = 8


@pytest.fixture(scope="module")
def model() -> Any:
    return copy.deepcopy(tiny_models.build("llama")).to(torch.float16)  # others go on with the float32 one


def run(model: Any, exact: bool, sequences: int = 1, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
    enable_batching(model, exact=exact, **(EXACT if exact else CODED))
    asked = [list(prompts()[i]) for i in (2, 6, 8, 9)]
    config = engine(return_logprobs=True, max_requests_per_batch=3, **changes)
    with model.continuous_batching_context_manager(greedy(sequences), continuous_batching_config=config) as manager:
        names = [manager.add_request(prompt, max_new_tokens=NEW + 2 * i) for i, prompt in enumerate(asked)]
        names += [f"{name}__child#{i}" for name in names for i in range(sequences - 1)]
        found = results(manager, set(names), seconds=200)
        stats = manager.stats()
        rows = manager.batch_processor.cache.steps.rows
        assert rows is None or not rows.flags.any(), "a token was not stored"
    disable_batching(model)
    return [found[name] for name in names], stats


def test_kernels_read_a_prefix_from_elsewhere_as_one_of_their_own(model: Any) -> None:
    def ask(manager: Any, prompt: list[int]) -> list[int]:
        found = results(manager, {name := manager.add_request(prompt, max_new_tokens=6)}, seconds=200)[name]
        assert found.error is None
        return list(found.generated_tokens)

    def managed(model: Any) -> Any:
        config = engine(allow_block_sharing=True, max_requests_per_batch=2, num_blocks=40)
        return enable_batching(model, **CODED).continuous_batching_context_manager(greedy(), continuous_batching_config=config)

    text = list(prompts()[9])
    with kernels_on_cpu(harness.EmulatedKernel), managed(model) as there, managed(copy.deepcopy(model)) as here:
        ask(there, text)
        data = there.export_prefixes([text])
        assert here.import_prefixes(data).imported >= 2
        assert ask(here, [*text, 5, 6]) == ask(there, [*text, 5, 6])
        assert here.export_prefixes([text]) == data
        assert there.stats()["backend"]["name"] != "torch"
        assert there.stats()["prefix_tokens"] == here.stats()["prefix_tokens"] > 0
    disable_batching(model)


@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
def test_kernels_serve_an_engine_as_plain_torch_does(model: Any, exact: bool) -> None:
    plain, _ = run(model, exact)
    with kernels_on_cpu(harness.EmulatedKernel):
        ours, stats = run(model, exact)
        forked, _ = run(model, exact, sequences=2, num_blocks=6, max_batch_tokens=40)
    assert stats["backend"]["name"] in ("tuned", "generic", "exact")
    for found in (ours, forked[: len(plain)], forked[len(plain) :]):
        for a, b in zip(found, plain, strict=True):
            assert a.error is None
            assert a.generated_tokens == b.generated_tokens
            assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < 0.05
