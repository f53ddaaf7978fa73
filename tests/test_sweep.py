"""A sweep has every shape and task once, its changes are against the exact cache, and its bytes those of a plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import AutoConfig

from hf_pqcache import PQConfig, demo, plan_memory
from hf_pqcache.cli import main
from hf_pqcache.eval.search.sweep import grid

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_grid_is_the_product_of_what_was_asked() -> None:
    configs = grid(PQConfig(page_size=32), 64, [64, 128], {"num_subspaces": [32, 16], "num_bits": [8, 4]})
    assert len(configs) == len(set(configs)) == 8
    assert all(config.page_size == 32 for config in configs)
    assert {config.codes("value", 64) for config in configs} == {(m, n) for m in (32, 16) for n in (8, 4)}
    sides = grid(PQConfig(), 64, [128], {"num_subspaces": [32], "value_subspaces": [32, 16], "value_bits": [6]})
    assert [(c.codes("key", 64), c.codes("value", 64)) for c in sides] == [((32, 8), (32, 6)), ((32, 8), (16, 6))]
    with pytest.raises(ValueError, match="num_subspaces=48"):
        grid(PQConfig(), 64, [128], {"num_subspaces": [48]})


def test_operating_points_are_the_grid_where_nothing_is_asked_for() -> None:
    own = PQConfig(num_subspaces=16, num_bits=4)  # of a model config
    for codes in ({}, {"bits": [4, 3, 2]}):
        assert grid(own, 64, [128], codes) == [PQConfig(bits=bits) for bits in (4, 3, 2)]
    assert grid(own, 64, [128], {"num_bits": [6]})[0].codes("key", 64) == (16, 6)  # the rest as in the model config


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = "sweep --model tiny -M 16,8 --nbits 4 --extended-residual 32,64 --tasks demo,recall --tokens 256 --limit 1"
    line += " --recall-count 2 --quiet --results rows.jsonl --json found.json --plot sweep.png"
    done = CliRunner().invoke(main, line.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    exact, *lines = json.loads(Path("found.json").read_text())["lines"]
    assert (exact["cache"], exact["saved"]) == ("exact", 0)
    assert {line["cache"] for line in lines} == {f"M={m} n=4 recent={r}" for m in (16, 8) for r in (32, 64)}
    config = AutoConfig.from_pretrained(demo.MODEL)
    for found in lines:
        planned = plan_memory(config, tokens=256, pq_config=PQConfig(**found["config"]))["pq"]
        assert found["bytes_used"] == planned.total
        assert 0.5 < found["bits"] < 2  # true ones
        assert found["changes"]["demo"] == pytest.approx(found["values"]["demo"] / exact["values"]["demo"] - 1)
        assert found["changes"]["recall"] == pytest.approx(found["values"]["recall"] - exact["values"]["recall"])
    assert Path("sweep.png").read_bytes().startswith(b"\x89PNG")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing is measured twice")

    monkeypatch.setattr("hf_pqcache.eval.tasks._text.perplexity", refuse)
    monkeypatch.setattr("hf_pqcache.eval.tasks.recall.recall_at", refuse)
    again = CliRunner().invoke(main, line.split(), catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert "over the one that was there" in again.output
