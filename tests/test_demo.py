"""The demo's table in eval/RESULTS.md is what the command prints: loss and recall within tolerance, bytes to the last digit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoints import done, gpt2, save

from hf_pqcache.demo import TEXT
from hf_pqcache.eval.demo import COLUMNS, markdown

RESULTS = (Path(__file__).parents[1] / "eval" / "RESULTS.md").read_text(encoding="utf-8")


def table(text: str) -> dict[str, list[str]]:
    """cache -> the other cells, of the first table under the demo's heading."""
    found = re.findall(r"^\| ((?:exact|\d bits) .*?) \|$", text, flags=re.MULTILINE)
    rows = [[cell.strip() for cell in line.split("|")] for line in found]
    return {row[0]: row[1:] for row in rows if len(row) == len(COLUMNS)}


def number(cell: str) -> float:
    return float(cell.replace(",", "").removesuffix(" %") or "nan")


def test_the_results_have_the_table_as_the_command_writes_it() -> None:
    (demo,) = re.findall(r"## The demo, on any machine\n(.*?)\n## ", RESULTS, flags=re.DOTALL)
    row = {"perplexity": 1.0, "perplexity_change": 0.5, "recall": 1, "kv_bytes": 2000, "kv_ratio": 1.0, "true_bits": 16.0}
    head = markdown({"rows": [{"cache": "exact (fp16)", **row}]}).splitlines()
    assert "\n".join(head[:2]) in demo
    assert head[2] == "| exact (fp16) | 16.00 | 1.000 | | 100 % | 1.95 KiB | 100 % |"
    assert "pqcache demo --markdown" in demo


def test_a_small_model_gets_a_short_demo(tmp_path: Path) -> None:
    """GPT-2 has no head_dim in its config, and positions that end."""
    folder = save(gpt2(positions=320, heads=1), tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(TEXT.read_text(encoding="utf-8").split()[:900]))
    done(
        "demo",
        "--model",
        folder,
        "--text",
        tmp_path / "text.txt",
        "--markdown",
        tmp_path / "demo.md",
        "--json",
        tmp_path / "demo.json",
        "--quiet",
    )
    assert '"tokens": 296' in (tmp_path / "demo.json").read_text()
    assert len(table((tmp_path / "demo.md").read_text())) == 4


@pytest.mark.slow
def test_the_demo_told_is_what_the_command_prints(tmp_path: Path) -> None:
    (demo,) = re.findall(r"## The demo, on any machine\n(.*?)\n## ", RESULTS, flags=re.DOTALL)
    done("demo", "--markdown", tmp_path / "demo.md", "--quiet")
    told, measured = table(demo), table((tmp_path / "demo.md").read_text())
    assert list(told) == list(measured)
    tolerance = {"true bits": 0, "perplexity": 0.05, "change": 0.15, "recall": 10.0}
    for cache, cells in told.items():
        for (name, most), a, b in zip(tolerance.items(), cells, measured[cache], strict=False):
            assert number(a) == pytest.approx(number(b), abs=most, nan_ok=True), (cache, name)
        assert cells[len(tolerance) :] == measured[cache][len(tolerance) :], cache


def test_the_bytes_told_are_what_the_command_prints(tmp_path: Path) -> None:
    """The part of the test above that is quick."""
    (demo,) = re.findall(r"## The demo, on any machine\n(.*?)\n## ", RESULTS, flags=re.DOTALL)
    printed = done("demo", "--limit", 1, "--recall-count", 1, "--markdown", tmp_path / "demo.md", "--quiet").output
    told, measured = table(demo), table((tmp_path / "demo.md").read_text())
    assert {cache: cells[4:] for cache, cells in told.items()} == {cache: cells[4:] for cache, cells in measured.items()}
    assert len(told) == 4
    heading, *_ = [line for line in printed.splitlines() if line.startswith("cache")]
    assert "of fp16" in heading, "the table is whole on 80 columns"
    for cache, cells in told.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(cache) and "%" in line]
        assert all(cell in line for cell in cells[4:] if "%" not in cell), "the same units"
