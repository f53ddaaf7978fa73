"""Calibration samples the right keys and values, is deterministic, and says what it did."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig

from hf_pqcache.codebook import pq
from hf_pqcache.codebook.calibrate import calibrate, compressible_layers, learn_layer
from hf_pqcache.config import PQConfig
from hf_pqcache.models.names import output_cache

SHARED = Path(__file__).parents[1].parent / "shared"
TINY, ARTICLES = SHARED / "models" / "tiny", SHARED / "data" / "text" / "articles.txt"
pytestmark = pytest.mark.cache
CONFIG = PQConfig(num_subspaces=8, num_bits=4)


class ByteTokenizer:
    """One token a byte, as much of a tokenizer as calibration uses."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def sizes(**kw: Any) -> dict[str, Any]:
    return {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        **kw,
    }


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes()))


TEXT = " ".join(str(i * i) for i in range(300))


def test_codebook_fits_the_model_and_records_its_making(model: Any) -> None:
    book = calibrate(model, ByteTokenizer(), TEXT, CONFIG, num_tokens=600, window=200, seed=5, progress=False)
    book.check_model(model.config)
    assert book.layers[1].keys.shape == (2, 8, 16, 2)
    facts = book.metadata
    assert (facts["tokens"], facts["seed"], facts["objective"], facts["window"]) == (600, 5, "tail", 200)
    assert len(facts["text_sha256"]) == 64


def test_same_seed_same_codebook(model: Any) -> None:
    def make(**kw: Any) -> str:
        settings = {"num_tokens": 400, "window": 100, "progress": False, **kw}
        return calibrate(model, ByteTokenizer(), TEXT, CONFIG, **settings).fingerprint

    assert make() == make()
    assert make() != make(seed=1)
    assert make() != make(objective="plain")
    assert make() != make(num_tokens=300)


def test_training_mode_and_rng_are_left_alone(model: Any) -> None:
    model.train()
    state = torch.get_rng_state()
    calibrate(model, ByteTokenizer(), TEXT, CONFIG, num_tokens=100, window=100, progress=False)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    model.eval()


def test_samples_are_the_rotated_keys_and_the_values(model: Any) -> None:
    """With as many tokens as centroids the codebook holds the samples themselves."""
    window, skip = 20, CONFIG.sink_tokens
    book = calibrate(model, ByteTokenizer(), TEXT[:window], CONFIG, window=window, progress=False)
    ids = torch.tensor([list(TEXT[:window].encode())])
    with torch.no_grad():
        cached = output_cache(model(ids, use_cache=True)).layers[1]
    for x, centroids in ((cached.keys, book.layers[1].keys), (cached.values, book.layers[1].values)):
        decoded = pq.decode(pq.encode(x[0], centroids), centroids)
        torch.testing.assert_close(decoded[:, skip:], x[0, :, skip:], rtol=5e-3, atol=5e-3)  # float16 centroids


def test_documents_are_joined_by_end_of_text(model: Any) -> None:
    settings: dict[str, Any] = {"num_tokens": 100, "window": 100, "progress": False}
    parts = calibrate(model, ByteTokenizer(), iter(["a" * 60, "b" * 60]), CONFIG, **settings)
    whole = calibrate(model, ByteTokenizer(), "a" * 60 + "\0" + "b" * 60, CONFIG, **settings)
    assert parts.fingerprint == whole.fingerprint


def test_sliding_layers_are_left_out() -> None:
    config = Gemma2Config(**sizes(num_hidden_layers=4, sliding_window=32))
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    assert compressible_layers(config) == full == [1, 3]
    gemma = AutoModelForCausalLM.from_config(config)
    book = calibrate(gemma, ByteTokenizer(), TEXT, CONFIG, num_tokens=100, window=100, progress=False)
    assert list(book.layers) == full
    book.check_model(config)


def test_bad_input_names_the_way_out(model: Any) -> None:
    with pytest.raises(ValueError, match="give more text"):
        calibrate(model, ByteTokenizer(), "short", CONFIG, progress=False)
    with pytest.raises(ValueError, match="use one of"):
        calibrate(model, ByteTokenizer(), TEXT, PQConfig(num_subspaces=9), progress=False)
    windowed = LlamaConfig(**sizes(layer_types=["sliding_attention"] * 2, sliding_window=8))
    with pytest.raises(ValueError, match="no full-attention layer"):
        calibrate(SimpleNamespace(config=windowed), ByteTokenizer(), TEXT, CONFIG, progress=False)


def test_learn_layer_takes_keys_and_values_of_different_width() -> None:
    keys, values = torch.randn(2, 100, 16), torch.randn(2, 100, 32)
    book = learn_layer(keys, values, CONFIG)
    assert book.keys.shape == (2, 8, 16, 2)
    assert book.values.shape == (2, 8, 16, 4)
    with pytest.raises(ValueError, match="does not fit float16"):
        learn_layer(keys * 1e6, values, CONFIG)
    with pytest.raises(ValueError, match="give at least 16"):
        learn_layer(keys[:, :10], values[:, :10], CONFIG)


@pytest.mark.skipif(not TINY.is_dir(), reason="the tiny trained model is not at ../shared/models/tiny")
def test_real_keys_are_coded_with_small_error() -> None:
    tiny = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = ARTICLES.read_text(encoding="utf-8")
    config = PQConfig(num_bits=6)
    book = calibrate(tiny, tokenizer, text[:16000], config, window=1024, iterations=10, progress=False)
    assert book.metadata["model"] == "tiny"  # the name, never the path
    ids = torch.tensor([tokenizer(text[-4000:])["input_ids"]])
    with torch.no_grad():
        cached = output_cache(tiny(ids, use_cache=True)).layers[2]
    for x, centroids in ((cached.keys, book.layers[2].keys), (cached.values, book.layers[2].values)):
        decoded = pq.decode(pq.encode(x[0], centroids), centroids)
        relative = (decoded - x[0]).norm() / x[0].norm()
        assert relative < 0.3
