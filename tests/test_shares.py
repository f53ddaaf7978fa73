"""Work that processes share gives the figures of one process, bit for bit, and what one has made is not made again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_pqcache import demo
from hf_pqcache.eval.measure import shares
from hf_pqcache.eval.session import distributed
from hf_pqcache.eval.session.results import Results

THIRDS = [1 / 3 + i * 1e-17 for i in range(7)]


def session(folder: Path) -> Any:
    return SimpleNamespace(results=SimpleNamespace(path=folder / "rows.jsonl"), force=False, progress=False)


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Lets this process be one of several, who have found what is in its journals."""
    monkeypatch.setattr(distributed, "gather", lambda found: found)

    def be(rank: int, processes: int) -> None:
        monkeypatch.setattr(distributed, "world", lambda: (rank, processes))

    return be


def test_shares_are_put_together_and_nothing_is_made_twice(tmp_path: Path, worlds: Callable[[int, int], None]) -> None:
    made: list[int] = []

    def work(i: int) -> float:
        made.append(i)
        return THIRDS[i]

    for rank in (1, 2):
        worlds(rank, 3)
        with pytest.raises(KeyError):  # the others' are not there yet
            shares.figures(session(tmp_path), ["a", "b"], name="n", unit="u")(7, work)
    assert made == [1, 4, 2, 5]
    worlds(0, 3)
    assert shares.figures(session(tmp_path), ["a", "b"], name="n", unit="u")(7, work) == THIRDS
    assert made == [1, 4, 2, 5, 0, 3, 6]
    worlds(0, 2)  # a later run with fewer of them
    assert shares.figures(session(tmp_path), ["a", "b"], name="n", unit="u")(7, work) == THIRDS
    assert len(made) == 7
    worlds(0, 1)
    assert shares.figures(session(tmp_path), ["a", "c"], name="n", unit="u") is shares.one_by_one


def test_other_work_has_another_journal(tmp_path: Path, worlds: Callable[[int, int], None]) -> None:
    worlds(0, 2)
    for keys, value in ((["a", "b"], 1.0), (["a", "c"], 2.0)):
        assert shares.figures(session(tmp_path), keys, name="n", unit="u")(1, lambda i, v=value: v) == [value]  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        "recall --lengths 256,512 --depths 0,1 --count 1 --plot {}.png",
        "wikitext --data-dir {} --window 64 --limit 5",
        "wikitext --cache dynamic --data-dir {} --window 64 --limit 5",
        "wikitext --mode cache --data-dir {} --window 64 --limit 3",
    ],
)
def test_rows_of_two_processes_are_those_of_one(line: str, tmp_path: Path) -> None:
    text = demo.TEXT.read_text(encoding="utf-8")[:6000]
    (tmp_path / "wiki.test.raw").write_text("".join(f" {part} \n" for part in text.split("\n")), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])

    def rows(name: str, processes: int) -> list[tuple[str, float]]:
        world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        words = [*line.format(tmp_path).split(), "--model", "tiny", "--quiet", "--results", str(tmp_path / f"{name}.jsonl")]
        command = [sys.executable, "-m", "hf_pqcache", "eval", *words]
        started = [
            subprocess.Popen(
                command,
                env={**os.environ, **world, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        for process in started:
            said = process.communicate(timeout=200)[1]
            assert process.returncode == 0, said[-2000:]
        return [(row.key, row.value) for row in Results(tmp_path / f"{name}.jsonl").rows]

    assert rows("two", 2) == rows("one", 1) != []
    assert len(list(tmp_path.glob("two.predictions/*/*.jsonl"))) == 2, "both have worked"
