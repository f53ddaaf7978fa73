"""One model under one cache, and the rows measured on it: a finished row is found, not measured again. Knows no task."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_pqcache.eval.session.caches import CacheSpec
from hf_pqcache.eval.session.results import Results, Row, device_name, provenance
from hf_pqcache.models.identity import dtype_name, is_of_model, short, weights_fingerprint


@dataclass
class Session:
    """What every measurement needs.

    Attributes:
        model, tokenizer: from `load_model`.
        model_name: as rows call it. fingerprint: which config and weights that is, see identity.py; "" looks at the model
            in memory whenever a row is made.
        cache: the cache under test.
        results: where rows are looked up and kept.
        force: measure again what is there already.
        progress: show progress bars.
        seed: of whatever a task draws at random.
        notes: added to the provenance of every row.
        loading: how the model was loaded, where that changes figures; settings of every row.
        show: called with every row as soon as it is measured and kept.
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
    loading: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    show: Callable[[Row], None] | None = None

    @property
    def device(self) -> torch.device:
        return next(iter(self.model.parameters())).device

    @property
    def device_name(self) -> str:
        """What the figures of speed depend on."""
        return device_name(self.device)

    @property
    def model_fingerprint(self) -> str:
        return self.fingerprint or weights_fingerprint(self.model)

    @property
    def code_bits(self) -> float | None:
        """Bits of each number of an old token under the cache, see `CacheSpec.true_bits`."""
        return self.cache.true_bits(self.model.config, 8 * self.model.dtype.itemsize)

    def say(self, text: str) -> None:
        """Tell what goes on, above the progress bars, unless they are not wanted either."""
        if self.progress:
            tqdm.write(text, file=sys.stderr)

    def with_cache(self, cache: CacheSpec) -> Session:
        return replace(self, cache=cache)

    def row(self, task: str, version: str, metric: str, unit: str = "", **settings: Any) -> Row:
        """A row still without a value. The model's dtype and the calibration text are settings too."""
        book = self.cache.codebook
        if book is not None:
            learnt = {"calibrated_on": book.metadata.get("source"), "normalised": None if book.is_normalised else False}
            if is_of_model(book.metadata, self.model, self.fingerprint or None) is False:
                learnt["codebook_of"] = f"{book.metadata.get('model')} ({short(book.metadata['model_fingerprint'])})"
            settings |= {name: value for name, value in learnt.items() if value is not None}
        return Row(
            task=task,
            metric=metric,
            value=float("nan"),
            unit=unit,
            model=self.model_name,
            model_fingerprint=self.model_fingerprint,
            cache=self.cache.name,
            settings={**settings, **self.loading, "dtype": dtype_name(self.model)},
            cache_config={**self.cache.settings, **({"press": self.cache.press} if self.cache.press else {})},
            task_version=version,
            codebook=None if book is None else book.fingerprint,
            seed=self.seed,
        )

    def measure(
        self,
        rows: Sequence[Row],
        run: Callable[[], Sequence[float]],
        true_bits: float | Callable[[], float | None] | None = None,
        errors: Callable[[], Sequence[float | None]] = lambda: (),
    ) -> list[Row]:
        """Fill in and keep the values of `rows`, which one run yields in their order, unless all are there already.

        true_bits: of the rows; a function is asked after the run. errors: standard errors of the values, asked after it.
        """
        if not self.force and all(row.key in self.results for row in rows):
            return [self.results[row.key] for row in rows]
        begin = time.perf_counter()
        values = run()
        if len(values) != len(rows):
            raise ValueError(f"{rows[0].task} yields {len(values)} figures, {len(rows)} were announced")
        seconds = round(time.perf_counter() - begin, 3)
        origin = provenance(self.device, seconds=seconds, code_bits=self.code_bits, **self.notes)
        bits = true_bits() if callable(true_bits) else true_bits
        done = [
            replace(row, value=float(value), true_bits=bits, provenance=origin) for row, value in zip(rows, values, strict=True)
        ]
        for i, error in enumerate(errors()):
            if error is not None:
                done[i] = replace(done[i], provenance={**origin, "stderr": error})
        for row in done:
            self.keep(row)
        return done

    def keep(self, row: Row) -> None:
        """Add a row to the results, and show it."""
        self.results.add(row)
        if self.show is not None:
            self.show(row)
