"""The search finds what trying everything would find, runs little of it, and writes a config that loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig

from hf_pqcache import Codebook, PagedPQCache, PQConfig
from hf_pqcache.cli import main
from hf_pqcache.codebook import LayerCodebook
from hf_pqcache.eval import tune as module
from hf_pqcache.eval.accuracy_study import bits_per_value, cache_bits
from hf_pqcache.eval.model_config import load_model_config
from hf_pqcache.eval.results import Results, Row
from hf_pqcache.eval.session import Session
from hf_pqcache.eval.tune import Budget, Grid, Search, layer_shapes, tune

GRID = Grid(num_subspaces=(16, 32), num_bits=(4, 8), page_size=(16, 64), extended_residual=(32, 64, 128))
EXACT = 10.0


def llama(**kw: Any) -> LlamaConfig:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256, "head_dim": 64}
    return LlamaConfig(**{**sizes, **kw})


class _Model:
    config = llama()


def loss_of(weights: tuple[float, float], noise: dict[tuple[int, int, int], float]) -> Any:
    """A loss that a larger exact window never raises, and otherwise depends on the shape in a way of its own."""

    def loss(config: PQConfig) -> float:
        codes = noise[config.num_subspaces or 0, config.num_bits, config.page_size]
        return codes * (1 + weights[0] / config.extended_residual) + weights[1] / config.extended_residual

    return loss


def search(monkeypatch: pytest.MonkeyPatch, loss: Any, budget: Budget) -> tuple[Search, list[PQConfig], list[PQConfig]]:
    """(what was found, shapes that were run, shapes that were calibrated), nothing of it by a model."""
    ran: list[PQConfig] = []
    learnt: list[PQConfig] = []

    def run(session: Session, name: str, version: str, text: str, **options: Any) -> Row:
        if session.cache.name == "dynamic":
            return Row(name, "perplexity", EXACT)
        ran.append(session.cache.config)
        return Row(name, "perplexity", EXACT * (1 + loss(session.cache.config)), cache="pq")

    def learn(config: PQConfig) -> Codebook:
        learnt.append(config)
        side = torch.zeros(2, config.num_subspaces, config.num_centroids, 64 // (config.num_subspaces or 1)).half()
        return Codebook({0: LayerCodebook(side, side)}, config.num_bits, config.num_subspaces)

    monkeypatch.setattr(module, "run_perplexity", run)
    session = Session(_Model(), None, "model", progress=False)
    return tune(session, learn, PQConfig(), "text", "text", budget, GRID, tokens=4096), ran, learnt


def ratio(config: PQConfig) -> float:
    return cache_bits(config, layer_shapes(llama()), 4096)["total"] / 16


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.15, 0.5) | st.none(),
    st.floats(0.001, 0.2),
    st.tuples(st.floats(0, 10), st.floats(0, 1)),
    st.lists(st.floats(0.001, 0.2), min_size=8, max_size=8),
)
def test_finds_what_trying_everything_finds(
    max_ratio: float | None, max_loss: float, weights: tuple[float, float], noise: list[float]
) -> None:
    keys = [(m, n, page) for m in (16, 32) for n in (4, 8) for page in (16, 64)]
    # A larger page never loses accuracy either: it keeps tokens exact for longer.
    values = {key: min(noise[i] if key[2] == 16 else noise[i - 1], noise[i]) for i, key in enumerate(keys)}
    loss = loss_of(weights, values)
    budget = Budget(max_ratio=max_ratio) if max_ratio is not None else Budget(max_loss=max_loss)
    with pytest.MonkeyPatch.context() as monkeypatch:
        found, ran, learnt = search(monkeypatch, loss, budget)
    every = GRID.configs(PQConfig(), 64)
    if max_ratio is not None:
        fitting = [c for c in every if ratio(c) <= max_ratio]
        best = min((loss(c) for c in fitting), default=None)
        assert (found.best is None) == (best is None)
        assert found.best is None or found.best.loss == pytest.approx(best)
        assert all(ratio(c) <= max_ratio for c in ran)
    else:
        fitting = [c for c in every if EXACT * (1 + loss(c)) / EXACT - 1 <= max_loss]
        least = min((ratio(c) for c in fitting), default=None)
        assert (found.best is None) == (least is None)
        assert found.best is None or found.best.ratio == least
    assert {trial.config for trial in found.trials} == set(every)
    assert len(found.trials) == len(every)
    assert len(ran) == len(set(ran)) < len(every)
    assert len(learnt) == len({(c.num_subspaces, c.num_bits) for c in learnt})


def test_pareto_front_is_what_nothing_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _, _ = search(monkeypatch, lambda c: 8 / (c.num_bits * (c.num_subspaces or 0)), Budget(max_ratio=0.4))
    measured = [t for t in found.trials if t.loss is not None]
    front = [t for t in measured if t.is_pareto]
    assert front
    assert [t.ratio for t in front] == sorted(t.ratio for t in front)
    assert [t.loss for t in front] == sorted((t.loss or 0.0 for t in front), reverse=True)
    for t in measured:
        assert t.is_pareto or any(o.ratio <= t.ratio and (o.loss or 0) <= (t.loss or 0) for o in front)
    assert all(t.note for t in found.trials if t.loss is None)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [((None, None), "one of the two"), ((0.3, 0.1), "one of the two"), ((0.0, None), "above 0"), ((None, -1.0), "above 0")],
)
def test_budget_is_one_number(numbers: tuple[float | None, float | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(*numbers)


def test_impossible_shapes_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="num_subspaces=48 does not cut head_dim=64"):
        Grid(num_subspaces=(48,)).configs(PQConfig(), 64)
    with pytest.raises(ValueError, match="page_size=20"):
        Grid(page_size=(20,)).configs(PQConfig(), 64)


def test_bytes_are_known_without_a_codebook() -> None:
    """The same bits as with the codebook in hand, and as a real cache occupies."""
    config = PQConfig(num_subspaces=16, num_bits=8, page_size=16, extended_residual=32, max_pages=64)
    side = torch.randn(2, 16, 256, 4).half()
    book = Codebook({i: LayerCodebook(side, side) for i in range(2)}, 8, 16)
    shapes = layer_shapes(llama())
    assert shapes == [(2, 64, 64)] * 2
    predicted = cache_bits(config, shapes, 1000)
    assert bits_per_value(config, book, 1000)["total"] == predicted["total"]
    cache = PagedPQCache(llama(), book, config)
    for layer in range(2):
        keys = torch.randn(1, 2, 1000, 64).half()
        cache.update(keys, keys, layer)
    told = cache.stats()["bytes"]
    numbers = 2 * 2 * 2 * 64 * 1000
    assert 8 * told["codes"] / numbers == predicted["codes"]
    assert 8 * told["window"] / numbers == predicted["window"]
    hybrid = Gemma3TextConfig(num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=1, head_dim=256, hidden_size=64)
    assert layer_shapes(hybrid) == [(1, 256, 256)]  # one layer of six keeps all tokens


@pytest.mark.slow
def test_command_writes_a_config_that_loads_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["tune", "-f", "tiny", "--dtype", "float32", "--max-ratio", "0.3", "--tokens", "4096", "--window", "512"]
    line += ["--limit", "1", "--calibration-tokens", "2048", "--try-subspaces", "32", "--try-bits", "8,4", "--quiet"]
    line += ["--try-page-sizes", "64", "--try-residuals", "64,128", "--results", "rows.jsonl", "-o", "best.yaml"]
    runner = CliRunner()
    done = runner.invoke(main, [*line, "--json", "found.json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "Pareto" in done.output
    best = load_model_config("best.yaml")
    book = Codebook.from_pretrained(best.codebook or "")
    assert best.num_subspaces == book.num_subspaces == 32
    assert book.settings == {"page_size": 64, "extended_residual": 128, "sink_tokens": 4}
    assert ratio(replace(best.pq_config, num_subspaces=32)) <= 0.3
    rows = Results("rows.jsonl").rows
    assert {row.cache for row in rows} == {"dynamic", "pq"}

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is measured or calibrated twice")

    monkeypatch.setattr("hf_pqcache.eval.tasks._text.perplexity", refuse)
    monkeypatch.setattr("hf_pqcache.eval.setup.calibrate", refuse)
    again = runner.invoke(main, line, catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert load_model_config("best.yaml") == best
    assert len(Results("rows.jsonl")) == len(rows)
    failed = runner.invoke(main, [x if x != "0.3" else "0.01" for x in line])
    assert failed.exit_code == 1
    assert "no shape keeps to the budget" in failed.output
