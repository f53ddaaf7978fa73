"""plan_memory: what it announces from a config is what the caches then hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_models import build, codebook_of
from transformers import AutoConfig, DynamicCache, LlamaConfig

from hf_pqcache import PagedKVCache, PagedPQCache, PQConfig, demo, plan_memory
from hf_pqcache.cache.footprint import layer_shapes
from hf_pqcache.cli import main
from hf_pqcache.eval.session.caches import CacheSpec, weigh
from hf_pqcache.eval.session.cards import tokens_that_fit, weight_bytes
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = PQConfig(page_size=16, sink_tokens=4, extended_residual=16, num_bits=4)


def filled(model: Any, cache: Any, batch: int, tokens: int) -> Any:
    ids = torch.randint(5, 90, (batch, tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids, **cache_kwargs(cache), use_cache=True)
    return cache


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "mistral"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 20), (1, 200), (3, 101)])
def test_ours_hold_what_was_planned(name: str, batch: int, tokens: int) -> None:
    model, book = build(name), codebook_of(name)
    shape = SHAPE
    planned = plan_memory(model.config, tokens=tokens, batch=batch, pq_config=shape, dtype_bytes=4)
    found = filled(model, PagedPQCache(model.config, book, shape), batch, tokens).stats()
    expected = planned["pq"]
    assert found["bytes"]["codes"] == expected.stored
    assert found["bytes"]["window"] == expected.window
    assert found["pages_used"] == expected.pages
    assert found["bytes"]["codebooks"] == pytest.approx(expected.codebooks, rel=1.01)  # here float32, as the model
    in_pages = found["pages_used"] * shape.page_size * sum(h * (dk + dv) for h, dk, dv in layer_shapes(model.config))
    assert in_pages == 0 or found["true_bits"] == pytest.approx(8 * found["bytes"]["codes"] / in_pages)
    assert found["bytes_fp16"] == (planned["dynamic"].total - planned["dynamic"].other_layers) // 2
    exact = filled(model, PagedKVCache(model.config, page_size=16), batch, tokens).stats()
    assert exact["bytes"]["pages"] == planned["paged-kv"].stored
    assert exact["bytes"]["window"] == planned["paged-kv"].window


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_exact_caches_hold_what_was_planned(name: str) -> None:
    model = build(name)
    planned = plan_memory(model.config, tokens=100, batch=2, dtype_bytes=4)["dynamic"]
    cache = filled(model, DynamicCache(config=model.config), 2, 100)
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == planned.total


def test_fp8_holds_what_was_planned() -> None:
    model = build("llama")
    spec = CacheSpec("fp8")
    try:
        cache = filled(model, spec.make(model, 200), 1, 200)
    except ImportError as error:
        pytest.skip(str(error))
    assert weigh(cache, model, 200).tokens == pytest.approx(plan_memory(model.config, tokens=200)["fp8"].total, rel=0.05)


def test_a_plan_tells_bits_and_savings() -> None:
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32)
    planned = plan_memory(config, tokens=131072, batch=4)
    assert planned["dynamic"].total == 4 * 131072 * 32 * 2 * 8 * 128 * 2
    for bits in (4, 3, 2):  # codes, scales and offsets; the window and tables are little at this length
        true = CacheSpec("pq", PQConfig(bits=bits).to_dict()).true_bits(config)
        assert bits < true <= bits + 0.3
        assert true - 0.01 < planned.bits(f"pq:{bits}") < true + 0.03
    assert planned.saved("pq:4") == planned["dynamic"].total - planned["pq:4"].total
    assert planned["pq:4"].codebooks == 2 * 256 * 2 * 2  # one set for keys and one for values
    json.dumps(planned.to_dict())


@pytest.mark.parametrize("room", [1 << 28, 1 << 32])
def test_tokens_that_fit_fit_and_a_page_more_does_not(room: int) -> None:
    config = AutoConfig.from_pretrained(demo.MODEL)
    for cache, tokens in tokens_that_fit(config, ["dynamic", "pq:4", "pq:2"], room, batch=2).items():
        assert plan_memory(config, tokens=tokens - 128, batch=2)[cache].total <= room
        assert plan_memory(config, tokens=tokens + 128, batch=2)[cache].total > room


def test_weights_are_counted_without_loading_them() -> None:
    size = sum(file.stat().st_size for file in Path(demo.MODEL).glob("*.safetensors"))
    assert weight_bytes(AutoConfig.from_pretrained(demo.MODEL)) == pytest.approx(size, rel=0.01)


def test_the_command_needs_a_config_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(demo.MODEL) / "config.json").read_text())
    for model in (tmp_path, tmp_path / "config.json"):
        line = ["plan", str(model), "--tokens", "8K", "--batch", "2", "-M", "16", "--nbits", "4", "--json", "-"]
        done = CliRunner().invoke(main, line, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        found = {x["cache"]: x for x in json.loads(done.stdout)["caches"]}
        assert found["pq"]["bits"] < found["pq:2"]["bits"] < found["dynamic"]["bits"] == 16
        assert "H200" in done.stderr
