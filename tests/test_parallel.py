"""Tensor parallelism: two processes, each with its own KV heads and its own part of the codebook, as one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import tp_worker
from tiny_models import COMMON, SMALL
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_pqcache import PagedPQCache
from hf_pqcache.batching import support
from hf_pqcache.codebook import shipped

SHAPE = {**COMMON, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
#: name -> (model class, config class, how it is told to spread its heads)
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, "tp_plan"),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, "distributed_config"),
}


def write_folder(folder: Path, name: str) -> None:
    """A tiny random model, a codebook for it, and the settings of the caches."""
    torch.manual_seed(0)
    model_class, config_class, plan = MODELS[name]
    model: Any = model_class(config_class(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() == 2):
            parameter.mul_(6.0)  # tokens shall depend on attention
    model.save_pretrained(folder / "model")
    shipped.codebook(SMALL, 16, 16).save_pretrained(folder / "codebook")
    (folder / "settings.json").write_text(json.dumps({"dtype": "float32", "plan": plan, "cache": SMALL.to_dict()}))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_equal_one(name: str, tmp_path: Path, one_thread: None) -> None:
    write_folder(tmp_path, name)
    with torch.inference_mode():
        alone = tp_worker.run(tp_worker.load(tmp_path), tmp_path)
    ranks = tp_worker.torchrun(tmp_path, 2)
    for results in ranks:
        for mode in ("greedy", "beams, after reset", "from_pretrained", "exact pages", "shipped codebook", "compiled"):
            assert torch.equal(results[mode][0], alone[mode][0]), mode
            torch.testing.assert_close(results[mode][1], alone[mode][1], rtol=1e-3, atol=1e-3)
        assert torch.equal(results["compiled"][0], results["greedy"][0][:, : tp_worker.PROMPT + tp_worker.FEW])
        facts, whole = results["facts"], alone["facts"]
        assert (facts["heads"], whole["heads"]) == (1, 2)
        assert facts["pages"] == whole["pages"] > 0
        assert facts["tokens"] == whole["tokens"]
        assert 2 * facts["code_bytes"] == whole["code_bytes"], "each process holds its half"


@pytest.mark.slow
def test_an_engine_of_two_processes_equals_one(tmp_path: Path, one_thread: None) -> None:
    if why := support.why_unsupported():
        pytest.skip(why)
    import tp_batching

    write_folder(tmp_path, "llama")
    alone = tp_batching.results(tp_worker.load(tmp_path))
    for results in tp_worker.torchrun(tmp_path, 2, "tp_batching.py"):
        assert 2 * results.pop("rows") == alone["rows"], "each process has its half of the KV heads"
        assert results == {key: value for key, value in alone.items() if key != "rows"}


def test_collectives_are_not_compiled_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_pqcache.cache.caches

    monkeypatch.setattr(hf_pqcache.cache.caches, "_kernels_serve", lambda *_: True)
    config = LlamaConfig(**SHAPE)
    assert PagedPQCache(config).is_compileable
    pretend(monkeypatch, rank=0, world=2)
    cache = PagedPQCache(config)
    assert not cache.is_compileable
    assert "several processes" in cache.stats()["eager_because"]
    assert PagedPQCache(config, compile=True).is_compileable


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
