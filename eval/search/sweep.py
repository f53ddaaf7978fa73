"""Codes x windows x tasks: every shape's figures against the exact cache's, and the bytes that it saves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_pqcache.cache.footprint import plan_memory
from hf_pqcache.config import OPERATING_POINTS, PQConfig
from hf_pqcache.eval import tasks
from hf_pqcache.eval.report.naming import format_value, split
from hf_pqcache.eval.session.caches import CODES, CacheSpec, codes_of, codes_text
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session

#: A task to sweep over: session -> its rows; of several rows the mean of their values counts.
Run = Callable[[Session], Sequence[Row]]


@dataclass
class Line:
    """One shape, or the exact cache (config None).

    Attributes:
        bits: true ones, see `CacheSpec.true_bits`.
        bytes_used: of one sequence of the sweep's length. saved: share of the exact cache's bytes, 0 to 1.
        values: by task. changes: by task against the exact cache: of a perplexity the relative rise, else the difference.
    """

    config: PQConfig | None
    bits: float | None
    bytes_used: int
    saved: float
    values: dict[str, float] = field(default_factory=dict)
    changes: dict[str, float] = field(default_factory=dict)

    @property
    def codes(self) -> str:
        return "" if self.config is None else codes_text(self.config.to_dict())

    @property
    def label(self) -> str:
        return "exact" if self.config is None else f"{self.codes} recent={self.config.extended_residual}"


@dataclass(frozen=True)
class Sweep:
    """Lines, the exact cache's first, and the rows that they come from; metrics: by task."""

    lines: list[Line]
    rows: list[Row]
    metrics: dict[str, str]


def grid(base: PQConfig, head_dim: int, windows: Sequence[int], codes: Mapping[str, Sequence[int]]) -> list[PQConfig]:
    """All shapes, what is not varied as in `base`.

    Args:
        head_dim: see `head_dim_of`. windows: of recent tokens.
        codes: what to try of the settings `bits` and CODES; without any, all operating points.

    Raises ValueError for one that this head_dim has not.
    """
    varied = dict(codes) or {"bits": tuple(OPERATING_POINTS)}
    if "bits" in varied:  # codes of their own would win over it
        base = base.replace(**dict.fromkeys(CODES))
    found = []
    for values in itertools.product(*varied.values()):
        config = base.replace(**dict(zip(varied, values, strict=True)))
        if head_dim and set(varied) & set(CODES):
            config = config.replace(**codes_of(config, head_dim))
        found += [config.replace(extended_residual=window) for window in windows]
    return list(dict.fromkeys(found))


def sweep(
    session: Session, ready: Callable[[CacheSpec], Session], configs: Sequence[PQConfig], runs: dict[str, Run], tokens: int
) -> Sweep:
    """Run every task under the exact cache and under every shape. What the session's results hold is not run again.

    Args:
        ready: the session under a cache, see `Setup.ready`.
        tokens: length of the sequence whose bytes are told.
    """
    config = session.model.config
    dtype_bytes = session.model.dtype.itemsize
    planned = {c: plan_memory(config, tokens=tokens, pq_config=c, dtype_bytes=dtype_bytes) for c in configs}
    exact_bytes = plan_memory(config, tokens=tokens, dtype_bytes=dtype_bytes)["dynamic"].total
    specs = [CacheSpec("dynamic"), *(CacheSpec("pq", c.to_dict()) for c in configs)]
    exact = Line(None, specs[0].true_bits(config, 8 * dtype_bytes), exact_bytes, 0.0)
    lines, rows, metrics = [exact], [], {}
    with tqdm(total=len(specs) * len(runs), desc="sweep", unit="task", disable=not session.progress, leave=False) as bar:
        for spec, shape in zip(specs, [None, *configs], strict=True):
            one = ready(spec)
            line = exact
            if shape is not None:
                used = planned[shape]["pq"]
                line = Line(shape, spec.true_bits(config), used.total, 1 - used.total / exact_bytes)
                lines.append(line)
            for name, run in runs.items():
                found = list(run(one))
                rows += found
                metrics[name] = found[0].metric
                values = [row.value for row in found if row.metric == found[0].metric]
                line.values[name] = math.fsum(values) / len(values)
                before = exact.values[name]
                is_perplexity = found[0].metric == "perplexity"
                line.changes[name] = line.values[name] / before - 1 if is_perplexity else line.values[name] - before
                bar.update()
    return Sweep(lines, rows, metrics)


def table(found: Sweep) -> dict[str, list[str]]:
    """The columns of the table: bytes, what is saved, and by task the figure and its change against the exact cache."""
    lines = found.lines
    columns = {
        "cache": [line.label for line in lines],
        "true bits": ["" if line.bits is None else f"{line.bits:.2f}" for line in lines],
        "bytes": [format_value(line.bytes_used, "bytes") for line in lines],
        "saved": ["" if line.config is None else f"{line.saved:.1%}" for line in lines],
    }
    for name, metric in found.metrics.items():
        is_perplexity = metric == "perplexity"
        columns[f"{Path(name).name} {metric}"] = [f"{line.values[name]:.4g}" for line in lines]
        columns["change" + " " * len(columns)] = [  # headings of one word, told apart by blanks that nobody sees
            "" if line.config is None else f"{line.changes[name]:+.2%}" if is_perplexity else f"{line.changes[name]:+.3g}"
            for line in lines
        ]
    return columns


def picture(found: Sweep, title: str, condition: str) -> bytes:
    """A PNG: for every task the change against the exact cache over the bytes saved, a line for each way to code."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from hf_pqcache.eval.report import plots

    with mpl.rc_context(plots.style(plots.LIGHT)):
        names = list(found.metrics)
        figure = Figure(figsize=(max(6.4, 4.6 * len(names)), 4.2), layout="constrained")
        lines = split(found.lines[1:], lambda line: line.codes)
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            is_perplexity = found.metrics[name] == "perplexity"
            for i, (codes, own) in enumerate(lines.items()):
                own = sorted(own, key=lambda line: line.saved)
                ys = [line.changes[name] * (100 if is_perplexity else 1) for line in own]
                colour = plots.LIGHT[f"series-{i % plots.NUM_SERIES + 1}"]
                axes.plot([100 * line.saved for line in own], ys, marker="o", color=colour, label=codes)
            axes.axhline(0, color=plots.LIGHT["exact-1"], linewidth=1)
            axes.set_xlabel("bytes saved, %")
            unit = "%" if is_perplexity else "points of the score"
            axes.set_title(f"{Path(name).name}: change of {found.metrics[name]}, {unit}", loc="left", size=9)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=min(6, len(labels)))
        return plots.png(figure, title, condition)


def perplexity_run(text: str, name: str, **options: Any) -> Run:
    """Perplexity of a text, in the cache's own mode."""
    from hf_pqcache.eval.tasks._text import run_perplexity

    return lambda session: [run_perplexity(session, name, "1", text, **options)]


def recall_run(text: str, tokens: int, count: int) -> Run:
    """Pass keys at `tokens` tokens, spread evenly over the depths."""
    depths = [(i + 0.5) / count for i in range(count)]
    return lambda session: tasks.get("recall").run(session, text, lengths=(tokens,), depths=depths, count=1)
