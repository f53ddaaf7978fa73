"""The search finds what trying everything would find, runs little of it, and writes a config that loads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from checkpoints import done, pqcache
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from hf_pqcache import Codebook, PagedPQCache, PQConfig
from hf_pqcache.eval.search.tune import Budget, Grid, Search, share_of_bytes, tune
from hf_pqcache.eval.session.model_config import load_model_config
from hf_pqcache.eval.session.results import Results

GRID = Grid(num_subspaces=(16, 32), num_bits=(4, 8), page_size=(16, 64), extended_residual=(32, 64, 128))
EXACT = 10.0


def llama(**kw: Any) -> LlamaConfig:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256, "head_dim": 64}
    return LlamaConfig(**{**sizes, **kw})


CONFIGS = GRID.configs(PQConfig(), 64)
RATIOS = {config: share_of_bytes(config, llama(), 4096) for config in CONFIGS}


class Fake:
    """Measures by formula; notes which shapes it was asked for. Pass keys are found by what loses at most `keys_until`."""

    def __init__(self, loss: Callable[[PQConfig], float], keys_until: float = math.inf, drift: float = 0.0) -> None:
        self.exact, self.exact_recall, self.rows = EXACT, 0.9, []
        self.loss, self.keys_until, self.drift = loss, keys_until, drift
        self.ran: list[PQConfig] = []
        self.confirmed: list[PQConfig] = []

    def perplexity(self, config: PQConfig) -> float:
        self.ran.append(config)
        return EXACT * (1 + self.loss(config))

    def recall(self, config: PQConfig | None) -> float:
        return 0.9 if config is None or self.loss(config) <= self.keys_until else 0.3

    def again(self, config: PQConfig) -> tuple[float, float | None, float | None]:
        self.confirmed.append(config)
        return EXACT * (1 + self.loss(config)) / EXACT - 1 + self.drift, self.recall(config), 0.9

    def codebook(self, config: PQConfig) -> None:
        return None


def shape_of(config: PQConfig) -> tuple[Any, ...]:
    """What decides how well old tokens are kept."""
    return config.codes("key", 64), config.codes("value", 64), config.page_size


def loss_of(weights: tuple[float, float], noise: dict[tuple[Any, ...], float]) -> Any:
    """A loss that a larger exact window never raises, and otherwise depends on the shape in a way of its own."""

    def loss(config: PQConfig) -> float:
        codes = noise[shape_of(config)]
        return codes * (1 + weights[0] / config.extended_residual) + weights[1] / config.extended_residual

    return loss


def search(runner: Fake, budget: Budget) -> Search:
    with patch("hf_pqcache.eval.search.tune.share_of_bytes", lambda config, *_: RATIOS[config]):  # many times the same
        return tune(runner, CONFIGS, llama(), budget, tokens=4096, progress=False)


def ratio(config: PQConfig) -> float:
    return RATIOS[config]


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.15, 0.5) | st.none(),
    st.floats(0.001, 0.2),
    st.floats(0.01, 0.3) | st.just(math.inf),
    st.tuples(st.floats(0, 10), st.floats(0, 1)),
    st.lists(st.floats(0.001, 0.2), min_size=22, max_size=22),
)
def test_finds_what_trying_everything_finds(
    max_ratio: float | None, max_loss: float, keys_until: float, weights: tuple[float, float], noise: list[float]
) -> None:
    loss = loss_of(weights, dict(zip(dict.fromkeys(map(shape_of, CONFIGS)), noise, strict=True)))
    budget = Budget(max_ratio=max_ratio) if max_ratio is not None else Budget(max_loss=max_loss)
    runner = Fake(loss, keys_until)
    found = search(runner, budget)
    every = CONFIGS
    whole = [c for c in every if loss(c) <= keys_until]  # those that pass keys come back from
    if max_ratio is not None:
        best = min((loss(c) for c in whole if ratio(c) <= max_ratio), default=None)
        assert (found.best is None) == (best is None)
        assert found.best is None or found.best.loss == pytest.approx(best)
        assert all(ratio(c) <= max_ratio for c in runner.ran)
    else:
        least = min((ratio(c) for c in whole if EXACT * (1 + loss(c)) / EXACT - 1 <= max_loss), default=None)
        assert (found.best is None) == (least is None)
        assert found.best is None or found.best.ratio == least
    assert found.best is None or runner.confirmed[-1] == found.best.config
    assert {trial.config for trial in found.trials} == set(every)
    assert len(found.trials) == len(every)
    assert len(runner.ran) == len(set(runner.ran)) < len(every)


def test_a_winner_that_does_not_hold_is_not_recommended() -> None:
    runner = Fake(lambda c: 0.1 / sum(m * n for m, n in shape_of(c)[:2]))
    good = search(runner, Budget(max_loss=0.1))
    assert good.best is not None
    assert good.again == (pytest.approx(good.best.loss), 0.9, 0.9)
    fake = Fake(runner.loss, drift=0.2)  # anew, everything is worse
    none = search(fake, Budget(max_loss=0.1))
    assert none.best is none.again is None
    assert len(set(fake.confirmed)) == len(fake.confirmed) > 1
    assert all("measured anew" in t.note for t in none.trials if t.config in fake.confirmed)


def test_pareto_front_is_what_nothing_beats() -> None:
    found = search(Fake(lambda c: 16 / sum(m * n for m, n in shape_of(c)[:2])), Budget(max_ratio=0.4))
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


def test_impossible_shapes_are_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="num_subspaces=48 does not cut keys of 64"):
        Grid(num_subspaces=(48,)).configs(PQConfig(), 64)
    with pytest.raises(ValueError, match="page_size=20"):
        Grid(page_size=(20,)).configs(PQConfig(), 64)


def test_the_grid_pairs_codes_of_both_sides_and_gives_keys_no_fewer_bits() -> None:
    one = {"page_size": (64,), "extended_residual": (128,)}
    for asked in ({"num_bits": (8, 6)}, {"num_subspaces": (64, 32)}):
        configs = Grid(**asked, **one).configs(PQConfig(sink_tokens=8), 128)
        found = [(config.codes("key", 128), config.codes("value", 128)) for config in configs]
        assert len(set(found)) == len(found) == 10
        assert all(m * n >= value_m * value_n for (m, n), (value_m, value_n) in found)
        assert {codes for both in found for codes in both} == {(m, n) for m in (64, 32) for n in (8, 6)}
        assert PQConfig(bits=4, sink_tokens=8) in configs  # by its name


@pytest.mark.parametrize("head_dim", [128, 0])
def test_operating_points_are_searched_unless_codes_are_given(head_dim: int) -> None:
    configs = Grid(page_size=(64,), extended_residual=(128,)).configs(PQConfig(num_bits=6), head_dim)
    assert configs == [PQConfig(bits=bits) for bits in (4, 3, 2)]
    with pytest.raises(ValueError, match="layers differ in head_dim"):
        Grid(num_subspaces=(32,)).configs(PQConfig(), 0)


def test_bytes_are_those_that_a_cache_occupies() -> None:
    config = PQConfig(num_subspaces=16, num_bits=8, page_size=16, extended_residual=32, max_pages=64)
    cache = PagedPQCache(llama(), pq_config=config)
    for layer in range(2):
        keys = torch.randn(1, 2, 1000, 64).half()
        cache.update(keys, keys, layer)
    told = cache.stats()["bytes"]
    held = told["codes"] + told["window"] + 4 * 2 * cache.stats()["pages_used"]  # page tables grow in steps
    assert share_of_bytes(config, llama(), 1000) == pytest.approx(held / (2 * 2 * 2 * 64 * 1000 * 2), rel=1e-3)
    windowed = LlamaConfig(num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=8)
    with pytest.raises(ValueError, match="nothing to tune"):
        share_of_bytes(config, windowed, 1000)


LINE = ("tune", "-f", "tiny", "--device", "cpu", "--window", 1024, "--limit", 1, "--recall-count", 1, "--try-page-sizes", 32)
LINE += ("--results", "rows.jsonl")


def test_a_broken_cache_is_not_recommended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit codes of 4 numbers each: short articles hardly show that they lose every pass key."""
    monkeypatch.chdir(tmp_path)
    broken = ("--try-subspaces", 16, "--try-bits", 4, "--try-residuals", 64)
    for budget in (("--max-loss", 0.05), ("--max-ratio", 0.5)):
        failed = pqcache(*LINE, *broken, *budget)
        assert failed.exit_code == 1, failed.output
        assert "no shape keeps to the budget" in failed.output.splitlines()[-1]
        assert not (tmp_path / "best.yaml").exists()


@pytest.mark.parametrize(
    ("text", "message"), [("word " * 300, "less than a window"), (None, "cannot tell caches apart"), ("demo", "cannot tell")]
)
def test_a_text_that_tells_nothing_is_refused(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text != "demo":
        (tmp_path / "text.txt").write_text(text or "The cat sat on the mat. " * 600)
    failed = pqcache(*LINE, "--try-residuals", 256, "--max-loss", 0.01, "--text", text if text == "demo" else "text.txt")
    assert failed.exit_code == 1
    assert message in failed.output.splitlines()[-1]


@pytest.mark.slow
def test_command_writes_a_config_that_loads_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = (*LINE, "--dtype", "float32", "--max-ratio", 0.31, "--try-subspaces", 32, "--try-bits", "8,4", "--try-residuals", 64)
    found = done(*line, "--json", "found.json")
    assert "measured anew" in found.output
    best = load_model_config("best.yaml")
    assert best.codebook is None
    assert not Path("best.codebook").exists()
    assert best.pq_config.codes("key", 64)[0] == 32
    assert json.loads(Path("found.json").read_text())["best"]["ratio"] <= 0.31
    rows = Results("rows.jsonl").rows
    assert {row.cache for row in rows} == {"dynamic", "pq"}
    assert {row.metric for row in rows} == {"perplexity", "recall"}

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is measured twice, nor calibrated")

    monkeypatch.setattr("hf_pqcache.eval.tasks._text.perplexity", refuse)
    monkeypatch.setattr("hf_pqcache.eval.session.setup.calibrate", refuse)
    done(*line)
    assert load_model_config("best.yaml") == best
    assert len(Results("rows.jsonl")) == len(rows)


@pytest.mark.slow
def test_a_codebook_of_the_models_own_comes_with_the_config_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = ("--try-subspaces", 32, "--try-bits", 8, "--try-residuals", 64)
    done(*LINE, "--max-ratio", 0.5, *grid, "--calibration", "demo", "--calibration-tokens", 1024)
    best = load_model_config("best.yaml")
    book = Codebook.from_pretrained(best.codebook or "")
    assert book.settings == {"page_size": 32, "extended_residual": 64, "sink_tokens": 4}
    assert book.codes("key", 64) == best.pq_config.codes("key", 64)
