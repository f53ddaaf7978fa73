"""The search finds what trying everything would find, runs little of it, and writes a config that loads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import done, pqcache
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig, LlamaConfig

from hf_pqcache import Codebook, PagedPQCache, PQConfig
from hf_pqcache.codebook.codebook import LayerCodebook
from hf_pqcache.eval.search.tune import Budget, Grid, Search, layer_shapes, tune
from hf_pqcache.eval.session.bits import bits_per_value, cache_bits
from hf_pqcache.eval.session.model_config import load_model_config
from hf_pqcache.eval.session.results import Results

GRID = Grid(num_subspaces=(16, 32), num_bits=(4, 8), page_size=(16, 64), extended_residual=(32, 64, 128))
EXACT = 10.0


def llama(**kw: Any) -> LlamaConfig:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256, "head_dim": 64}
    return LlamaConfig(**{**sizes, **kw})


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

    def codebook(self, config: PQConfig) -> Codebook:
        side = torch.zeros(2, config.num_subspaces, config.num_centroids, 64 // (config.num_subspaces or 1)).half()
        return Codebook({0: LayerCodebook(side, side)}, config.num_bits, config.num_subspaces)


def loss_of(weights: tuple[float, float], noise: dict[tuple[int, int, int], float]) -> Any:
    """A loss that a larger exact window never raises, and otherwise depends on the shape in a way of its own."""

    def loss(config: PQConfig) -> float:
        codes = noise[config.num_subspaces or 0, config.num_bits, config.page_size]
        return codes * (1 + weights[0] / config.extended_residual) + weights[1] / config.extended_residual

    return loss


def search(runner: Fake, budget: Budget) -> Search:
    return tune(runner, GRID.configs(PQConfig(), 64), layer_shapes(llama()), budget, tokens=4096, progress=False)


def ratio(config: PQConfig) -> float:
    return cache_bits(config, layer_shapes(llama()), 4096)["total"] / 16


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.15, 0.5) | st.none(),
    st.floats(0.001, 0.2),
    st.floats(0.01, 0.3) | st.just(math.inf),
    st.tuples(st.floats(0, 10), st.floats(0, 1)),
    st.lists(st.floats(0.001, 0.2), min_size=8, max_size=8),
)
def test_finds_what_trying_everything_finds(
    max_ratio: float | None, max_loss: float, keys_until: float, weights: tuple[float, float], noise: list[float]
) -> None:
    keys = [(m, n, page) for m in (16, 32) for n in (4, 8) for page in (16, 64)]
    # A larger page never loses accuracy either: it keeps tokens exact for longer.
    values = {key: min(noise[i] if key[2] == 16 else noise[i - 1], noise[i]) for i, key in enumerate(keys)}
    loss = loss_of(weights, values)
    budget = Budget(max_ratio=max_ratio) if max_ratio is not None else Budget(max_loss=max_loss)
    runner = Fake(loss, keys_until)
    found = search(runner, budget)
    every = GRID.configs(PQConfig(), 64)
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
    loss = {8: 0.001, 4: 0.05}
    runner = Fake(lambda c: loss[c.num_bits] * (1 if c.num_subspaces == 32 else 1.2))
    good = search(runner, Budget(max_loss=0.1))
    assert good.best is not None
    assert good.again == (pytest.approx(good.best.loss), 0.9, 0.9)
    fake = Fake(runner.loss, drift=0.2)  # anew, everything is worse
    none = search(fake, Budget(max_loss=0.1))
    assert none.best is none.codebook is none.again is None
    assert len(set(fake.confirmed)) == len(fake.confirmed) > 1
    assert all("measured anew" in t.note for t in none.trials if t.config in fake.confirmed)


def test_pareto_front_is_what_nothing_beats() -> None:
    found = search(Fake(lambda c: 8 / (c.num_bits * (c.num_subspaces or 0))), Budget(max_ratio=0.4))
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


LINE = ("tune", "-f", "tiny", "--device", "cpu", "--window", 1024, "--limit", 1, "--recall-count", 1, "--try-page-sizes", 32)
LINE += ("--calibration-tokens", 1024, "--results", "rows.jsonl")


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
    book = Codebook.from_pretrained(best.codebook or "")
    assert best.num_subspaces == book.num_subspaces == 32
    assert book.settings == {"page_size": 32, "extended_residual": 64, "sink_tokens": 4}
    assert json.loads(Path("found.json").read_text())["best"]["ratio"] <= 0.31
    rows = Results("rows.jsonl").rows
    assert {row.cache for row in rows} == {"dynamic", "pq"}
    assert {row.metric for row in rows} == {"perplexity", "recall"}

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is measured or calibrated twice")

    monkeypatch.setattr("hf_pqcache.eval.tasks._text.perplexity", refuse)
    monkeypatch.setattr("hf_pqcache.eval.session.setup.calibrate", refuse)
    done(*line)
    assert load_model_config("best.yaml") == best
    assert len(Results("rows.jsonl")) == len(rows)
