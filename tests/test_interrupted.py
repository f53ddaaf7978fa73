"""Rows appear and are kept as they come; whatever stops a command, it says how to go on, and does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import done, llama, pqcache, save

from hf_pqcache.eval.session import session as module
from hf_pqcache.eval.session.results import Results

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(llama(), tmp_path_factory.mktemp("model") / "ckpt")


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Raises an error in place of measuring the n-th row's figures."""

    def stop(n: int, error: BaseException) -> None:
        real, calls = module.Session.measure, [0]

        def measure(self: Any, rows: Any, run: Any, *more: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == n:
                raise error
            return real(self, rows, run, *more, **options)

        monkeypatch.setattr(module.Session, "measure", measure)

    return stop


LINES = {
    "memory": ("eval", "memory", "--cache", "dynamic", "--lengths", "32,64,128"),
    "recall": ("eval", "recall", "--cache", "dynamic", "--lengths", "64", "--depths", "0,0.5,1", "--count", "1"),
    "compare": ("compare", "--caches", "dynamic,static", "--tokens", "128", "--limit", "1", "--recall-count", "1"),
}


@pytest.mark.parametrize("name", LINES)
def test_ctrl_c_keeps_rows_and_says_how_to_go_on(
    name: str, model: str, tmp_path: Path, stop_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = (*LINES[name], "--model", model, "--device", "cpu")
    with monkeypatch.context():
        stop_at(3, KeyboardInterrupt())
        stopped = pqcache(*line)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert stopped.exit_code == 130
    (file,) = tmp_path.glob("*.jsonl")
    kept = Results(file).rows
    assert len(kept) >= 2
    for row in kept:
        assert f": {row.metric} " in stopped.output, "rows are shown as they come"
    (hint,) = re.findall(r"--results (\S+)", stopped.output.splitlines()[-1])
    again = done(*line, "--results", hint)
    assert [row.provenance for row in Results(file).rows[: len(kept)]] == [row.provenance for row in kept]
    assert len(Results(file)) > len(kept)
    assert "Ctrl-C" not in again.output


def test_with_results_the_same_command_goes_on(
    model: str, tmp_path: Path, stop_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = (*LINES["memory"], "--model", model, "--device", "cpu", "--results", "rows.jsonl")
    stop_at(2, KeyboardInterrupt())
    stopped = pqcache(*line)
    assert stopped.exit_code == 130
    assert "3 rows are in rows.jsonl: the same command" in stopped.output.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_error_keeps_rows_too(model: str, tmp_path: Path, stop_at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stop_at(2, MemoryError("no memory left"))
    stopped = pqcache(*LINES["memory"], "--model", model, "--device", "cpu")
    assert stopped.exit_code == 1
    assert "--results pqcache-unfinished" in stopped.output
    assert stopped.output.splitlines()[-1] == "Error: no memory left"


def test_nothing_is_left_of_a_command_that_ends(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done(*LINES["memory"], "--model", model, "--device", "cpu")
    options = ("--tasks", "recall", "-M", 8, "--nbits", 4, "--tokens", 96, "--recall-count", 1)
    done("sweep", "--model", model, "--device", "cpu", *options)
    assert pqcache(*LINES["memory"], "--model", model, "--device", "cpu", "--batch", "0").exit_code == 2
    assert pqcache(*LINES["memory"][:-1], "100000", "--model", model, "--device", "cpu").exit_code == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", [(), ("--json", "rows.json"), ("--json", "-")], ids=["nowhere", "a file", "the output"])
@pytest.mark.parametrize("kind", ["kernel", "generate"])
def test_ctrl_c_keeps_the_rows_of_a_benchmark(
    kind: str, to: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"kind": "decode", "shape": "llama-3.1-8b", "tokens": tokens, "cache": "pq"} for tokens in (1024, 2048)]

    def measured(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        yield from rows
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"hf_pqcache.eval.bench.{kind}.bench_{kind}", measured)
    stopped = pqcache("bench", kind, *to)
    assert stopped.exit_code == 130
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text()) == rows
    assert f"2 rows are in {kept.name}" in stopped.output
    assert stopped.output.splitlines()[-1].startswith("Error: stopped by Ctrl-C")


def test_quiet_shows_the_table_only(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = done(*LINES["memory"], "--model", model, "--device", "cpu", "--quiet")
    assert result.stderr == ""
    assert "kv_bytes" in result.stdout
