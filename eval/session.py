"""One model under one cache, and the rows measured on it: a finished row is found, not measured again. Knows no task."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_pqcache.eval.caches import CacheSpec
from hf_pqcache.eval.results import Results, Row, provenance


@dataclass
class Session:
    """What every measurement needs.

    Attributes:
        model, tokenizer: from `load_model`.
        model_name: as rows call it.
        cache: the cache under test.
        results: where rows are looked up and kept.
        force: measure again what is there already.
        progress: show progress bars.
        seed: of whatever a task draws at random.
        notes: added to the provenance of every row.
    """

    model: Any
    tokenizer: Any
    model_name: str
    cache: CacheSpec = field(default_factory=lambda: CacheSpec("dynamic"))
    results: Results = field(default_factory=Results)
    force: bool = False
    progress: bool = True
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(iter(self.model.parameters())).device

    def with_cache(self, cache: CacheSpec) -> Session:
        return replace(self, cache=cache)

    def row(self, task: str, version: str, metric: str, unit: str = "", **settings: Any) -> Row:
        """A row still without a value. The model's dtype is one of its settings."""
        book = self.cache.codebook
        return Row(
            task=task,
            metric=metric,
            value=float("nan"),
            unit=unit,
            model=self.model_name,
            cache=self.cache.name,
            settings={**settings, "dtype": str(self.model.dtype).removeprefix("torch.")},
            cache_config=dict(self.cache.settings),
            task_version=version,
            codebook=None if book is None else book.fingerprint,
            seed=self.seed,
        )

    def measure(self, rows: Sequence[Row], run: Callable[[], Sequence[float]], true_bits: float | None = None) -> list[Row]:
        """Fill in and keep the values of `rows`, which one run yields in their order, unless all are there already."""
        if not self.force and all(row.key in self.results for row in rows):
            return [self.results[row.key] for row in rows]
        begin = time.perf_counter()
        values = run()
        if len(values) != len(rows):
            raise ValueError(f"{rows[0].task} yields {len(values)} figures, {len(rows)} were announced")
        origin = provenance(self.device, seconds=round(time.perf_counter() - begin, 3), **self.notes)
        done = [
            replace(row, value=float(value), true_bits=true_bits, provenance=origin)
            for row, value in zip(rows, values, strict=True)
        ]
        for row in done:
            self.results.add(row)
        return done
