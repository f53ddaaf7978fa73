"""Searches the shape of a cache: the least loss under a budget of bytes, or the fewest bytes under a budget of loss.

Bytes follow from the shape, so that only what can win is run. Taken for granted, which saves most of the runs: with the
codes given, a larger exact window (recent tokens, and a page) never loses accuracy and always takes more bytes. A codebook
depends on subspaces and bits only: every page size and window reuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from operator import le
from typing import Any, Protocol

from tqdm.auto import tqdm

from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.codebook.samples import compressible_layers
from hf_pqcache.config import PQConfig
from hf_pqcache.eval.session.bits import cache_bits
from hf_pqcache.eval.session.results import Row
from hf_pqcache.models.shapes import kv_shape, layer_configs

FULL_BITS = 16


@dataclass(frozen=True)
class Budget:
    """What the best shape must keep to: exactly one of the first two, and the third.

    Attributes:
        max_ratio: bytes as a share of a half-precision cache's, window and tables included, the shared codebook not.
        max_loss: relative rise of perplexity, 0.01 is 1 %.
        max_recall_loss: how many of the pass keys that the exact cache gives back may be lost, as a share of all.
    """

    max_ratio: float | None = None
    max_loss: float | None = None
    max_recall_loss: float = 0.1

    def __post_init__(self) -> None:
        if (self.max_ratio is None) == (self.max_loss is None):
            raise ValueError("give a budget of bytes (--max-ratio 0.28) or of loss (--max-loss 0.01), one of the two")
        for name, value in (("max_ratio", self.max_ratio), ("max_loss", self.max_loss)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        if not 0 <= self.max_recall_loss < 1:
            raise ValueError(f"max_recall_loss={self.max_recall_loss} must be from 0 to below 1")

    def forgives(self, loss: float) -> bool:
        return self.max_loss is None or loss <= self.max_loss

    def recalls(self, recall: float | None, exact: float | None) -> bool:
        return recall is None or exact is None or recall >= exact - self.max_recall_loss - 1e-9


@dataclass(frozen=True)
class Grid:
    """The shapes to choose from; num_subspaces None means a half and a quarter of head_dim."""

    num_subspaces: Sequence[int] | None = None
    num_bits: Sequence[int] = (8, 6, 4)
    page_size: Sequence[int] = (32, 64, 128)
    extended_residual: Sequence[int] = (64, 128, 256)

    def configs(self, base: PQConfig, head_dim: int) -> list[PQConfig]:
        """All shapes, what the grid leaves open as in `base`. Raises ValueError if one is impossible."""
        subspaces = self.num_subspaces or [m for m in (head_dim // 2, head_dim // 4) if m >= 8]
        for m in subspaces:
            base.replace(num_subspaces=m).subspaces(head_dim)
        return [
            base.replace(num_subspaces=m, num_bits=n, page_size=page, extended_residual=recent)
            for m, n, page, recent in product(subspaces, self.num_bits, self.page_size, self.extended_residual)
        ]


@dataclass(frozen=True)
class Trial:
    """One shape: its share of a half-precision cache's bytes, and its loss, or why that was not measured.

    Attributes:
        recall: share of the pass keys that it gives back; None where it was not asked.
        note: why it was not run, or is out.
        is_pareto: no measured shape has both fewer bytes and less loss.
    """

    config: PQConfig
    ratio: float
    loss: float | None = None
    perplexity: float | None = None
    recall: float | None = None
    note: str = ""
    is_pareto: bool = False


@dataclass
class Search:
    """What `tune` found.

    Attributes:
        best: the shape that keeps to the budget best, None if none does. trials: all shapes, by bytes.
        exact, exact_recall: of the exact cache. codebook: of the best shape.
        again: (loss, recall, exact recall) of the best shape when it was measured anew, by the running cache.
    """

    trials: list[Trial]
    exact: float
    exact_recall: float | None = None
    best: Trial | None = None
    codebook: Codebook | None = None
    again: tuple[float, float | None, float | None] | None = None
    rows: list[Row] = field(default_factory=list)


class Measurer(Protocol):
    """What a search asks of `trials.Runner`."""

    exact: float
    exact_recall: float | None
    rows: list[Row]

    def perplexity(self, config: PQConfig) -> float: ...
    def recall(self, config: PQConfig | None) -> float | None: ...
    def again(self, config: PQConfig) -> tuple[float, float | None, float | None]: ...
    def codebook(self, config: PQConfig) -> Codebook: ...


def tune(
    runner: Measurer,
    configs: Sequence[PQConfig],
    shapes: Sequence[tuple[int, int, int]],
    budget: Budget,
    *,
    tokens: int,
    progress: bool = True,
) -> Search:
    """Find the best of `configs`. A winner counts when it keeps to the budget a second time, measured anew.

    Args:
        shapes: of the model's layers, see `layer_shapes`.
        tokens: length of the sequence whose bytes count: the exact window weighs less in a longer one.
    """
    ratios = {config: cache_bits(config, shapes, tokens)["total"] / FULL_BITS for config in configs}
    with tqdm(total=len(ratios), desc="shapes", unit="shape", disable=not progress, leave=False) as bar:
        state = _State(runner, budget, {config: Trial(config, ratio) for config, ratio in ratios.items()}, bar)
        search = _within_bytes if budget.max_ratio is not None else _within_loss
        best, again = None, None
        while best is None and (candidate := search(state)) is not None:
            again = runner.again(candidate.config)
            if budget.forgives(again[0]) and budget.recalls(again[1], again[2]):
                best = candidate
            else:
                keys = "" if again[1] is None else f", pass keys {again[1]:.0%}"
                state.rule_out(candidate.config, f"does not hold when measured anew ({again[0]:+.2%}{keys})")
    done = [
        trial if trial.loss is not None or trial.note else replace(trial, note="more bytes than the best")
        for trial in state.all
    ]
    measured = [trial for trial in done if trial.loss is not None]
    marked = [replace(t, is_pareto=t.loss is not None and not any(_beats(other, t) for other in measured)) for t in done]
    return Search(
        trials=sorted(marked, key=lambda trial: trial.ratio),
        exact=runner.exact,
        exact_recall=runner.exact_recall,
        best=next((t for t in marked if best is not None and t.config == best.config), None),
        codebook=None if best is None else runner.codebook(best.config),
        again=None if best is None else again,
        rows=runner.rows,
    )


class _State:
    """The trials of a search; each is measured at most once, and those that are out stay so."""

    def __init__(self, runner: Measurer, budget: Budget, trials: dict[PQConfig, Trial], bar: Any) -> None:
        self.runner, self.budget, self.trials, self.bar = runner, budget, trials, bar
        self.out: set[PQConfig] = set()

    @property
    def all(self) -> list[Trial]:
        return list(self.trials.values())

    def rule_out(self, config: PQConfig, note: str) -> None:
        if config not in self.out:
            self.out.add(config)
            self.trials[config] = replace(self.trials[config], note=note)
            self.bar.update()

    def measured(self, config: PQConfig) -> Trial:
        trial = self.trials[config]
        if trial.loss is None:
            value = self.runner.perplexity(config)
            trial = self.trials[config] = replace(trial, perplexity=value, loss=value / self.runner.exact - 1)
        return trial

    def keeps(self, config: PQConfig) -> bool:
        """Whether a shape is not out and keeps to the budget of loss and of pass keys, which are asked for last."""
        if config in self.out:
            return False
        trial = self.measured(config)
        if not self.budget.forgives(trial.loss or 0.0):
            self.rule_out(config, "loses too much")
        elif trial.recall is None:
            trial = self.trials[config] = replace(trial, recall=self.runner.recall(config))
        if not self.budget.recalls(trial.recall, self.runner.exact_recall):
            self.rule_out(config, "loses pass keys")
        return config not in self.out


def layer_shapes(config: Any) -> list[tuple[int, int, int]]:
    """(KV heads, numbers in a key, numbers in a value) of the layers that are compressed, from a transformers config.

    Raises ValueError if the config does not say.
    """
    text = config.get_text_config(decoder=True)
    views = layer_configs(text)
    shapes = []
    for i in compressible_layers(config):
        heads, head_dim = kv_shape(views[i])
        if heads is None or head_dim is None:
            raise ValueError(f"layer {i}: the model's config does not say how many KV heads it has, or their head_dim")
        shapes.append((heads, head_dim, head_dim))
    if not shapes:
        raise ValueError("the model has no full-attention layer, so there is nothing to tune")
    return shapes


def _within_bytes(state: _State) -> Trial | None:
    """Of shapes that differ in their exact window only, the one with the largest that fits is the only one to run."""
    largest: dict[tuple[Any, ...], Trial] = {}
    for trial in state.all:
        key = (*_codes(trial.config), trial.config.page_size)
        if trial.ratio > (state.budget.max_ratio or 0.0):
            state.rule_out(trial.config, "too many bytes")
        elif key not in largest or trial.config.extended_residual > largest[key].config.extended_residual:
            largest[key] = trial
    for trial in state.all:
        if trial not in largest.values():
            state.rule_out(trial.config, "a larger window fits")
    ordered = sorted((state.measured(t.config) for t in largest.values()), key=lambda t: (t.loss, t.ratio))
    return next((state.trials[t.config] for t in ordered if state.keeps(t.config)), None)


def _within_loss(state: _State) -> Trial | None:
    """Codes that lose too much even beside the largest window are out; of the others shapes run from few bytes upwards."""
    families: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in sorted(state.all, key=lambda t: t.ratio):
        families.setdefault(_codes(trial.config), []).append(trial)
    best: Trial | None = None
    for family in sorted(families.values(), key=lambda members: members[0].ratio):
        pending = [t for t in family if t.config not in state.out and (best is None or t.ratio < best.ratio)]
        while pending:
            most_exact = max(pending, key=lambda t: _window(t.config))
            if state.keeps(most_exact.config):
                best = next(state.trials[t.config] for t in pending if state.keeps(t.config))
                break
            for config in (t.config for t in pending if all(map(le, _window(t.config), _window(most_exact.config)))):
                state.rule_out(config, f"{state.trials[most_exact.config].note} at its largest window")
            pending = [t for t in pending if t.config not in state.out]
    return best


def _window(config: PQConfig) -> tuple[int, int]:
    return config.extended_residual, config.page_size


def _codes(config: PQConfig) -> tuple[int | None, int]:
    return config.num_subspaces, config.num_bits


def _beats(a: Trial, b: Trial) -> bool:
    """Whether measured shape `a` is at least as good as `b` in both ways and better in one."""
    left, right = (a.ratio, a.loss or 0.0), (b.ratio, b.loss or 0.0)
    return left != right and left[0] <= right[0] and left[1] <= right[1]
