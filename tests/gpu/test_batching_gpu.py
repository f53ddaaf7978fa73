"""Continuous batching on a GPU: kernels against plain torch, CUDA graphs and asynchronous steps against neither."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_models import VOCABULARY, llama_config
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
support = pytest.importorskip("hf_pqcache.batching.support")
if support.why_unsupported():
    pytest.skip(support.why_unsupported(), allow_module_level=True)

from hf_pqcache.batching import enable_batching  # noqa: E402

#: How far apart log probabilities may be: a number between two centroids may get either one.
BOUNDS = {torch.float16: 0.25, torch.bfloat16: 0.5}
LENGTHS = (1, 7, 40, 63, 64, 65, 150, 300, 301, 700)
NEW = 60
CODED = {"page_size": 16, "extended_residual": 32}


@pytest.fixture(scope="module", params=list(BOUNDS), ids=str)
def model(request: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(3)).to("cuda", request.param).eval()


def prompts() -> list[list[int]]:
    made = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCABULARY, (n,), generator=made).tolist() for n in LENGTHS]


def run(model: Any, exact: bool, sequences: int = 1, **changes: Any) -> tuple[list[Any], dict[str, Any]]:
    enable_batching(model, exact=exact, **({"page_size": 16} if exact else CODED))
    config = {"num_blocks": 1000, "max_batch_tokens": 256, "max_requests_per_batch": 8, "return_logprobs": True}
    asked = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    asked.num_return_sequences = sequences
    with model.continuous_batching_context_manager(
        asked, continuous_batching_config=ContinuousBatchingConfig(**(config | changes))
    ) as manager:
        names = manager.add_requests(prompts(), max_new_tokens=NEW)
        names += [f"{name}__child#{i}" for name in names for i in range(sequences - 1)]
        found: dict[str, Any] = {}
        while set(names) - set(found) and manager.is_running():
            if (result := manager.get_result(timeout=1)) is not None and result.is_finished():
                found[result.request_id] = result
        stats = manager.stats()
        rows = manager.batch_processor.cache.steps.rows
        assert rows is None or not rows.flags.any(), "a token was not stored"
    assert all(found[name].error is None for name in names)
    return [found[name] for name in names], stats


def distance(ours: list[Any], theirs: list[Any]) -> float:
    """Largest difference of log probabilities up to the first token that differs."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for x, y, token, other in zip(a.logprobs, b.logprobs, a.generated_tokens, b.generated_tokens, strict=True):
            worst = max(worst, abs(x - y)) if token == other else worst
            if token != other:
                break
    return worst


@pytest.fixture(scope="module")
def plain(model: Any) -> dict[bool, list[Any]]:
    """By plain torch, coded and exact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_PQCACHE_KERNEL", "torch")
        return {exact: run(model, exact)[0] for exact in (False, True)}


@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_kernels_agree_with_plain_torch(model: Any, plain: Any, exact: bool, graphs: bool, is_async: bool) -> None:
    ours, stats = run(model, exact, use_cuda_graph=graphs, use_async_batching=is_async)
    assert stats["backend"]["name"] == ("exact" if exact else "tuned")
    assert stats["cuda_graphs"] is graphs
    assert stats["decode_rows"] > 300
    assert distance(ours, plain[exact]) < BOUNDS[model.dtype]
    same = sum(a.generated_tokens[:5] == b.generated_tokens[:5] for a, b in zip(ours, plain[exact], strict=True))
    assert same >= 8


@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
def test_a_small_pool_and_forks_change_nothing(model: Any, plain: Any, exact: bool) -> None:
    """Soft resets compute generated tokens again, one by one."""
    ours, _ = run(model, exact, sequences=2, num_blocks=64, max_batch_tokens=100, allow_block_sharing=False)
    assert distance(ours[: len(LENGTHS)], plain[exact]) < BOUNDS[model.dtype]
    assert distance(ours[len(LENGTHS) :], plain[exact]) < BOUNDS[model.dtype]


def test_defaults_use_graphs_and_asynchronous_steps(model: Any) -> None:
    _, stats = run(model, False, num_blocks=None, max_requests_per_batch=None)
    assert stats["cuda_graphs"]
    assert stats["async"]
    free = torch.cuda.mem_get_info()[0]
    assert free > 1 << 30
