"""Processes that have a core to themselves: no two the same one, and it comes back however its process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

if not hasattr(os, "sched_setaffinity"):
    pytest.skip("needs Linux", allow_module_level=True)

from hf_pqcache.serve import cores

PROGRAM = """
import os, sys, threading
from hf_pqcache.serve.cores import pinned
waits = threading.Event()
threading.Thread(target=waits.wait, daemon=True).start()
print(*pinned(lambda: [os.sched_getaffinity(int(thread)) for thread in os.listdir("/proc/self/task")]), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _none_is_held_after(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    yield
    while cores._HELD:
        cores._HELD.pop().close()


def test_each_claim_is_another_core_until_none_is_left() -> None:
    allowed = os.sched_getaffinity(0)
    assert {cores.claim() for _ in allowed} == allowed
    with pytest.raises(RuntimeError, match="start fewer replicas"):
        cores.claim()


@pytest.mark.slow
def test_all_threads_of_a_process_keep_to_its_core_which_comes_back() -> None:
    taken = cores.claim()
    made = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert made.stdout is not None
    said = made.stdout.readline().split()
    assert len(said) > 1
    assert len(set(said)) == 1
    (own,) = {int(word.strip("{}")) for word in said}
    assert own != taken
    made.kill()
    made.wait()
    assert cores.claim() == own
