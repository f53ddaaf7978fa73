"""Planted outliers: the model computes the same, keys have two large channels, and per-token integers lose what is beside."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tiny_models import build, tokens
from transformers import DynamicCache

from hf_pqcache.demo import MODEL, TEXT
from hf_pqcache.eval.measure.deployed import cache_perplexity
from hf_pqcache.eval.session.caches import CacheSpec, head_dim_of
from hf_pqcache.eval.session.models import load_model, token_ids
from hf_pqcache.eval.session.outliers import plant_outliers
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["llama", "opt", "mistral"])
def test_the_model_computes_the_same_with_larger_keys(name: str) -> None:
    model, ids = copy.deepcopy(build(name)), tokens(2, 40)
    before, after = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids, **cache_kwargs(before)).logits
        assert plant_outliers(model, 30) == len(before.layers)
        assert torch.allclose(model(ids, **cache_kwargs(after)).logits, expected, atol=1e-4)
    width = head_dim_of(model.config)
    loud = [width // 2 - 1, width - 1]
    for old, new in zip(before.layers, after.layers, strict=True):
        ratio = new.keys.square().sum(2) / old.keys.square().sum(2)
        assert torch.allclose(ratio[..., loud].sqrt(), torch.tensor(30.0), rtol=1e-2)
        assert torch.allclose(old.values, new.values, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "olmo2"])
def test_models_that_it_would_change_are_refused(name: str) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="outliers cannot be planted"):
        plant_outliers(model)
    with pytest.raises(ValueError, match="above 0"):
        plant_outliers(build("llama"), -1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_integers_per_token_collapse_and_channels_do_not() -> None:
    """A trained model: what each cache loses of an exact one's likelihood, without outliers and with them."""
    loss: dict[Any, float] = {}
    for factor in (1.0, 30.0):
        model, tokenizer = load_model(MODEL, dtype="float32", device="cpu")
        plant_outliers(model, factor)
        ids = token_ids(tokenizer, TEXT.read_text()[:6000])
        for name in ("dynamic", "int4-token", "kivi:4", "turboquant:4", "pq:4"):
            spec = CacheSpec.parse(name, head_dim_of(model.config))
            common: dict[str, Any] = {"window": 600, "prefill": 132, "max_windows": 2, "progress": False}
            loss[name, factor] = math.log(cache_perplexity(model, ids, lambda n, r: spec.make(model, n, r), **common))  # noqa: B023
    lost = {key: abs(value - loss["dynamic", key[1]]) for key, value in loss.items()}
    assert loss["dynamic", 30.0] == pytest.approx(loss["dynamic", 1.0], rel=1e-4)
    assert lost["kivi:4", 30.0] < 2 * lost["kivi:4", 1.0] + 1e-3
    assert lost["pq:4", 30.0] < 1.3 * lost["pq:4", 1.0] + 1e-3
    assert lost["int4-token", 30.0] > 10 * lost["int4-token", 1.0]
