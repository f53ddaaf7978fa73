"""Calibration samples the right keys and values, is deterministic, and says what it did."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig

from hf_pqcache.codebook import pq, shipped
from hf_pqcache.codebook.calibrate import calibrate, compressible_layers
from hf_pqcache.config import PQConfig, Side
from hf_pqcache.models.names import output_cache
from hf_pqcache.pages.codec import CodedPages

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
    assert book.keys.shape == book.values.shape == (1, 16, 2)  # one set for all layers, heads and subspaces
    assert book.is_normalised
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


def test_each_side_has_its_own_codes(model: Any) -> None:
    config = PQConfig(num_subspaces=8, num_bits=6, value_bits=4)
    book = calibrate(model, ByteTokenizer(), TEXT, config, num_tokens=600, window=200, progress=False)
    assert (book.codes("key", 16), book.codes("value", 16)) == ((8, 6), (8, 4))
    assert book.config(16).codes("value", 16) == (8, 4)


def test_million_learns_a_set_for_each_subspace_from_what_is_cached(model: Any) -> None:
    """Keys after their rotary embedding, and values, of all layers and heads together, as they are."""
    config, window = PQConfig(num_subspaces=16, num_bits=8, page_size=16), 68
    book = calibrate(model, ByteTokenizer(), TEXT[:window], config, window=window, normalise=False, progress=False)
    assert book.keys.shape == book.values.shape == (16, 256, 1)
    assert book.gains == (1.0, 1.0)
    ids = torch.tensor([list(TEXT[:window].encode())])
    with torch.no_grad():
        cached = output_cache(model(ids, use_cache=True)).layers
    for layer in cached:
        for x, centroids in ((layer.keys, book.keys), (layer.values, book.values)):
            x = x[0, :, config.sink_tokens :]  # 2 layers of 2 heads: 256 numbers a subspace, a centroid for each
            decoded = pq.decode(pq.encode(x, centroids), centroids)
            torch.testing.assert_close(decoded, x, rtol=2e-2, atol=2e-2 * float(x.std()))


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
    book.check_model(config)


def test_bad_input_names_the_way_out(model: Any) -> None:
    with pytest.raises(ValueError, match="give more text"):
        calibrate(model, ByteTokenizer(), "short", CONFIG, progress=False)
    with pytest.raises(ValueError, match="use one of"):
        calibrate(model, ByteTokenizer(), TEXT, PQConfig(num_subspaces=9), progress=False)
    windowed = LlamaConfig(**sizes(layer_types=["sliding_attention"] * 2, sliding_window=8))
    with pytest.raises(ValueError, match="no full-attention layer"):
        calibrate(SimpleNamespace(config=windowed), ByteTokenizer(), TEXT, CONFIG, progress=False)


def test_numbers_that_are_not_finite_are_refused(model: Any) -> None:
    broken = AutoModelForCausalLM.from_config(LlamaConfig(**sizes()))
    broken.model.layers[1].self_attn.v_proj.weight.data[0] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        calibrate(broken, ByteTokenizer(), TEXT, CONFIG, num_tokens=200, window=100, progress=False)


@pytest.mark.skipif(not TINY.is_dir(), reason="the tiny trained model is not at ../shared/models/tiny")
def test_real_keys_are_coded_about_as_well_by_the_shipped_codebook() -> None:
    """After normalisation keys of a real model look like random numbers: a codebook of its own hardly helps."""
    tiny = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = ARTICLES.read_text(encoding="utf-8")
    config = PQConfig()
    own = calibrate(tiny, tokenizer, text[:16000], config, window=1024, iterations=10, progress=False)
    assert own.metadata["model"] == "tiny"  # the name, never the path
    ids = torch.tensor([tokenizer(text[-4000:])["input_ids"]])
    with torch.no_grad():
        cached = output_cache(tiny(ids, use_cache=True)).layers[2]
    whole = ids.shape[1] // config.page_size * config.page_size
    for which in get_args(Side):
        x = (cached.keys if which == "key" else cached.values)[0, :, :whole]
        lost = []
        for book in (own, shipped.codebook(config, 64, 64)):
            codec = CodedPages.like(x, which, config.page_size, book)
            lost.append(float((codec.decode(codec.encode(x), x.dtype) - x).norm() / x.norm()))
        assert max(lost) < 0.15
        assert lost[1] < 1.15 * lost[0]
