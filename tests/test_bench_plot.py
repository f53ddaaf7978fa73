"""The plots of `pqcache bench` show every timed case where it belongs, and say what could not be measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from matplotlib.patches import Rectangle

from hf_pqcache.cli import main
from hf_pqcache.cli.commands.bench import _KernelCase
from hf_pqcache.eval.bench import generate, kernel, plot
from hf_pqcache.eval.bench.plot import draw

CONDITIONS = {"gpu": "a GPU", "torch": "2.13.0", "copy_tb_per_s": 4.0, "dtype": "float16"}
PNG = b"\x89PNG\r\n"


def kernel_row(tokens: int, fp16_us: dict[str, float], ours_us: float = 10.0) -> dict[str, Any]:
    best = min(fp16_us, key=fp16_us.get)  # type: ignore[arg-type]
    times = {"tuned_us": ours_us, "floor_us": ours_us / 2, "fp16_us": fp16_us, "best_fp16": best}
    return asdict(kernel.Case(1, 8, 4, tokens)) | times | {
        "best_fp16_us": fp16_us[best],
        "speedup": fp16_us[best] / ours_us,
    } | CONDITIONS  # fmt: skip


KERNEL = [
    kernel_row(2048, {"flash/gqa": 40.0, "flash/rows": 20.0, "cudnn/gqa": 5.0}),
    kernel_row(131072, {"efficient/rows": 80.0}),
]


def decode(shape: str, tokens: int, cache: str, ms: float | None) -> dict[str, Any]:
    row = {"kind": "decode", "shape": shape, "tokens": tokens, "cache": cache, "floor_ms": tokens / 4096, "batch": 1}
    return row | CONDITIONS | ({"error": "out of memory"} if ms is None else {"ms_per_token": ms})


GENERATE = [
    *(decode("a", tokens, "pq", tokens / 1024) for tokens in (32768, 8192)),
    *(decode("a", tokens, "dynamic", tokens / 256 if tokens < 32768 else None) for tokens in (8192, 32768)),
    decode("b", 8192, "pq", 3.0),
    {"kind": "prefill", "shape": "a", "tokens": 8192, "dynamic_s": 1.0, "pq_s": 1.0},
]


def test_bars_are_speed_ups_over_the_faster_form_and_end_below_the_ceiling() -> None:
    figure, _ = plot._kernel(KERNEL)
    (axes,) = figure.axes
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [bar.get_x() + bar.get_width() for bar in bars] == pytest.approx([2.0, 0.5, 8.0])
    ceilings = [line.get_xdata()[0] for line in axes.lines][: len(bars)]
    assert ceilings == pytest.approx([4.0, 1.0, 16.0])
    assert len(axes.get_yticks()) == len(KERNEL)


def test_lines_run_along_the_lengths_and_a_failure_is_told() -> None:
    figure, _ = plot._generate([row for row in GENERATE if row["kind"] == "decode"])
    a, b = figure.axes
    measured = [line.get_xydata().tolist() for line in a.lines if line.get_linestyle() == "-"]
    assert measured == [[[8192, 8], [32768, 32]], [[8192, 32]]]
    floors = [line.get_xydata().tolist() for line in a.lines if line.get_linestyle() != "-"]
    assert floors == [[[8192, 2], [32768, 8]]]  # one for both caches: it is the same
    assert "dynamic at 32K: out of memory" in [text.get_text() for text in a.texts]
    assert len(b.lines) == 2


@pytest.mark.parametrize(("rows", "kind"), [(KERNEL, "kernel"), (KERNEL[:1], "kernel"), (GENERATE, "generate")])
def test_a_png_comes_out(rows: list[dict[str, Any]], kind: str) -> None:
    assert draw(rows, kind).startswith(PNG)


def test_what_cannot_be_drawn_is_said() -> None:
    with pytest.raises(ValueError, match="none of the 1 rows"):
        draw(GENERATE[-1:], "generate")
    with pytest.raises(ValueError, match="unknown"):
        draw(KERNEL, "kernels")


def test_the_command_draws_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "bench_kernel", lambda cases: KERNEL)
    files = {name: tmp_path / name for name in ("k.png", "k.json")}
    arguments = ["bench", "kernel", "--plot", str(files["k.png"]), "--json", str(files["k.json"])]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert files["k.png"].read_bytes().startswith(PNG)
    monkeypatch.setattr(kernel, "bench_kernel", lambda cases: [{**KERNEL[0], "fp16_us": {}}])
    failed = CliRunner().invoke(main, arguments)
    assert failed.exit_code == 1
    assert json.loads(files["k.json"].read_text())[0]["fp16_us"] == {}


def test_a_run_that_ends_early_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        yield GENERATE[0]
        raise RuntimeError("wrong logits")

    monkeypatch.setattr(generate, "bench_generate", interrupted)
    file = tmp_path / "results" / "g.json"  # a folder that is not there yet
    failed = CliRunner().invoke(main, ["bench", "generate", "--json", str(file)])
    assert failed.exit_code == 1
    assert "wrong logits" in failed.output
    assert json.loads(file.read_text()) == GENERATE[:1]


@pytest.mark.parametrize(
    ("text", "told", "drawn"),
    [
        ("1,8,4,2048", "d=128 bits=4", "4 bits"),
        ("1,8,4,2048,64,3", "d=64 bits=3", "3 bits"),
        ("1,8,4,2048,128,0", "d=128 exact pages", "exact pages"),
        ("1,8,4,2048,128,32,6", "d=128 32x6 + 32x6", "32x6 + 32x6"),
        ("1,8,4,2048,128,64,8,32,6", "d=128 64x8 + 32x6", "64x8 + 32x6"),
    ],
)
def test_cases_of_the_command_line_are_read(text: str, told: str, drawn: str) -> None:
    case = kernel.Case(**_KernelCase().convert(text, None, None))
    assert str(case) == f"(1, 8, 4, 2048) {told}"
    assert plot._case(asdict(case)).splitlines()[1] == f"8 KV heads x 4, {drawn}"


@pytest.mark.parametrize("text", ["1,8,4", "1,8,4,2048,128,5", "1,8,4,2048,128,64,8,32", "0,8,4,2048", "1,8,4,x"])
def test_cases_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        _KernelCase().convert(text, None, None)
