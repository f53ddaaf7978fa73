"""Shapes of keys and values from configs: where layers differ, each is asked for itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_models import build

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.backends import dispatch
from hf_pqcache.cache import caches as cache_module
from hf_pqcache.eval.session import caches
from hf_pqcache.eval.session.model_config import ModelConfig
from hf_pqcache.models.shapes import has_latent_attention, kv_shape, layer_configs


def latent_config_of_unlike_layers() -> Any:
    """DeepSeek-V3 whose second layer has a latent vector of another length."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128}
    return tf.DeepseekV3Config(**sizes, **experts, kv_lora_rank=16, per_layer_config={1: {"kv_lora_rank": 8}})


def test_every_layer_says_its_own_shape() -> None:
    assert [kv_shape(layer) for layer in layer_configs(build("gemma4").config)] == [(1, 16), (1, 32)] * 2
    assert {kv_shape(layer) for layer in layer_configs(build("llama").config)} == {(2, 16)}
    assert len(layer_configs(build("llama").config)) == 2


def test_a_number_that_differs_by_layer_stops_no_cache() -> None:
    config = latent_config_of_unlike_layers()
    with pytest.raises(RuntimeError, match="per-layer"):
        getattr(config, "kv_lora_rank", None)
    assert has_latent_attention(config)
    for new in (PagedKVCache(config), PagedPQCache(config)):
        assert new.stats()["compressed_layers"] == [0, 1]


def test_kernels_serve_a_model_if_they_serve_each_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def select(dims: tuple[int, int], *rest: Any) -> Any:
        head_dim, _ = dims
        asked.append(head_dim)
        return SimpleNamespace(name="cuda" if head_dim == 16 else "torch")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "select", select)
    assert cache_module._kernels_serve(build("llama").config, None)
    assert not cache_module._kernels_serve(build("gemma4").config, None)
    assert {16, 32} == set(asked)


def test_tools_take_models_whose_layers_differ() -> None:
    model = build("gemma4")
    assert caches.kv_numbers_per_token(model) == 2 * 1 * 32  # one full-attention layer that keeps tokens of its own
    assert caches.head_dim_of(model.config) == 32
    mine = {"model": "gemma4", "calibration_text": "text"}
    ModelConfig(**mine, head_dim=32).check(model.config)
    with pytest.raises(ValueError, match="expected head_dim=64, got 16 and 32"):
        ModelConfig(**mine, head_dim=64).check(model.config)
