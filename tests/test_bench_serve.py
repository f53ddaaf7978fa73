"""`pqcache bench serve`: what its figures mean, that wrong logits are noticed, and that a run goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from served import tiny

from hf_pqcache.cli import main
from hf_pqcache.eval.bench import latency, plot
from hf_pqcache.eval.bench import serve as bench
from hf_pqcache.eval.bench.latency import Goal, Served
from hf_pqcache.eval.bench.load import moments
from hf_pqcache.serve.manager import VARIANTS

pytestmark = pytest.mark.usefixtures("one_thread")
LINE = ["bench", "serve", "--model", "tiny", "--dtype", "float32", "--prompt-tokens", "40", "--output-tokens", "6"]


def run(*words: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(main, [*LINE, *words, "--json", "-", "--quiet"])
    assert done.exit_code == 0, done.output
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_figures() -> None:
    requests = [
        Served(10, 0.0, [1.0, 1.1, 1.2, 1.3]),
        Served(20, 0.5, [1.1, 1.2, 1.3, 2.5]),
        Served(30, 0.6, error="no"),
    ]
    row = latency.figures(requests, Goal(ttft_ms=1000, tpot_ms=100))
    assert (row["requests"], row["failed"], row["error"]) == (3, 1, "no")
    assert row["throughput_tok_s"] == pytest.approx(8 / 2.5)
    assert row["total_tok_s"] == pytest.approx(38 / 2.5)
    assert row["decode_tok_s"] == pytest.approx(4 / 0.2)  # from 1.1 to 1.3
    assert row["goodput_req_s"] == pytest.approx(0 / 2.5) or row["goodput_req_s"] == pytest.approx(1 / 2.5)
    assert row["ttft_p50_ms"] == pytest.approx(600)
    assert row["ttft_p99_ms"] == pytest.approx(1000)
    assert row["itl_p99_ms"] == pytest.approx(1200)
    assert row["tpot_p50_ms"] == pytest.approx(100)
    assert latency.figures([Served(5, 0.0, error="no")], Goal())["failed"] == 1


def test_a_good_request_keeps_both_goals() -> None:
    requests = [Served(1, 0.0, [0.5, 0.6]), Served(1, 0.0, [0.5, 0.9]), Served(1, 0.0, [0.9, 1.0])]
    assert latency.figures(requests, Goal(ttft_ms=600, tpot_ms=200))["goodput_req_s"] == pytest.approx(1)


def test_requests_come_at_random_with_the_rate_asked_for() -> None:
    times = moments(2000, 8.0, seed=1)
    gaps = torch.tensor(times).diff()
    assert times == moments(2000, 8.0, seed=1) != moments(2000, 8.0, seed=2)
    assert float(gaps.mean()) == pytest.approx(1 / 8, rel=0.1)
    assert float(gaps.std()) == pytest.approx(1 / 8, rel=0.15)  # as of an exponential distribution


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_checked(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny()
    assert bench.check_logits(model, variant) < 1e-3
    seen = bench.LogitsProbe.__call__

    def wrong(self: Any, input_ids: Any, scores: Any, args: Any) -> Any:
        return seen(self, input_ids, scores + 0.1 * scores.roll(1, -1), args)

    monkeypatch.setattr(bench.LogitsProbe, "__call__", wrong)
    with pytest.raises(RuntimeError, match=f"logits over {variant} blocks differ"):
        bench.check_logits(model, variant)


def test_closed_and_open_loops() -> None:
    closed = run("--variant", "stock", "--variant", "4", "--concurrency", "2,full", "--requests", "5", "--no-check")
    assert [row["concurrency"] for row in closed] == [2, None] * 2
    for row in closed:
        assert (row["kind"], row["requests"], row["failed"], row["begun_anew"]) == ("closed", 5, 0, 0)
        assert row["throughput_tok_s"] * 46 / 6 == pytest.approx(row["total_tok_s"])
        assert row["versions"]["transformers"]
        assert row["requests_that_fit"] >= row["in_flight"] > 1
    (over_http,) = run("--variant", "stock", "--request-rate", "50", "--requests", "5", "--no-check")
    assert (over_http["kind"], over_http["failed"], over_http["requests"], over_http["rate"]) == ("open", 0, 5, 50)
    assert over_http["ttft_p50_ms"] > 0 < over_http["itl_p99_ms"]
    assert plot.draw([*closed, over_http], "serve").startswith(b"\x89PNG")


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "serve.json"
    measured: list[str] = []

    def closed_loop(model: Any, case: bench.Case, goal: Goal) -> dict[str, Any]:
        if case.prompt_tokens == 50 and not measured.count("50"):
            measured.append("50")
            raise KeyboardInterrupt
        measured.append(str(case.prompt_tokens))
        return latency.figures([Served(case.prompt_tokens, 0.0, [1.0, 2.0])], goal)

    monkeypatch.setattr(bench, "closed_loop", closed_loop)
    line = [*LINE, "--variant", "stock", "--no-check", "--json", str(path), "--prompt-tokens", "40,50"]
    assert CliRunner().invoke(main, line).exit_code == 130
    assert [row["prompt_tokens"] for row in json.loads(path.read_text())] == [40]
    assert CliRunner().invoke(main, line).exit_code == 0
    assert measured == ["40", "50", "50"]
    assert CliRunner().invoke(main, [*line, "--seed", "1"]).exit_code == 0
    assert [(row["seed"], row["prompt_tokens"]) for row in json.loads(path.read_text())] == [(0, 40), (0, 50), (1, 40), (1, 50)]
    assert CliRunner().invoke(main, [*line, "--force"]).exit_code == 0
    assert measured.count("40") == 3
