"""A learnt press: what it computes, that training lowers its loss and leaves the model alone, and that a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from press_inputs import seen
from tiny_models import SMALL, build, codebook_of, tokens

from hf_pqcache import PagedPQCache, pressed
from hf_pqcache.cli.app import main
from hf_pqcache.compressors.mlp import MLPCompressor
from hf_pqcache.compressors.parse import parse
from hf_pqcache.compressors.queries import rotate
from hf_pqcache.compressors.training import Sample, Training, divergence, train
from hf_pqcache.models.names import cache_kwargs

SHAPE = {"factor": 4, "sinks": 2, "recent": 8}
TRAINING = Training(prompt=64, answer=24, batch=2, rate=3e-3)


def fresh() -> MLPCompressor:
    torch.manual_seed(0)
    return MLPCompressor(2, 16, 16, **SHAPE)


def text() -> torch.Tensor:
    return tokens(1, 600, seed=4)[0]


def test_it_begins_as_the_mean_of_each_group_at_the_position_of_its_middle() -> None:
    one = seen("llama")
    with torch.no_grad():
        keys, values = fresh().compress(**one)
    assert keys.shape == values.shape == (2, 2, 2 + 22 + 10, 16)  # 100 tokens: 2 first, 22 groups, 8 newest, 2 that fill none
    assert torch.equal(values[:, :, :2], one["values"][:, :, :2])
    assert torch.equal(keys[:, :, -10:], one["keys"][:, :, -10:])
    assert torch.allclose(values[:, :, 2], one["values"][:, :, 2:6].mean(2), atol=1e-6)
    # Keys that differ by their positions alone are one key at the middle's.
    cos, sin = one["kwargs"]["position_embeddings"]
    same = torch.randn(1, 2, 1, 16).expand(1, 2, 100, 16)
    turned = rotate(one["module"], same, cos[:1], sin[:1])
    with torch.no_grad():
        merged, _ = fresh().compress(one["module"], one["hidden_states"], turned, turned, None, one["kwargs"])
    # Group i stands for positions 2 + 4i to 5 + 4i, whose middle is 4 + 4i; up to what its mean loses, in the same direction.
    expected = turned[:, :, 4:88:4]
    assert torch.nn.functional.cosine_similarity(merged[:, :, 2:23], expected, dim=-1).min() > 0.7


def test_training_lowers_the_loss_and_changes_no_weight_of_the_model(tmp_path: Path) -> None:
    model = build("llama")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    sample = Sample(TRAINING.windows(text(), 10_000), TRAINING.prompt)
    press = fresh()
    with torch.no_grad():
        first = float(divergence(model, press, sample))
    losses = train(model, press, text(), TRAINING, steps=40, folder=tmp_path)
    with torch.no_grad():
        last = float(divergence(model, press, sample))
    assert len(losses) == 40
    assert last < first
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    model, whole, parts = build("llama"), fresh(), fresh()
    expected = train(model, whole, text(), TRAINING, steps=6, folder=tmp_path / "whole")
    train(model, parts, text(), TRAINING, steps=3, folder=tmp_path / "parts")
    again = fresh()
    assert train(model, again, text(), TRAINING, steps=6, folder=tmp_path / "parts") == expected
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    with pytest.raises(ValueError, match="give these, or another folder"):
        train(model, fresh(), text(), Training(prompt=60, answer=24), steps=6, folder=tmp_path / "parts")


def test_what_was_saved_compresses_prompts_of_a_cache(tmp_path: Path) -> None:
    model, ids = build("llama"), tokens(2, 100)
    train(model, fresh(), text(), TRAINING, steps=2, folder=tmp_path)
    cache = PagedPQCache(model.config, codebook_of("llama"), SMALL)
    with pressed(model, f"mlp:{tmp_path}"), torch.no_grad():
        model(ids, **cache_kwargs(cache))
    assert cache.stats()["removed"] == {0: 66, 1: 66}
    assert cache.get_seq_length() == 100
    with pytest.raises(FileNotFoundError, match="train-compressor"):
        parse(f"mlp:{tmp_path / 'nothing'}")
    (tmp_path / "compressor.json").write_text(json.dumps({**fresh().settings, "factor": 5}))
    with pytest.raises(ValueError, match="do not fit"):
        parse(f"mlp:{tmp_path}")


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(main, ["train-compressor", "--model", "tiny", "--quiet", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_trains_compares_and_draws(tmp_path: Path) -> None:
    sizes = ("--prompt", "96", "--answer", "16", "--recent", "8", "--batch", "1", "--steps", "2")
    files = ("-o", str(tmp_path / "c"), "--plot", str(tmp_path / "loss.png"), "--json", str(tmp_path / "loss.json"))
    assert "mlp:" in run(*sizes, *files)
    found = json.loads((tmp_path / "loss.json").read_text())
    assert len(found["losses"]) == 2
    assert found["held_out"].keys() == {"learnt", "mean", "knorm", "snapkv", "expected-attention", "streaming-llm"}
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "no group of 4" in run("--prompt", "60", "-o", str(tmp_path / "d"), code=1)
