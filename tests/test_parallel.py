"""Tensor parallelism: two processes, each with its own KV heads and its own part of the codebook, as one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import tp_worker
from tiny_models import COMMON, SMALL
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from hf_pqcache import Codebook, PagedPQCache
from hf_pqcache.codebook import tensor_parallel
from hf_pqcache.codebook.calibrate import learn_layer
from hf_pqcache.codebook.codebook import LayerCodebook
from hf_pqcache.models.names import cache_kwargs

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
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, SHAPE["vocab_size"], (1, 256)), **cache_kwargs(past))
    books = {i: learn_layer(x.keys[0], x.values[0], SMALL, iterations=5) for i, x in enumerate(past.layers)}
    Codebook(books, num_bits=SMALL.num_bits).save_pretrained(folder / "codebook")
    (folder / "settings.json").write_text(json.dumps({"dtype": "float32", "plan": plan, "cache": SMALL.to_dict()}))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_equal_one(name: str, tmp_path: Path, one_thread: None) -> None:
    write_folder(tmp_path, name)
    with torch.inference_mode():
        alone = tp_worker.run(tp_worker.load(tmp_path), tmp_path)
    ranks = tp_worker.torchrun(tmp_path, 2)
    book = Codebook.from_pretrained(tmp_path / "codebook").layers[0]
    for rank, results in enumerate(ranks):
        for mode in ("greedy", "beams, after reset", "from_pretrained", "exact pages", "compiled"):
            assert torch.equal(results[mode][0], alone[mode][0]), mode
            torch.testing.assert_close(results[mode][1], alone[mode][1], rtol=1e-3, atol=1e-3)
        assert torch.equal(results["compiled"][0], results["greedy"][0][:, : tp_worker.PROMPT + tp_worker.FEW])
        facts, whole = results["facts"], alone["facts"]
        assert (facts["heads"], whole["heads"]) == (1, 2)
        assert facts["pages"] == whole["pages"] > 0
        assert facts["tokens"] == whole["tokens"]
        for part in ("code_bytes", "codebook_bytes"):
            assert 2 * facts[part] == whole[part], f"{part}: each process holds its half"
        assert torch.equal(results["centroids"], book.keys[rank : rank + 1])
        assert results["learnt keys"].shape[0] == 1
        # Both turn to codes in mid-answer; up to there all is exact.
        torch.testing.assert_close(results["learnt"][1][:8], alone["learnt"][1][:8], rtol=1e-3, atol=1e-3)
        assert torch.equal(results["learnt"][0], ranks[0]["learnt"][0]), "ranks agree on every token"
    torch.testing.assert_close(ranks[0]["learnt keys"], alone["learnt keys"][:1], rtol=1e-2, atol=1e-2)
    assert not torch.allclose(ranks[0]["learnt keys"], ranks[1]["learnt keys"]), "each learns its own head"


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


# -- which heads are one's own -------------------------------------------------------------------------------------------
def book_of(heads: int) -> LayerCodebook:
    return LayerCodebook(*(torch.randn(heads, 8, 16, 2).half() for _ in range(2)))


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)


def test_a_rank_takes_its_run_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    book = book_of(8)
    assert tensor_parallel.local_part(book, 8, 0, None) is book
    pretend(monkeypatch, rank=3, world=4)
    part = tensor_parallel.local_part(book, 2, 0, None)
    assert torch.equal(part.keys, book.keys[6:])
    assert torch.equal(part.values, book.values[6:])
    assert tensor_parallel.local_part(book, 2, 0, None) is part, "made once for all caches"
    assert torch.equal(tensor_parallel.local_part(book, 2, 0, 1).keys, book.keys[2:4]), "tp_rank wins"


def test_unknown_heads_are_an_error_that_says_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"layer 5: .* has 8 KV heads and this process is handed 4.*torchrun.*tp_rank"):
        tensor_parallel.local_part(book_of(8), 4, 5, None)
    with pytest.raises(ValueError, match="tp_rank=2 is none of the 2 processes that share 8 KV heads"):
        tensor_parallel.local_part(book_of(8), 4, 0, 2)
    pretend(monkeypatch, rank=0, world=4)  # two replicas of two processes each, say
    with pytest.raises(ValueError, match=r"2 processes share them, and torch\.distributed has 4; pass tp_rank"):
        tensor_parallel.local_part(book_of(8), 4, 0, None)


def cache_of(heads: int, **options: Any) -> tuple[PagedPQCache, Any]:
    config = LlamaConfig(**{**SHAPE, "num_key_value_heads": heads})
    books = {i: book_of(heads) for i in range(2)}
    return PagedPQCache(config, Codebook(books, num_bits=4), SMALL, **options), books


def test_a_cache_is_told_its_rank() -> None:
    cache, books = cache_of(4, tp_rank=1)
    keys = torch.randn(1, 2, 50, 16)
    cache.update(keys, keys, 0)
    assert torch.equal(cache.storage.layers.views[0].key_centroids, books[0].keys[2:])
    import copy

    assert copy.deepcopy(cache).storage.layers.tp_rank == 1


def test_heads_that_no_division_explains_are_another_model() -> None:
    cache, _ = cache_of(4)
    keys = torch.randn(1, 3, 50, 16)
    with pytest.raises(ValueError, match="3 KV heads of 16 need"):
        cache.update(keys, keys, 0)
    with pytest.raises(ValueError, match="not initialized"):
        cache_of(4)[0].update(keys[:, :2], keys[:, :2], 0)


@pytest.mark.parametrize(
    ("names", "ndim", "expected"),
    [(("pp", "fsdp", "tp"), 3, "tp"), (("tp",), 1, "tp"), (None, 1, ""), (("fsdp",), 1, None), (None, 2, None)],
)
def test_a_models_mesh_knows_the_rank(names: Any, ndim: int, expected: str | None) -> None:
    """5.17 makes a mesh of one nameless dimension, later releases one of several named ones."""
    mesh = SimpleNamespace(mesh_dim_names=names, ndim=ndim, get_local_rank=lambda name="": {"tp": 3, "": 5}[name])
    wanted = None if expected is None else {"tp": 3, "": 5}[expected]
    assert tensor_parallel.rank_of(SimpleNamespace(_device_mesh=mesh)) == wanted
    assert tensor_parallel.rank_of(LlamaConfig(**SHAPE)) is None
