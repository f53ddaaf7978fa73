"""Images under continuous batching on a GPU, CUDA graphs and asynchronous steps included: what `generate` says to them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import tiny_llava
import torch
import transformers
from gpu_models import VOCABULARY, llama_config
from transformers import ContinuousBatchingConfig, GenerationConfig

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
support = pytest.importorskip("hf_pqcache.batching.support")
if support.why_unsupported():
    pytest.skip(support.why_unsupported(), allow_module_level=True)

from hf_pqcache.batching import disable_batching, enable_batching, image_prompt  # noqa: E402

IMAGE, FEATURES, NEW, SHOWN = VOCABULARY - 1, tiny_llava.FEATURES, 40, 12
CODED = {"page_size": 16, "extended_residual": 32}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=tiny_llava.model().config.vision_config, text_config=llama_config(3), image_token_index=IMAGE,
        image_seq_length=FEATURES,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).to("cuda", torch.float16).eval()


def prompt(seed: int) -> list[int]:
    words = torch.randint(1, IMAGE, (40 + 17 * seed,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [1, 5, *[IMAGE] * FEATURES, *words]


@pytest.mark.parametrize("exact", [False, True], ids=["coded", "exact"])
def test_equal_to_generate_in_little_room(model: Any, exact: bool) -> None:
    """Twelve images, of which four are remembered at a time."""
    pixels = torch.randn(SHOWN, 3, 56, 56, generator=torch.Generator().manual_seed(2)).half()
    wanted = []
    for i in range(SHOWN):
        cache = PagedKVCache(model.config, page_size=16) if exact else PagedPQCache(model.config, **CODED)
        ids = torch.tensor([prompt(i)], device="cuda")
        asked = {"input_ids": ids, "pixel_values": pixels[[i]].cuda(), "attention_mask": torch.ones_like(ids)}
        out = model.generate(**asked, max_new_tokens=NEW, do_sample=False, eos_token_id=-1, **cache_kwargs(cache))
        wanted.append(out[0, ids.shape[1] :].tolist())
    sizes: dict[str, Any] = {"page_size": 16} if exact else CODED
    enable_batching(model, exact=exact, images=4 * FEATURES, **sizes)
    config = ContinuousBatchingConfig(num_blocks=400, max_batch_tokens=200, max_requests_per_batch=8)
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    found: dict[str, Any] = {}
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=config) as manager:
        names: list[str] = []
        for begin in range(0, SHOWN, 4):
            asked_now = [image_prompt(model, prompt(i), pixels[[i]]) for i in range(begin, begin + 4)]
            new = [manager.add_request(ids, max_new_tokens=NEW) for ids in asked_now]
            until = time.monotonic() + 60
            while set(new) - set(found) and manager.is_running() and time.monotonic() < until:
                if (result := manager.get_result(timeout=1)) is not None and result.is_finished():
                    found[result.request_id] = result
            names += new
            while manager.stats()["images"]["held"] and time.monotonic() < until:
                time.sleep(0.01)
    disable_batching(model)
    assert all(found[name].error is None for name in names)
    pairs = [(found[name].generated_tokens[:10], tokens[:10]) for name, tokens in zip(names, wanted, strict=True)]
    same = sum(x == y for ours, theirs in pairs for x, y in zip(ours, theirs, strict=True))
    assert same > 0.8 * 10 * SHOWN  # float16: near ties
