"""A press under continuous batching on a GPU, CUDA graphs and asynchronous steps included: what `generate` says with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_models import VOCABULARY, llama_config
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

from hf_pqcache import PagedKVCache, PagedPQCache, pressed
from hf_pqcache.compressors.knorm import Knorm
from hf_pqcache.compressors.snapkv import SnapKV
from hf_pqcache.models.names import cache_kwargs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
support = pytest.importorskip("hf_pqcache.batching.support")
if support.why_unsupported():
    pytest.skip(support.why_unsupported(), allow_module_level=True)

from hf_pqcache.batching import enable_batching  # noqa: E402

LENGTHS, NEW = (300, 150, 64, 220, 90), 40
CODED = {"page_size": 16, "extended_residual": 32}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(llama_config(3)).to("cuda", torch.float16).eval()


@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
@pytest.mark.parametrize("compress", ["inline", "stream"])
@pytest.mark.parametrize("press", [Knorm(0.5), SnapKV(0.5, window=16)], ids=["knorm", "snapkv"])
def test_equal_to_generate_with_the_press(model: Any, press: Any, compress: str, exact: bool) -> None:
    made = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, VOCABULARY, (n,), generator=made).tolist() for n in LENGTHS]
    wanted = []
    for prompt in prompts:
        cache = PagedKVCache(model.config, page_size=16) if exact else PagedPQCache(model.config, **CODED)
        ids = torch.tensor([prompt], device="cuda")
        with pressed(model, press):
            out = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, **cache_kwargs(cache))
        wanted.append(out[0, len(prompt) :].tolist())
    sizes: dict[str, Any] = {"page_size": 16} if exact else CODED
    enable_batching(model, exact=exact, press=press, compress=compress, **sizes)
    config = ContinuousBatchingConfig(num_blocks=400, max_batch_tokens=200, max_requests_per_batch=8)
    asked = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    with model.continuous_batching_context_manager(asked, continuous_batching_config=config) as manager:
        names, found = manager.add_requests(prompts, max_new_tokens=NEW), dict[str, Any]()
        while set(names) - set(found) and manager.is_running():
            if (result := manager.get_result(timeout=1)) is not None and result.is_finished():
                found[result.request_id] = result
        assert manager.stats()["pruned_tokens"] >= sum(LENGTHS) // 2
    assert all(found[name].error is None for name in names)
    pairs = [(found[name].generated_tokens[:10], tokens[:10]) for name, tokens in zip(names, wanted, strict=True)]
    same = sum(x == y for ours, theirs in pairs for x, y in zip(ours, theirs, strict=True))
    assert same > 0.8 * 10 * len(LENGTHS)  # float16: near ties, of scores and of what is kept
