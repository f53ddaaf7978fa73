"""Searches the shape of a cache: the least loss under a budget of bytes, or the fewest bytes under a budget of loss.

Bytes follow from the shape, so that only what can win is run. Taken for granted, which saves most of the runs: with the
codes given, a larger exact window (recent tokens, and a page) never loses accuracy and always takes more bytes. A codebook
depends on subspaces and bits only: every page size and window reuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from tqdm.auto import tqdm

from hf_pqcache.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.eval.accuracy_study import cache_bits
from hf_pqcache.eval.caches import CacheSpec
from hf_pqcache.eval.results import Row
from hf_pqcache.eval.session import Session
from hf_pqcache.eval.tasks._text import run_perplexity
from hf_pqcache.samples import compressible_layers
from hf_pqcache.shapes import kv_shape, layer_configs

FULL_BITS = 16


@dataclass(frozen=True)
class Budget:
    """What the best shape must keep to: exactly one of the two.

    Attributes:
        max_ratio: bytes as a share of a half-precision cache's, window and tables included, the shared codebook not.
        max_loss: relative rise of perplexity, 0.01 is 1 %.
    """

    max_ratio: float | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        if (self.max_ratio is None) == (self.max_loss is None):
            raise ValueError("give a budget of bytes (--max-ratio 0.28) or of loss (--max-loss 0.01), one of the two")
        for name, value in (("max_ratio", self.max_ratio), ("max_loss", self.max_loss)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")


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

    is_pareto: no measured shape has both fewer bytes and less loss.
    """

    config: PQConfig
    ratio: float
    loss: float | None = None
    perplexity: float | None = None
    note: str = ""
    is_pareto: bool = False


@dataclass
class Search:
    """What `tune` found.

    Attributes:
        best: the shape that keeps to the budget best, None if none does. trials: all shapes, by bytes.
        exact: perplexity of the exact cache. codebook: of the best shape.
    """

    trials: list[Trial]
    exact: float
    best: Trial | None = None
    codebook: Codebook | None = None
    rows: list[Row] = field(default_factory=list)


class _Runner:
    """Measures shapes on one text; learns each codebook once."""

    def __init__(
        self, session: Session, learn: Callable[[PQConfig], Codebook], text: str, text_name: str, options: dict[str, Any]
    ) -> None:
        self.session, self.learn = session, learn
        self.text, self.text_name, self.options = text, text_name, options
        self.codebooks: dict[tuple[int | None, int], Codebook] = {}
        self.rows: list[Row] = [self.run(CacheSpec("dynamic"))]

    @property
    def exact(self) -> float:
        return self.rows[0].value

    def codebook(self, config: PQConfig) -> Codebook:
        key = _codes(config)
        if key not in self.codebooks:
            self.codebooks[key] = self.learn(config)
        return self.codebooks[key]

    def run(self, spec: CacheSpec) -> Row:
        return run_perplexity(self.session.with_cache(spec), self.text_name, "1", self.text, **self.options)

    def measure(self, trial: Trial) -> Trial:
        row = self.run(CacheSpec("pq", trial.config.to_dict(), self.codebook(trial.config)))
        self.rows.append(row)
        return replace(trial, perplexity=row.value, loss=row.value / self.exact - 1)


def tune(
    session: Session,
    learn: Callable[[PQConfig], Codebook],
    base: PQConfig,
    text: str,
    text_name: str,
    budget: Budget,
    grid: Grid | None = None,
    *,
    tokens: int,
    window: int = 2048,
    limit: int | None = 4,
) -> Search:
    """Find the best shape of a cache for a model and a text. Figures that the session's results hold are not run again.

    Args:
        session: the model, and where rows are kept; its cache is ignored.
        learn: calibrates a codebook for num_subspaces and num_bits of a shape.
        base: everything that the grid leaves open.
        text: to measure the loss on; calibration must not have seen it.
        tokens: length of the sequence whose bytes count: the exact window weighs less in a longer one.
        window: tokens of a perplexity window. limit: how many windows; None measures the whole text.

    Raises ValueError for an impossible grid or a model of unknown shape.
    """
    shapes = layer_shapes(session.model.config)
    configs = (grid or Grid()).configs(base, shapes[0][1])
    trials = {config: Trial(config, cache_bits(config, shapes, tokens)["total"] / FULL_BITS) for config in configs}
    runner = _Runner(session, learn, text, text_name, {"window": window, "limit": limit})
    with tqdm(total=len(trials), desc="shapes", unit="shape", disable=not session.progress, leave=False) as bar:
        search = _within_bytes if budget.max_ratio is not None else _within_loss
        done = search(list(trials.values()), runner, budget, bar)
    measured = [trial for trial in done if trial.loss is not None]
    fits = [t for t in measured if _keeps(t, budget)]
    best = min(fits, key=lambda t: (t.loss, t.ratio) if budget.max_ratio is not None else (t.ratio, t.loss), default=None)
    marked = [replace(t, is_pareto=t.loss is not None and not any(_beats(other, t) for other in measured)) for t in done]
    return Search(
        trials=sorted(marked, key=lambda trial: trial.ratio),
        exact=runner.exact,
        best=None if best is None else replace(best, is_pareto=not any(_beats(other, best) for other in measured)),
        codebook=None if best is None else runner.codebook(best.config),
        rows=runner.rows,
    )


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


def _within_bytes(trials: list[Trial], runner: _Runner, budget: Budget, bar: Any) -> list[Trial]:
    """Of shapes that differ in their exact window only, the one with the largest that fits is the only one to run."""
    largest: dict[tuple[Any, ...], Trial] = {}
    for trial in (t for t in trials if _keeps(t, budget)):
        key = (*_codes(trial.config), trial.config.page_size)
        if key not in largest or trial.config.extended_residual > largest[key].config.extended_residual:
            largest[key] = trial
    done = []
    for trial in trials:
        if not _keeps(trial, budget):
            done.append(replace(trial, note="too many bytes"))
        elif trial not in largest.values():
            done.append(replace(trial, note="a larger window fits"))
        else:
            done.append(runner.measure(trial))
        bar.update()
    return done


def _within_loss(trials: list[Trial], runner: _Runner, budget: Budget, bar: Any) -> list[Trial]:
    """Codes that lose too much even beside the largest window are out; of the others shapes run from few bytes upwards."""
    families: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in sorted(trials, key=lambda t: t.ratio):
        families.setdefault(_codes(trial.config), []).append(trial)
    done: list[Trial] = []
    least = float("inf")  # bytes of the best so far
    for family in sorted(families.values(), key=lambda members: members[0].ratio):
        pending = [trial for trial in family if trial.ratio < least]
        done += [replace(trial, note="more bytes than the best") for trial in family[len(pending) :]]
        if pending:
            most_exact = max(pending, key=lambda t: (t.config.extended_residual, t.config.page_size))
            measured = {most_exact.config: runner.measure(most_exact)}
            for trial in pending:
                if not _keeps(measured[most_exact.config], budget):
                    note = "loses too much at its largest window"
                elif trial.ratio < least:
                    measured.setdefault(trial.config, trial)
                    if measured[trial.config].loss is None:
                        measured[trial.config] = runner.measure(trial)
                    least = trial.ratio if _keeps(measured[trial.config], budget) else least
                    note = ""
                else:
                    note = "more bytes than the best"
                done.append(measured.get(trial.config) or replace(trial, note=note))
        bar.update(len(family))
    return done


def _codes(config: PQConfig) -> tuple[int | None, int]:
    return config.num_subspaces, config.num_bits


def _keeps(trial: Trial, budget: Budget) -> bool:
    """Whether a shape keeps to the budget; to one of loss only if it was measured."""
    if budget.max_ratio is not None:
        return trial.ratio <= budget.max_ratio
    return trial.loss is not None and budget.max_loss is not None and trial.loss <= budget.max_loss


def _beats(a: Trial, b: Trial) -> bool:
    """Whether measured shape `a` is at least as good as `b` in both ways and better in one."""
    left, right = (a.ratio, a.loss or 0.0), (b.ratio, b.loss or 0.0)
    return left != right and left[0] <= right[0] and left[1] <= right[1]
