"""Prefixes that leave an engine on a GPU and come into another one, with graphs and asynchronous steps, while others run."""

from __future__ import annotations

import copy
import threading
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

NEW = 60


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def managed(model: Any, **kind: Any) -> Any:
    asked = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    config = ContinuousBatchingConfig(num_blocks=2000, max_batch_tokens=512, max_requests_per_batch=8)
    enable_batching(model, page_size=16, extended_residual=32, **kind)
    return model.continuous_batching_context_manager(asked, continuous_batching_config=config)


def ask(manager: Any, *prompts: list[int]) -> list[list[int]]:
    names = [manager.add_request(one, max_new_tokens=NEW) for one in prompts]
    found: dict[str, Any] = {}
    while set(names) - set(found) and manager.is_running():
        if (result := manager.get_result(timeout=1)) is not None and result.is_finished():
            found[result.request_id] = result
    assert [found[name].error for name in names] == [None] * len(names)
    return [list(found[name].generated_tokens) for name in names]


@pytest.mark.parametrize("kind", [{}, {"bits": 2}, {"exact": True}, {"compress": "stream"}], ids=str)
def test_a_prefix_from_elsewhere_is_one_of_its_own(kind: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(3)).to("cuda", torch.bfloat16).eval()
    text, other = prompt(700, 1), prompt(500, 2)
    with managed(model, **kind) as there, managed(copy.deepcopy(model), **kind) as here:
        (said,) = ask(there, text)
        data = there.export_prefixes([[*text, *said]])
        (right,) = ask(there, [*text, *said, 5, 6])
        before = ask(there, other)
        over = threading.Event()
        here.import_prefixes(there.export_prefixes([]))  # the equaliser

        def exchange() -> None:
            while not over.is_set():
                here.import_prefixes(data)
                here.export_prefixes([text])

        thread = threading.Thread(target=exchange)
        thread.start()
        try:
            assert ask(here, other) == before
        finally:
            over.set()
            thread.join()
        assert here.stats()["prefixes"]["imported"] >= 700 // 16 - 3
        assert here.export_prefixes([[*text, *said]])[-4096:] == data[-4096:]
        assert ask(here, [*text, *said, 5, 6]) == [right]
        assert here.stats()["prefix_tokens"] == there.stats()["prefix_tokens"]
