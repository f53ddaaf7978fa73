"""Result rows -> tables: a line for each cache, a column for each figure; knows neither measurements nor pages."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_pqcache.eval.report.naming import (
    EXACT,
    HOW,
    LENGTH_KEYS,
    LENGTH_METRICS,
    bits_by_length,
    condition_text,
    format_value,
    is_exact,
    is_score,
    labels,
    length,
    mode_text,
    split,
    tokens_text,
)
from hf_pqcache.eval.session.results import Row


@dataclass
class Table:
    """Cells by row and column; a cell is a number, a text or None. `units` has one entry a column."""

    title: str
    columns: list[str]
    units: list[str]
    rows: list[list[Any]] = field(default_factory=list)

    @property
    def is_numeric(self) -> list[bool]:
        """For every column whether it holds numbers."""
        return [any(isinstance(row[i], int | float) for row in self.rows) for i in range(len(self.columns))]

    def texts(self) -> list[list[str]]:
        """All cells as people read them."""
        return [[format_value(cell, unit) for cell, unit in zip(row, self.units, strict=True)] for row in self.rows]


@dataclass(frozen=True)
class _Column:
    """A column of the summary; `about` tells columns of one heading apart, `rank` orders them."""

    heading: str
    unit: str = ""
    about: str = ""
    rank: int = 0


def summary_table(rows: Sequence[Row], model: str) -> Table:
    """One line for each cache of a model: bits, perplexity and its change, recall, bytes and time.

    True bits are those of a number that is not exact, with its scales and offsets; bits at a length count everything. What
    depends on length is told at the one length and condition that most caches were measured at. LongBench and other scores
    come as their mean; `score_table` tells them apart.
    """
    rows = [row for row in rows if row.model == model]
    names = labels(rows)
    lines: dict[str, dict[_Column, Any]] = {}
    weighed = bits_by_length(rows, names)
    (_, at), bits = max(weighed.items(), key=lambda item: (len(item[1]), item[0][1] or 0), default=((model, None), {}))
    true = {names[row.key]: x for row in rows if isinstance(x := row.provenance.get("code_bits"), int | float)}
    for row in sorted(rows, key=lambda row: (not is_exact(row), -(true | bits).get(names[row.key], 0.0))):
        lines.setdefault(names[row.key], {})
    columns = [_Column("true bits"), _Column(f"bits at {tokens_text(at)}" if at else "bits")]
    for column, known in zip(columns, (true, bits), strict=True):
        for name, value in known.items():
            lines[name][column] = value
    told = _told_lengths(rows, names)
    for row in rows:
        for column, value in _summary_cells(row, rows, told):
            columns.append(column)
            lines[names[row.key]].setdefault(column, []).append(value)
    used = sorted(dict.fromkeys(columns), key=lambda column: column.rank)
    used = [column for column in used if any(column in cells for cells in lines.values())]
    table = Table(title=model, columns=["cache", *(c.heading for c in used)], units=["", *(c.unit for c in used)])
    table.rows = [[name, *(_mean(cells.get(column)) for column in used)] for name, cells in lines.items()]
    return table


def _told_lengths(rows: Sequence[Row], names: dict[str, str]) -> dict[str, tuple[int | None, str]]:
    """By metric the length and condition that most caches were measured at, the longest of several."""
    found: dict[str, tuple[int | None, str]] = {}
    for metric in {*LENGTH_METRICS, "recall"}:
        groups = split([row for row in rows if row.metric == metric], _length_and_condition)
        if groups:
            caches = {key: len({names[row.key] for row in members}) for key, members in groups.items()}
            found[metric] = max(groups, key=lambda key: (caches[key], key[0] or 0))
    return found


def _length_and_condition(row: Row) -> tuple[int | None, str]:
    return length(row), condition_text(row, {*LENGTH_KEYS, "depth"})


def _summary_cells(row: Row, rows: Sequence[Row], told: dict[str, tuple[int | None, str]]) -> list[tuple[_Column, float]]:
    """What a row adds to the summary of all `rows` of its model; several values of one column are averaged.

    told: by metric the only length and condition that is told.
    """
    if row.metric in told and told[row.metric] != _length_and_condition(row):
        return []
    if row.metric == "perplexity":
        condition = condition_text(row, HOW)
        same = [r for r in rows if r.metric == row.metric and r.task == row.task]
        about = row.task + (f" ({condition})" if len({condition_text(r, HOW) for r in same}) > 1 else "") + mode_text(row, same)
        cells = [(_Column(f"perplexity, {about}", rank=1), row.value)]
        exact = [r.value for r in same if is_exact(r) and condition_text(r, HOW) == condition]
        if exact and not is_exact(row):
            cells.append((_Column("change", "percent", about, rank=1), 100 * (row.value / exact[0] - 1)))
        return cells
    if row.metric == "recall":
        at = f" at {tokens_text(tokens)}" if (tokens := length(row)) is not None else ""
        return [(_Column(f"recall{at}", "share", rank=2), row.value)]
    if is_score(row):
        return [(_Column(f"{row.task.split('/')[0]}, mean score", rank=3), row.value)]
    if row.metric in LENGTH_METRICS and (tokens := length(row)) is not None:
        heading, unit, _ = LENGTH_METRICS[row.metric]
        rank = 4 + list(LENGTH_METRICS).index(row.metric)
        return [(_Column(f"{heading} at {tokens_text(tokens)}", row.unit or unit, rank=rank), row.value)]
    return []


def _mean(values: Any) -> Any:
    """The mean of a list of figures that are not NaN; what is no list as it is."""
    if not isinstance(values, list):
        return values
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None


def score_table(rows: Sequence[Row], model: str) -> Table | None:
    """Scores (neither perplexity, recall, time nor bytes) of a model: a line a task, a column a cache; None without any."""
    scores = [row for row in rows if row.model == model and is_score(row)]
    if not scores:
        return None
    names = labels(scores)
    caches = list(dict.fromkeys(names[row.key] for row in sorted(scores, key=lambda row: row.cache not in EXACT)))
    lines: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in scores:
        lines[row.task, row.metric][names[row.key]] = row.value
    table = Table(title=f"Scores, {model}", columns=["task", "metric", *caches], units=[""] * (2 + len(caches)))
    table.rows = [[task, metric, *(values.get(cache) for cache in caches)] for (task, metric), values in sorted(lines.items())]
    return table
