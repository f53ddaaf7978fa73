"""Several GPUs: a model whose layers are spread over two, and one whose heads are, both with the kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import tp_batching
import tp_worker
from gpu_models import VOCABULARY, first_difference, llama_config, random_book
from transformers import DynamicCache, LlamaForCausalLM

from hf_pqcache import Codebook, PagedKVCache, PagedPQCache
from hf_pqcache.backends import jit
from hf_pqcache.batching import support
from hf_pqcache.models.names import cache_kwargs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.device_count() < 2 or jit.why_unavailable() is not None,
        reason="needs two GPUs and CuPy",
    ),
]
LAYERS = 4
SETTINGS = {"page_size": 16, "extended_residual": 32, "max_pages": 64}
#: Layers 0 and 1 on the first GPU, 2 and 3 on the second.
SPREAD = {
    "model.embed_tokens": 0,
    "model.layers.0": 0,
    "model.layers.1": 0,
    "model.layers.2": 1,
    "model.layers.3": 1,
    "model.norm": 1,
    "model.rotary_emb": 0,
    "lm_head": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A random model, a codebook for it, and the settings of the caches."""
    path: Path = tmp_path_factory.mktemp("spread")
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(LAYERS)).half().save_pretrained(path / "model")
    random_book(num_subspaces=32, num_bits=6).save_pretrained(path / "codebook")
    settings = {**SETTINGS, "num_bits": 6, "num_subspaces": 32}
    (path / "settings.json").write_text(json.dumps({"dtype": "float16", "plan": "tp_plan", "cache": settings}))
    return path


def load(folder: Path, device_map: Any) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float16, device_map=device_map).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def coded(model: Any, folder: Path, **options: Any) -> PagedPQCache:
    return PagedPQCache(model.config, Codebook.from_pretrained(folder / "codebook"), **SETTINGS, **options)


def generate(model: Any, cache: Any, **options: Any) -> Any:
    ids = torch.randint(3, VOCABULARY, (2, 150), generator=torch.Generator().manual_seed(2)).to(0)
    mask = torch.ones_like(ids)
    mask[1, :60] = 0
    settings = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(ids, attention_mask=mask, **cache_kwargs(cache), **(settings | options))


def assert_placed(cache: Any) -> None:
    """What a layer stores and counts is on the layer's device; the page table is the same on both."""
    storage = cache.storage
    devices = [torch.device("cuda", i // 2) for i in range(LAYERS)]
    assert set(storage.layers.states) == set(devices)
    for layer, device in enumerate(devices):
        view = storage.layers.views[layer]
        kept = [
            *(side for slab in view.store.slabs.values() for side in (slab.keys, slab.values)),
            view.window_keys,
            view.window_values,
            view.seq_lens,
            view.page_table,
            view.left_pad,
        ]
        assert {x.device for x in kept} == {device}
        width = storage.layers.states[device].width
        expected = torch.from_numpy(view.store.device_ids(storage.layers.table.to_array(width)))
        assert torch.equal(view.page_table.cpu(), expected)
        assert torch.equal(storage.layers.states[device].page_table[layer].cpu(), expected)


def test_layers_on_two_gpus(folder: Path) -> None:
    """Kernels are launched on the layer's device, also while the other one is the current device."""
    alone = generate(one := load(folder, {"": 0}), coded(one, folder, compile=False))
    model = load(folder, SPREAD)
    for current in (0, 1):
        with torch.cuda.device(current):
            cache = coded(model, folder, compile=False)
            spread = generate(model, cache)
        assert_placed(cache)
        stats = cache.stats()
        assert set(stats["calls"]) == {"append/cuda", "attend/tuned"}, stats["calls"]
        assert stats["pages_used"] > 0
        assert first_difference(spread, alone) < 0.02
    beams = generate(model, cache := coded(model, folder, compile=False), num_beams=3, max_new_tokens=20)
    assert_placed(cache)
    assert beams.sequences.shape == (2, 170)


def test_compiled_or_not_on_two_gpus(folder: Path) -> None:
    """As `generate` does it by itself."""
    model = load(folder, SPREAD)
    eager = generate(model, coded(model, folder, compile=False))
    cache = coded(model, folder)
    assert first_difference(generate(model, cache), eager) < 0.02
    assert_placed(cache)
    assert cache.get_seq_length() == 150 + 39


def test_exact_pages_on_two_gpus(folder: Path) -> None:
    model = load(folder, SPREAD)
    cache = PagedKVCache(model.config, page_size=16, max_pages=64, compile=False)
    paged = generate(model, cache)
    assert_placed(cache)
    assert first_difference(paged, generate(model, DynamicCache(config=model.config))) < 0.02


def test_pages_in_host_memory_on_two_gpus(folder: Path) -> None:
    model = load(folder, SPREAD)
    cache = coded(model, folder, offload=True)
    assert not cache.is_compileable
    got, expected = generate(model, cache), generate(model, coded(model, folder, compile=False))
    assert_placed(cache)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


def test_heads_on_two_gpus(folder: Path) -> None:
    """Tensor parallelism over NCCL: each process has one KV head."""
    ranks = tp_worker.torchrun(folder, 2)
    with torch.inference_mode():
        alone = tp_worker.run(load(folder, {"": 0}), folder)
    for results in ranks:
        facts = results["facts"]
        assert facts["heads"] == 1
        assert facts["pages"] == alone["facts"]["pages"] > 0
        half = alone["facts"]["code_bytes"] / 2
        padding = 2 * 64 * LAYERS * facts["pages"]  # each side of a page is rounded up to 64 bytes
        assert half <= facts["code_bytes"] < half + padding, "each process holds its half"
        assert set(facts["calls"]) == {"append/cuda", "attend/tuned"}
        for mode in ("greedy", "from_pretrained", "exact pages", "compiled"):
            assert torch.equal(results[mode][0], ranks[0][mode][0]), "ranks agree on every token"
            first, want = results[mode][1][0], alone[mode][1][0]
            assert float((first - want).norm() / want.norm()) < 0.02, mode
            step, want = results[mode][1][1], alone[mode][1][1]
            if torch.equal(first.argmax(-1), alone[mode][1][0].argmax(-1)):
                # Sums over heads are rounded elsewhere; what was near two centroids may then get the other one.
                assert float((step - want).norm() / want.norm()) < (0.02 if mode == "exact pages" else 0.06), mode


def test_an_engine_on_two_gpus(folder: Path) -> None:
    """Continuous batching under tensor parallelism: CUDA graphs that hold collectives, one KV head in each process."""
    if why := support.why_unsupported():
        pytest.skip(why)
    alone = tp_batching.results(load(folder, {"": 0}))
    first, second = tp_worker.torchrun(folder, 2, "tp_batching.py")
    assert first == second
    assert 2 * first["rows"] == alone["rows"]
    for kind in ("coded", "exact"):
        same = [a[:4] == b[:4] for a, b in zip(first[kind], alone[kind], strict=True)]
        assert sum(same) >= len(same) - 1, "sums over heads are rounded elsewhere"
