"""`pqcache selftest`: it passes on this machine, and finds what is planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from hf_pqcache.attention import padding
from hf_pqcache.backends import torch_backend
from hf_pqcache.cli import main
from hf_pqcache.codebook import pq
from hf_pqcache.eval import selftest
from hf_pqcache.eval.selftest import checks, timing
from hf_pqcache.pages.block_pool import PageAllocator
from hf_pqcache.pages.layout import PageLayout
from hf_pqcache.storage.storage import Storage

CPU = checks.Machine(torch.device("cpu"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["selftest", *arguments])


def outcome_of(name: str) -> checks.Outcome:
    (found,) = checks.run_checks([check for check in selftest.CHECKS if check.name == name], CPU)
    return found


@pytest.mark.slow
def test_it_passes_here(tmp_path: Path) -> None:
    result = run("--quick", "--json", str(tmp_path / "selftest.json"))
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].startswith("selftest passed: ")
    written = json.loads((tmp_path / "selftest.json").read_text())
    assert [x["name"] for x in written["outcomes"]] == [check.name for check in selftest.CHECKS]
    assert {x["phase"] for x in written["outcomes"] if x["status"] == "ok"} == {1, 2, 3}
    assert all(x["detail"] for x in written["outcomes"]), "what was checked, or why not"
    assert "transformers" in json.dumps(written["provenance"]), "what a report needs"


def test_a_phase_alone() -> None:
    result = run("--phase", "1")
    assert result.exit_code == 0, result.output
    assert "1 data structures" in result.output
    assert "2 kernels" not in result.output
    assert run("--phase", "4").exit_code == 2
    assert run("--phase", "1", "--performance").exit_code == 2


def off_by_one(self: Storage, tokens: int, original: Callable[..., None] = Storage.crop) -> None:
    original(self, tokens + 1)


def second_nearest(x: Any, centroids: Any, original: Callable[..., Any] = pq.encode) -> Any:
    return original(x, centroids) ^ 1


def shifted(*args: Any, original: Callable[..., Any] = PageLayout.unpack) -> Any:
    codes, scales = original(*args)
    return codes.roll(1, dims=-1), scales


def louder(*args: Any, original: Callable[..., Any] = torch_backend.attend) -> Any:
    return 1.01 * original(*args)


FAULTS: dict[str, tuple[Any, str, Any, str]] = {
    "a page that is never freed": (PageAllocator, "release", lambda self, pages: None, "page allocator"),
    "codes read in another order": (PageLayout, "unpack", shifted, "layout of pages"),
    "a centroid that is not nearest": (pq, "encode", second_nearest, "product quantization"),
    "a crop that is off by one": (Storage, "crop", off_by_one, "rows of codes"),
    "a fork that shares nothing": (Storage, "fork", lambda self, source, target: None, "sequences"),
    "attention that is 1 % too large": (torch_backend, "attend", louder, "plain torch"),
    "left padding that is not seen": (padding, "leading_padding", lambda m, p, f, c, batch, g: [0] * batch, "generate, coded"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, broken, check = FAULTS[fault]
    monkeypatch.setattr(owner, name, broken)
    outcome = outcome_of(check)
    assert outcome.status == "FAILED"
    assert outcome.expected
    assert outcome.got
    assert outcome.fix
    assert outcome.seconds < 30


def test_a_failure_is_named_and_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(PageLayout, "unpack", shifted)
    result = run("--phase", "1", "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 1
    last = result.output.splitlines()[-1]
    assert "selftest FAILED" in last
    assert "layout of pages" in last
    assert "page allocator" not in last, "one failure does not stop the rest, nor stain it"
    for title in ("expected: ", "got: ", "what to do: "):
        assert title in result.output
    assert "Traceback" not in result.output
    failed = [x for x in json.loads((tmp_path / "out.json").read_text())["outcomes"] if x["status"] == "FAILED"]
    assert "layout of pages" in {x["name"] for x in failed}
    assert all("CheckFailed" in x["traceback"] for x in failed)
    assert "Traceback" in run("--phase", "1", "--debug").output


def test_an_error_counts_as_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(pq, "encode", broken)
    outcome = outcome_of("product quantization")
    assert (outcome.status, outcome.got) == ("FAILED", "RuntimeError: no such thing")


def test_caches_are_timed_and_their_tokens_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "PERFORMANCE", ("dynamic", "paged-kv"))
    monkeypatch.setattr(timing, "TOKENS", 200)
    monkeypatch.setattr(timing, "NEW_TOKENS", 8)
    result = run("--performance", "--json", str(tmp_path / "out.json"))
    assert result.exit_code == 0, result.output
    dynamic, paged = json.loads((tmp_path / "out.json").read_text())["caches"]
    assert dynamic["cache"] == "dynamic"
    assert dynamic["kv_bytes"] == 4 * 2 * 2 * 64 * 200 * 4, "4 layers, 2 heads of 64 numbers, float32"
    assert dynamic["tokens_per_s"] > 0
    assert paged["agreement"] == dynamic["agreement"] == 1.0

    monkeypatch.setattr(torch_backend, "attend", lambda *args: torch.zeros_like(louder(*args)))
    result = run("--performance")
    assert result.exit_code == 1
    assert "selftest FAILED: performance" in result.output
