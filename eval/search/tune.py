"""Searches the shape of a cache: the least loss under a budget of bytes, or the fewest bytes under a budget of loss.

Bytes follow from the shape, so that only what can win is run. Taken for granted, which saves most of the runs: with the
codes given, a larger exact window (recent tokens) never loses accuracy and always takes more bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Protocol

from tqdm.auto import tqdm

from hf_pqcache.cache.footprint import plan_memory
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import OPERATING_POINTS, PQConfig
from hf_pqcache.eval.session.caches import CODES, codes_of
from hf_pqcache.eval.session.results import Row

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
    """The shapes to choose from.

    Attributes:
        num_subspaces, num_bits: of keys and of values: all pairs in which keys take no fewer bits. None of the one means a half
            and a quarter of head_dim, of the other 8 and 6; None of both means the operating points.
    """

    num_subspaces: Sequence[int] | None = None
    num_bits: Sequence[int] | None = None
    page_size: Sequence[int] = (32, 64, 128)
    extended_residual: Sequence[int] = (64, 128, 256)

    def configs(self, base: PQConfig, head_dim: int) -> list[PQConfig]:
        """All shapes, what the grid leaves open as in `base`. Raises ValueError if one is impossible.

        head_dim: see `head_dim_of`.
        """
        return [
            config.replace(page_size=page, extended_residual=recent)
            for config, page, recent in product(self._codes(base, head_dim), self.page_size, self.extended_residual)
        ]

    def _codes(self, base: PQConfig, head_dim: int) -> list[PQConfig]:
        points = [base.replace(bits=bits, **dict.fromkeys(CODES)) for bits in OPERATING_POINTS]
        if not self.num_subspaces and not self.num_bits:
            return points
        if not head_dim:
            raise ValueError(
                "the layers differ in head_dim, so that one number of codes does not suit all: try operating points"
            )
        one = list(product(self.num_subspaces or (head_dim // 2, head_dim // 4), self.num_bits or (8, 6)))
        pairs = [(*key, *value) for key in one for value in one if key[0] * key[1] >= value[0] * value[1]]
        named = {tuple(codes_of(point, head_dim).values()): point for point in points}
        configs = [base.replace(**dict(zip(CODES, pair, strict=True))) for pair in pairs]
        return [named.get(tuple(codes_of(config, head_dim).values()), config) for config in configs]


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
        exact, exact_recall: of the exact cache. codebook: of the best shape, if it was measured with one of the model's own.
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
    def codebook(self, config: PQConfig) -> Codebook | None: ...


def tune(
    runner: Measurer,
    configs: Sequence[PQConfig],
    model_config: Any,
    budget: Budget,
    *,
    tokens: int,
    progress: bool = True,
) -> Search:
    """Find the best of `configs`. A winner counts when it keeps to the budget a second time, measured anew.

    Args:
        model_config: a transformers config, from which bytes follow.
        tokens: length of the sequence whose bytes count: the exact window weighs less in a longer one.

    Raises ValueError if the config does not say how large keys and values are, or nothing of the model is compressed.
    """
    ratios = {config: share_of_bytes(config, model_config, tokens) for config in configs}
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


def share_of_bytes(config: PQConfig, model_config: Any, tokens: int) -> float:
    """Bytes of a sequence as a share of a half-precision cache's, window and tables included."""
    planned = plan_memory(model_config, tokens=tokens, pq_config=config)
    if not planned.values:
        raise ValueError("the model has no full-attention layer, so there is nothing to tune")
    return planned.bits("pq") / FULL_BITS


def _within_bytes(state: _State) -> Trial | None:
    """Of shapes that differ in their exact window only, the one with the largest that fits is the only one to run."""
    largest: dict[tuple[Any, ...], Trial] = {}
    for trial in state.all:
        key = _codes(trial.config)
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
        if not pending:
            continue
        most_exact = max(pending, key=lambda t: t.config.extended_residual)
        if state.keeps(most_exact.config):
            best = next(state.trials[t.config] for t in pending if state.keeps(t.config))
        for trial in pending if most_exact.config in state.out else ():
            state.rule_out(trial.config, f"{state.trials[most_exact.config].note} at its largest window")
    return best


def _codes(config: PQConfig) -> tuple[Any, ...]:
    """What decides how well old tokens are kept; pages too, as keys are scaled by the page."""
    return (config.bits, *(getattr(config, name) for name in CODES), config.page_size)


def _beats(a: Trial, b: Trial) -> bool:
    """Whether measured shape `a` is at least as good as `b` in both ways and better in one."""
    left, right = (a.ratio, a.loss or 0.0), (b.ratio, b.loss or 0.0)
    return left != right and left[0] <= right[0] and left[1] <= right[1]
