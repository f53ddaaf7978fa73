"""`pqcache bench pipeline`: each variant is the engine that it says, and rows tell what was sent and how it was stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hf_pqcache.batching import Partition
from hf_pqcache.cli import main
from hf_pqcache.cli.commands import _bench_pipeline
from hf_pqcache.eval.bench import pipeline, plot

pytestmark = pytest.mark.usefixtures("one_thread")
LINE = [
    "bench",
    "pipeline",
    "--models",
    "tiny",
    "--dtype",
    "float32",
    "--synthetic-context",
    "40,60",
    "--synthetic-output",
    "6",
]
LINE += ["--synthetic-batch-sizes", "3", "--synthetic-num-batches", "2"]


def run(*words: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(main, [*LINE, *words, "--json", "-", "--quiet"])
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_variant_tells_what_was_sent(tmp_path: Path) -> None:
    rows = run("--no-check", "--plot", str(tmp_path / "pipeline.png"))
    assert [row["variant"] for row in rows] == [name for name in pipeline.VARIANTS for _ in range(2)]
    assert (tmp_path / "pipeline.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert row["prompt_tokens"] == 6 * row["context"]
        assert row["requests"] == 6
        assert row["failed"] == 0
        seconds = row["seconds"]
        assert row["throughput_tok_s"] == pytest.approx(6 * 6 / seconds)
        assert row["total_tok_s"] == pytest.approx((6 * 6 + row["prompt_tokens"]) / seconds)
        assert row["greenctx_available"] is False
        assert row["sm_counts"] == {}
        assert {"ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "versions", "workload"} <= row.keys()
    assert all("no streams" in row["greenctx_reason"] for row in rows if row["variant"] in ("triad", "greenctx-only"))


def test_logits_are_checked_of_each_variant_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(pipeline, "check_logits", lambda model, variant, **beside: asked.append((variant, beside)) or 0.0)
    run("--variants", "baseline,triad", "--greenctx-compress-ratio", "0.1,0.2", "--greenctx-main-stream")
    cut = [Partition(ratio, None, main_stream=True) for ratio in (0.1, 0.2)]
    assert asked == [
        ("exact", {"compress": "inline", "partition": None}),
        *(("4", {"compress": "partition", "partition": partition}) for partition in cut),
    ]


def test_names_on_the_command_line_are_those_of_the_benchmark() -> None:
    assert tuple(pipeline.VARIANTS) == _bench_pipeline.VARIANTS


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--variants", "baseline,quick"], "quick"),
        (["--workloads", "chat"], "synthetic-long"),
        (["--greenctx-compress-ratio", "1.5"], "between 0 and 1"),
        (["--greenctx-compress-ratio", "0.7", "--greenctx-main-ratio", "0.7"], "more than the device"),
    ],
)
def test_mistakes_are_one_line(words: list[str], why: str) -> None:
    done = CliRunner().invoke(main, [*LINE, *words])
    assert done.exit_code == 2
    assert why in done.output


def test_a_sweep_is_drawn_by_its_multiprocessors() -> None:
    row = {"context": 64, "output_tokens": 8, "batch": 4, "model": "tiny", "throughput_tok_s": 10.0, "dtype": "float16"}
    parts = [{"device": 132, "compress": n, "main": 132 - n} for n in (8, 16)]
    rows = [row | {"variant": "triad", "sm_counts": counts} for counts in parts] + [row | {"variant": "coded", "sm_counts": {}}]
    assert [plot._pipeline_variant(one) for one in rows] == ["triad, 8 of 132 SMs", "triad, 16 of 132 SMs", "coded"]
    assert plot.draw(rows, "pipeline").startswith(b"\x89PNG")
