"""`pqcache bench serve --replicas`: what counts as throughput, what the server is told, and what is refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from served import served

from hf_pqcache.cli import main
from hf_pqcache.cli.commands import _bench_replicas
from hf_pqcache.eval.bench import replicas as bench
from hf_pqcache.eval.bench.replicas import Load

pytestmark = pytest.mark.usefixtures("one_thread")
LINE = ["bench", "serve", "--model", "tiny", "--prompt-tokens", "16", "--output-tokens", "8", "--concurrency", "4"]


def test_a_closed_loop_counts_what_ends_in_time() -> None:
    load = Load(prompt_tokens=8, output_tokens=6, clients=3, warm_up_s=0.3, seconds=1.6)
    with served() as server:
        row = asyncio.run(bench._closed_loop(server.url, psutil.Process(), load))
        asked = server.metric('pqcache_requests_total{outcome="length"}')
    assert 0 < row["requests"] < asked, "neither what came before nor what was under way"
    assert 3 * row["requests"] <= row["throughput_tok_s"] * row["seconds"] <= 9 * row["requests"]
    assert row["seconds"] == pytest.approx(1.6, abs=0.3)
    assert len(row["replica_running"]) == 1
    assert 0 <= row["replica_running"][0] <= 3
    assert row["request_p50_s"] <= row["request_p99_s"]
    assert row["replica_cores_busy"] == []  # this process is client and server
    assert row["other_cores_busy"] > 0.1


def test_what_a_server_refuses_ends_the_measurement() -> None:
    load = Load(prompt_tokens=5000, output_tokens=6, clients=2, warm_up_s=30, seconds=1.0)
    with served() as server, pytest.raises(RuntimeError, match=r"the server answered 400: .*context_length_exceeded"):
        asyncio.run(bench._closed_loop(server.url, psutil.Process(), load))


def test_shares_of_processors_are_of_the_time_that_counts() -> None:
    row = bench._row([(1.0, 0.5, 10), (2.0, 1.5, 30)], 4.0, ({7: 1.0}, 2.0), ({7: 4.0, 8: 1.0}, 3.0))
    assert (row["throughput_tok_s"], row["requests_s"], row["request_p99_s"]) == (10.0, 0.5, 1.5)
    assert (row["replica_cores_busy"], row["other_cores_busy"]) == ([0.25, 0.75], 0.25)
    with pytest.raises(RuntimeError, match="no request ended within 4 s"):
        bench._row([], 4.0, ({}, 0.0), ({}, 0.0))


@pytest.mark.slow
def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"did not start: .*no model config 'nobody'"), bench._server(["nobody"]):
        pass


def test_rows_compare_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def measure(words: list[str], count: int, load: Load) -> dict[str, Any]:
        told.append((words, load))
        return {"replicas": count, **bench._row([(1.0, 0.5, 10 * count)], 2.0, ({}, 0.0), ({}, 0.0)), "replica_running": [1.0]}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    words = ["--replicas", "1,2", "--dtype", "float32", "--max-requests", "4", "--pin", "--variant", "3", "--seconds", "6"]
    done = CliRunner().invoke(main, [*LINE, *words, "--json", str(tmp_path / "rows.json")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["replicas"], row["times_first"], row["kind"]) for row in rows] == [(1, 1.0, "replicas"), (2, 2.0, "replicas")]
    server = ["tiny", "--bits", "3", "--dtype", "float32", "--max-requests", "4", "--pin"]
    assert told == [(server, Load(16, 8, 4, 2.0, 6.0))] * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--replicas", "2", "--request-rate", "3"], "--request-rate does nothing with --replicas"),
        (["--replicas", "2", "--prompt-tokens", "16,32"], "--prompt-tokens: give one number"),
        (["--replicas", "2", "--concurrency", "full"], "--concurrency: give one number"),
        (["--pin"], "--pin does nothing without --replicas"),
    ],
)
def test_what_does_not_go_together(words: list[str], said: str) -> None:
    done = CliRunner().invoke(main, [*LINE, *words])
    assert (done.exit_code, said in done.output) == (2, True), done.output


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = CliRunner().invoke(main, [*LINE, "--replicas", "2"])
    assert (done.exit_code, "pip install 'hf-pqcache[ray]'" in done.output) == (1, True)
    assert _bench_replicas.ONLY.keys() <= {"seconds", "max_requests", "is_pinned"}
