"""`--press` on the command line: what is measured, under which name, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny_models import build, tokens
from transformers import DynamicCache

from hf_pqcache.cli.app import main
from hf_pqcache.eval.measure.deployed import cache_perplexity
from hf_pqcache.eval.session.caches import CacheSpec, split_press


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(main, [*arguments, "--quiet"])
    assert result.exit_code == code, result.output
    return result


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_compare_has_a_line_for_every_press_and_says_how_much_smaller(tmp_path: Path) -> None:
    sizes = ("--model", "tiny", "--tokens", "128", "--limit", "1", "--recall-count", "1", "--measure", "perplexity,recall")
    caches = ("--caches", "dynamic,pq:4", "--press", "knorm:0.5,streaming-llm:0.75", "--question-after")
    run("compare", *sizes, *caches, "--json", str(tmp_path / "table.json"), "--results", str(tmp_path / "rows.jsonl"))
    table = json.loads((tmp_path / "table.json").read_text())["table"]
    assert [line["cache"] for line in table] == [
        "dynamic",
        "pq 4 bits",
        "pq 4 bits, knorm:0.5",
        "pq 4 bits, streaming-llm:0.75",
    ]
    assert [line["compression"] for line in table] == pytest.approx([1.0, 3.81, 7.62, 15.24], rel=1e-2)
    found = rows(tmp_path / "rows.jsonl")
    assert {row["cache_config"].get("press") for row in found} == {None, "knorm:0.5", "streaming-llm:0.75"}
    assert {row["settings"].get("prompt") for row in found if row["metric"] == "perplexity"} == {64}
    assert {row["settings"].get("question") for row in found if row["metric"] == "recall"} == {"after"}
    assert len({row["value"] for row in found if row["metric"] == "perplexity"}) >= 3


def test_eval_measures_pruned_memory(tmp_path: Path) -> None:
    for name, press in (("a", ()), ("b", ("--press", "knorm:0.75"))):
        run(
            "eval",
            "memory",
            "--model",
            "tiny",
            "--cache",
            "paged-kv",
            "--lengths",
            "512",
            *press,
            "--results",
            str(tmp_path / name),
        )
    before, after = ({row["metric"]: row["value"] for row in rows(tmp_path / name)} for name in "ab")
    assert after["kv_bytes"] < before["kv_bytes"] / 2.5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--cache", "kivi:4", "--press", "knorm:0.5"), "only pq and paged-kv"),
        (("--cache", "pq:4", "--press", "knorm"), "after a colon"),
        (("--cache", "pq:4", "--press", "knorms:0.5"), "use one of"),
    ],
)
def test_presses_that_do_nothing_are_refused(options: tuple[str, ...], match: str) -> None:
    assert match in run("eval", "recall", "--model", "tiny", *options, "--lengths", "256", code=1).output


def test_compare_refuses_a_press_without_a_cache_for_it() -> None:
    output = run("compare", "--model", "tiny", "--caches", "dynamic", "--press", "knorm:0.5", code=2).output
    assert "does nothing without one of pq, paged-kv" in output


def test_only_what_follows_a_prompt_is_scored() -> None:
    model, ids = build("llama"), tokens(1, 60)[0]
    with torch.inference_mode():
        logits = model(ids[None]).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    found = cache_perplexity(
        model, ids, lambda n, rows: DynamicCache(config=model.config), window=60, prefill=20, is_prompt=True, progress=False
    )
    assert found == pytest.approx(float(losses[20:].mean().exp()), rel=1e-4)


def test_a_press_is_part_of_a_cache_s_name() -> None:
    spec = replace(CacheSpec.parse("pq:3", 16), press="snapkv:0.25")
    assert (spec.press, spec.label, spec.kept) == ("snapkv:0.25", "pq 3 bits, snapkv:0.25", 0.75)
    assert CacheSpec.parse("pq:3", 16).kept == 1.0
    assert split_press("pq:3+snapkv:0.25") == ("pq:3", "snapkv:0.25")
    with pytest.raises(ValueError, match="use one of"):  # who prunes nothing must not be asked to
        CacheSpec.parse("pq:3+snapkv:0.25", 16)
