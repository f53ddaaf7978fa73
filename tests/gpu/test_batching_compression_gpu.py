"""Prompts stored on a CUDA stream beside later steps: those of plain steps, with events in place and not without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_models import VOCABULARY, llama_config
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
support = pytest.importorskip("hf_pqcache.batching.support")
if support.why_unsupported():
    pytest.skip(support.why_unsupported(), allow_module_level=True)

from hf_pqcache.batching import Partition, enable_batching  # noqa: E402
from hf_pqcache.batching.lanes import StreamLane  # noqa: E402

#: How far apart log probabilities may be: batches of other sizes round otherwise, and a code may be its neighbour.
BOUND = 0.25
LENGTHS = (300, 150, 301, 64, 150, 300, 220, 90, 160)
NEW = 40
CYCLES = 60_000_000  # some 30 ms, longer than several steps


class Sleepy(StreamLane):
    """A stream on which each job begins late. `is_lying`: tickets say done at once, and steps wait for nothing."""

    def __init__(self, is_lying: bool = False) -> None:
        super().__init__(torch.cuda.Stream(), "sleepy")
        self.is_lying = is_lying

    def run(self, job: Callable[[], None]) -> Any:
        def late() -> None:
            torch.cuda._sleep(CYCLES)
            job()

        ticket = super().run(late)
        return Lie(job, ticket) if self.is_lying else ticket


class Lie:
    def __init__(self, job: Any, ticket: Any) -> None:
        self.kept = job, ticket

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(3)).to("cuda", torch.float16).eval()


def run(model: Any, compress: Any, exact: bool = False, partition: Partition | None = None, **changes: Any) -> tuple[Any, Any]:
    """Outputs of all prompts, and what became of them."""
    made = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, VOCABULARY, (n,), generator=made).tolist() for n in LENGTHS]
    sizes = {"page_size": 16} if exact else {"page_size": 16, "extended_residual": 32}
    enable_batching(model, exact=exact, compress=compress, partition=partition, **sizes)
    config = {"num_blocks": 400, "max_batch_tokens": 320, "max_requests_per_batch": 8, "return_logprobs": True}
    asked = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    with model.continuous_batching_context_manager(
        asked, continuous_batching_config=ContinuousBatchingConfig(**config | {"allow_block_sharing": False} | changes)
    ) as manager:
        # The first one makes the equaliser: the same one in every run.
        names = [manager.add_request(prompts[0], max_new_tokens=NEW)]
        found = {names[0]: manager.get_result(names[0])}
        names += manager.add_requests(prompts[1:], max_new_tokens=NEW)
        while set(names) - set(found) and manager.is_running():
            if (result := manager.get_result(timeout=1)) is not None and result.is_finished():
                found[result.request_id] = result
        stats = manager.stats()
    assert stats["slots"]["free"] == stats["slots"]["total"]
    assert all(found[name].error is None for name in names)
    return [found[name] for name in names], stats["compression"]


def distance(ours: list[Any], theirs: list[Any]) -> float:
    """Largest difference of log probabilities up to the first token that differs."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for x, y, token, other in zip(a.logprobs, b.logprobs, a.generated_tokens, b.generated_tokens, strict=True):
            if token != other:
                break
            worst = max(worst, abs(x - y))
    return worst


def agreeing(ours: list[Any], theirs: list[Any]) -> float:
    """Share of answers' first ten tokens that agree: near ties may fall otherwise, blocks that nobody wrote agree in little."""
    pairs = [(a.generated_tokens[:10], b.generated_tokens[:10]) for a, b in zip(ours, theirs, strict=True)]
    return sum(x == y for a, b in pairs for x, y in zip(a, b, strict=True)) / (10 * len(pairs))


@pytest.fixture(scope="module")
def within(model: Any) -> dict[bool, Any]:
    return {exact: run(model, "inline", exact)[0] for exact in (False, True)}


@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_late_jobs_change_nothing(model: Any, within: Any, exact: bool, graphs: bool, is_async: bool) -> None:
    found, stats = run(model, Sleepy(), exact, use_cuda_graph=graphs, use_async_batching=is_async)
    assert distance(found, within[exact]) < BOUND
    assert agreeing(found, within[exact]) > 0.7
    assert stats["jobs"] >= len(LENGTHS) - 1
    assert stats["beside"] > 0
    assert stats["failed_jobs"] == stats["waiting_tokens"] == 0


def test_a_missing_wait_is_caught(model: Any, within: Any) -> None:
    found, _ = run(model, Sleepy(is_lying=True))
    assert agreeing(found, within[False]) < 0.6
    torch.cuda.synchronize()


@pytest.mark.parametrize("partition", [None, Partition(0.25, main_stream=True), Partition(0.2, 0.5, main_stream=True)])
def test_a_divided_device_changes_nothing(model: Any, within: Any, partition: Partition | None) -> None:
    found, stats = run(model, "partition", partition=partition)
    assert distance(found, within[False]) < BOUND
    assert agreeing(found, within[False]) > 0.7
    assert stats["jobs"] > 0
    if not stats["greenctx_available"]:
        assert stats["lane"] == "stream"
        pytest.skip(f"no green contexts: {stats['greenctx_reason']}")
    counts = stats["sm_counts"]
    assert stats["lane"] == "partition"
    assert 0 < counts["compress"] < counts["device"]
    assert counts["main"] == counts["device"] if partition is None else counts["main"] <= counts["device"] - counts["compress"]
