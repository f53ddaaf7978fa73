"""The server's engine on a GPU: how requests choose their tokens inside CUDA graphs and asynchronous steps."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_models import VOCABULARY, llama_config
from transformers import LlamaForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
support = pytest.importorskip("hf_pqcache.batching.support")
if support.why_unsupported():
    pytest.skip(support.why_unsupported(), allow_module_level=True)

from hf_pqcache.serve.engine import Engine  # noqa: E402
from hf_pqcache.serve.manager import EngineSettings  # noqa: E402
from hf_pqcache.serve.sampling import Sampler, Sampling  # noqa: E402

KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9, "seed": 5},
    {"top_k": 20, "min_p": 0.01, "seed": 2**63 + 1},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.3},
    {"temperature": 0.7, "presence_penalty": 1.0, "min_tokens": 5, "ends": (3,), "seed": 7},
)


def test_a_replayed_graph_draws_what_a_cpu_draws() -> None:
    """One graph for all steps: rows come and go, histories grow."""
    rows, steps, host = 7, 12, torch.device("cpu")
    on_gpu, on_cpu = (Sampler(VOCABULARY, 4, device) for device in (torch.device("cuda"), host))
    tables = [torch.zeros(on_cpu.tensors_required, rows, dtype=torch.int32, device=d) for d in ("cuda", "cpu")]
    last, scores = torch.zeros(rows, dtype=torch.int32, device="cuda"), torch.zeros(rows, VOCABULARY, device="cuda")
    draw, graph = torch.Generator().manual_seed(0), None
    sampled = [[Sampling(**kind) for kind in KINDS] for _ in range(2)]
    for sampler, own in zip((on_gpu, on_cpu), sampled, strict=True):
        for sampling in own:
            if sampling.has_history:
                sampler.take(sampling)
    tokens = [4] * len(KINDS)
    for step in range(steps):
        chosen = [i for i in range(len(KINDS)) if (step + i) % 4 or step == 0]
        given = torch.randn(len(chosen), VOCABULARY, generator=draw) * 3
        for sampler, table, own in zip((on_gpu, on_cpu), tables, sampled, strict=True):
            states = [
                SimpleNamespace(
                    initial_tokens=[1, 2, 4],
                    _true_initial_tokens=0,
                    position_offset=3 + step,
                    logit_processor_kwargs={"sampling": own[i]},
                )
                for i in chosen
            ]
            sampler.prepare_tensor_args([SimpleNamespace(state=state, has_new_token=True) for state in states], table)
        last[: len(chosen)] = torch.tensor([tokens[i] for i in chosen], dtype=torch.int32)
        scores[: len(chosen)] = given.cuda()
        if graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                before = on_gpu.history.clone()
                on_gpu(last, scores, tables[0])
                on_gpu.history.copy_(before)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = on_gpu(last, scores, tables[0])
        graph.replay()
        found = out[: len(chosen)].argmax(-1).tolist()
        want = on_cpu(last[: len(chosen)].cpu(), given, tables[1][:, : len(chosen)]).argmax(-1).tolist()
        assert found == want
        for i, token in zip(chosen, found, strict=True):
            tokens[i] = token


@pytest.mark.parametrize("variant", ["4", "exact"])
def test_greedy_requests_do_not_mind_company_and_seeds_repeat(variant: str) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(2)).to("cuda", torch.float16).eval()
    sizes: dict[str, Any] = {"cache_tokens": 20_000, "max_requests": 16, "max_batch_tokens": 512, "context": 1024}
    engine = Engine(model, EngineSettings(variant, **sizes, shares_prefixes=False))
    engine.start()
    prompt = torch.randint(1, VOCABULARY, (300,), generator=torch.Generator().manual_seed(1)).tolist()

    async def answer(kind: dict[str, Any]) -> list[int]:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        assert await engine.submit(prompt, 40, Sampling(**kind), heard.put_nowait, False) is not None
        output = await asyncio.wait_for(heard.get(), 60)
        assert output.error is None
        return list(output.generated_tokens)

    async def together() -> list[list[int]]:
        return list(await asyncio.gather(*(answer(kind) for kind in KINDS)))

    async def rounds() -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        return await together(), await together(), [await answer(kind) for kind in KINDS]

    try:
        first, second, alone = asyncio.run(rounds())
        # Rows of a batch are multiplied in another order than one row alone: half precision may turn a near tie.
        agreeing = sum(a[:4] == b[:4] for a, b in zip(first, alone, strict=True))
        assert agreeing >= len(KINDS) - 1
        assert sum(a[:4] == b[:4] for a, b in zip(first, second, strict=True)) >= len(KINDS) - 1
        assert all(3 not in tokens[:5] for tokens in (first[4], second[4], alone[4]))
        assert len(engine.sampler.free) == engine.slots
        inputs = engine.manager.batch_processor.inputs_and_outputs
        graphs = {key for pair in inputs.io_pairs for key in pair.device_io.graphs._storage}
        assert {"sampled" in key for key in graphs} == {True, False}
    finally:
        engine.stop(10)
