"""Perplexity of a running cache: equals the exact one, and the stream simulation, token by token."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from hf_pqcache.codebook.calibrate import calibrate
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.demo import MODEL, TEXT
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.eval.measure.deployed import cache_perplexity
from hf_pqcache.eval.measure.memory import measure_memory
from hf_pqcache.eval.measure.perplexity import perplexity
from hf_pqcache.eval.session.caches import CacheSpec, head_dim_of, storage_bytes, weigh
from hf_pqcache.eval.session.models import load_model, public_name, token_ids
from hf_pqcache.models.names import cache_kwargs


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any, torch.Tensor]:
    model, tokenizer = load_model(MODEL, dtype="float32", device="cpu")
    return model, tokenizer, token_ids(tokenizer, TEXT.read_text()[:4000])


def test_a_folder_is_called_by_its_name() -> None:
    assert public_name(MODEL) == Path(MODEL).name
    assert public_name("meta-llama/Llama-2-7b-hf") == "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize("name", ["dynamic", "static"])
@pytest.mark.parametrize(("chunk", "stride"), [(1, 60), (16, 100), (33, 50)])
def test_an_exact_cache_gives_the_exact_perplexity(tiny: Any, name: str, chunk: int, stride: int) -> None:
    model, _, ids = tiny
    common: dict[str, Any] = {"window": 120, "stride": stride, "max_windows": 2, "progress": False}
    expected = perplexity(model, None, ids, **common).value
    spec = CacheSpec(name)
    assert cache_perplexity(model, ids, lambda n, rows: spec.make(model, n, rows), chunk=chunk, **common) == pytest.approx(
        expected, rel=1e-5
    )


def test_stream_is_what_the_deployed_cache_does_token_by_token(tiny: Any) -> None:
    model, tokenizer, ids = tiny
    config = PQConfig(num_subspaces=16, num_bits=4, page_size=16, extended_residual=32)
    book = calibrate(model, tokenizer, TEXT.read_text()[4000:12000], config, num_tokens=1000, window=500, progress=False)
    common: dict[str, Any] = {"window": 200, "max_windows": 2, "progress": False}
    exact = perplexity(model, None, ids, **common).value
    stream = perplexity(model, None, ids, mode="stream", codebook=book, config=config, **common).value
    spec = CacheSpec("pq", config.to_dict(), book)
    deployed = cache_perplexity(model, ids, lambda n, rows: spec.make(model, n, rows), chunk=1, prefill=8, **common)
    assert deployed == pytest.approx(stream, rel=1e-5)
    assert abs(stream / exact - 1) > 1e-3  # otherwise the line above could not fail


def test_chunks_in_step_with_pages_see_what_single_tokens_see(tiny: Any) -> None:
    """Of the tokens of a page all but the last: the figures are the same but for what a page more, once a page, is worth."""
    model, _, ids = tiny
    config = PQConfig(page_size=16, sink_tokens=2, extended_residual=20)
    spec = CacheSpec.parse("kivi:2:g32", head_dim_of(model.config), config.replace(page_size=32))

    def run(chunk: int, prefill: int, batch: int = 1) -> float:
        common: dict[str, Any] = {"window": 250, "max_windows": 3, "progress": False}
        make = lambda n, rows: spec.make(model, n, rows)  # noqa: E731
        return math.log(cache_perplexity(model, ids, make, chunk=chunk, prefill=prefill, batch=batch, **common))

    single, exact = run(1, 22), math.log(perplexity(model, None, ids, window=250, max_windows=3, progress=False).value)
    assert abs(single - exact) > 5e-3
    assert abs(run(32, 22) - single) < 0.05 * abs(single - exact)
    assert run(32, 22, batch=3) == pytest.approx(run(32, 22), rel=1e-6)


@pytest.mark.parametrize("name", ["dynamic", "kivi:4:g32", "turboquant:3.5", "paged-kv"])
def test_windows_run_together_as_rows(tiny: Any, name: str) -> None:
    """Whatever their number: seven, of which the last is shorter and the first has more that is scored."""
    model, _, ids = tiny
    spec = CacheSpec.parse(name, head_dim_of(model.config), PQConfig(page_size=32, extended_residual=32))
    common: dict[str, Any] = {"window": 120, "stride": 70, "chunk": 16, "progress": False}
    found = [cache_perplexity(model, ids[:530], lambda n, r: spec.make(model, n, r), batch=b, **common) for b in (1, 3, 16)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("text", ["quanto:4", "quanto:2", "hqq:4", "hqq:3", "hqq:2", "fp8"])
def test_peers_run_weigh_and_cost_more_with_fewer_bits(tiny: Any, text: str) -> None:
    model, _, ids = tiny
    spec = CacheSpec.parse(text, head_dim_of(model.config))
    try:
        cache = spec.make(model, 200)
    except ImportError as error:
        pytest.skip(str(error))
    with torch.inference_mode():
        model(ids[None, :200], **cache_kwargs(cache))
    assert 2 < weigh(cache, model, 200).bits < 8.6  # type: ignore[operator]
    common: dict[str, Any] = {"window": 200, "max_windows": 1, "progress": False}
    exact = perplexity(model, None, ids, **common).value
    value = cache_perplexity(model, ids, lambda n, rows: spec.make(model, n, rows), chunk=16, **common)
    assert value != pytest.approx(exact, rel=1e-6)
    assert value == pytest.approx(exact, rel=0.02 if text in ("quanto:4", "hqq:4", "fp8") else 1.0)


@pytest.mark.parametrize("name", ["pq", "paged-kv"])
def test_a_pool_is_made_for_all_rows_of_a_batch(tiny: Any, name: str) -> None:
    model = tiny[0]
    shape = PQConfig(num_subspaces=16, num_bits=4, page_size=16, extended_residual=16)
    spec = CacheSpec.parse(name, head_dim_of(model.config), shape)
    found = measure_memory(model, lambda: spec.make(model, 130, 3), tokens=126, batch=3)
    assert found.cache.tokens > 0
    capped = CacheSpec.parse(name, head_dim_of(model.config), shape.replace(max_pages=9))  # for one row and not for two
    with pytest.raises(ValueError, match="max_pages=9 pages of 16 tokens are too few"):
        capped.make(model, 130, 2)
    with pytest.raises(PagesExhaustedError):
        measure_memory(model, lambda: capped.make(model, 130), tokens=126, batch=3)


def test_a_missing_library_is_named_with_the_line_to_type(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hqq", None)
    with pytest.raises(ImportError, match="pip install hqq"):
        CacheSpec.parse("hqq", 64).make(tiny[0], 10)


def test_weighing_a_dynamic_cache_counts_its_tensors(tiny: Any) -> None:
    model, _, ids = tiny
    cache = CacheSpec("dynamic").make(model, 100)
    with torch.inference_mode():
        model(ids[None, :100], **cache_kwargs(cache))
    found = weigh(cache, model, 100)
    assert found.tokens == sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert found.bits == 32


def test_a_storage_shared_by_tensors_counts_once() -> None:
    x = torch.zeros(100, dtype=torch.uint8)
    assert storage_bytes([x, {"half": x[:50]}, torch.zeros(8, dtype=torch.uint8)]) == 108


def test_cache_names_are_read_and_bad_ones_named() -> None:
    assert CacheSpec.parse("pq:3", 128).config == PQConfig(bits=3)
    assert CacheSpec.parse("pq", 128).label == "pq 4 bits"
    own = PQConfig(num_subspaces=32, num_bits=5, page_size=32)
    assert CacheSpec.parse("pq:2", 128, own).config == PQConfig(bits=2, page_size=32)
    spelled = CacheSpec.parse("pq", 128, own)
    assert (spelled.label, spelled.config.codes("value", 128)) == ("pq M=32 n=5", (32, 5))
    sides = CacheSpec.parse("pq", 128, PQConfig(value_subspaces=32, value_bits=6))  # keys go by the 4 bits
    assert (sides.label, sides.config.codes("key", 128)) == ("pq M=64/32 n=8/6", (64, 8))
    assert CacheSpec.parse("pq", 0, own).config == own  # layers differ: nothing to spell out
    with pytest.raises(ValueError, match="num_subspaces=48 does not cut keys of 128"):
        CacheSpec.parse("pq", 128, PQConfig(num_subspaces=48))
    assert CacheSpec.parse("hqq", 64).settings == {"nbits": 4}
    with pytest.raises(ValueError, match="use one of"):
        CacheSpec.parse("zip", 64)
    with pytest.raises(ValueError, match=r"use one of \(4, 2\)"):
        CacheSpec.parse("quanto:3", 64)
    with pytest.raises(ValueError, match="no choice of bits"):
        CacheSpec.parse("fp8:8", 64)


def test_true_bits_count_codes_and_scales_of_both_sides() -> None:
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=128, num_hidden_layers=2)
    keys, values = 4 + 8 * (2 * 128 + 16) / (64 * 128), 4 + 8 / 128  # mean, magnitude, step of a page; magnitude of a token
    assert CacheSpec.parse("pq:4", 128).true_bits(config) == pytest.approx((keys + values) / 2)
    million = Codebook(*(torch.randn(64, 16, 2).half() for _ in range(2)))
    assert CacheSpec("pq", PQConfig().to_dict(), million).true_bits(config) == 2.0
    assert CacheSpec("dynamic").true_bits(config, 32) == 32
    assert CacheSpec.parse("quanto:4", 128).true_bits(config) == 4.5
    assert CacheSpec.parse("hqq:1", 128).true_bits(config) is None
    tiny = LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4, num_hidden_layers=2)
    assert CacheSpec.parse("pq:4", 4).true_bits(tiny) is None
