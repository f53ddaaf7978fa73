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
    configs = grid(PQConfig(page_size=32), 64, [32, 16], [8, 4], [64, 128])
    assert len(configs) == len(set(configs)) == 8
    assert all(config.page_size == 32 for config in configs)
    assert {c.num_subspaces for c in grid(PQConfig(), 64, [], [8], [128])} == {32, 16}
    with pytest.raises(ValueError, match="num_subspaces=48"):
        grid(PQConfig(), 64, [48], [8], [128])


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = "sweep --model tiny -M 16,8 --nbits 4 --extended-residual 32,64 --tasks demo,recall --tokens 256 --limit 1"
    line += " --recall-count 2 --calibration-tokens 300 --quiet --results rows.jsonl --json found.json --plot sweep.png"
    done = CliRunner().invoke(main, line.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    exact, *lines = json.loads(Path("found.json").read_text())["lines"]
    assert (exact["cache"], exact["saved"]) == ("exact", 0)
    assert {line["cache"] for line in lines} == {f"M={m} n=4 recent={r}" for m in (16, 8) for r in (32, 64)}
    config = AutoConfig.from_pretrained(demo.MODEL)
    for found in lines:
        planned = plan_memory(config, tokens=256, pq_config=PQConfig(**found["config"]))["pq"]
        assert found["bytes_used"] == planned.total - planned.codebooks
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
