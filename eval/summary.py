"""Result rows -> names of caches, series and tables; knows neither how figures were measured nor how they are drawn."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_pqcache.eval.results import Row

#: Caches that keep every number as the model computed it: what the others are compared with.
EXACT = ("dynamic", "static", "paged-kv")
#: Metrics that are measured over the length of a sequence: (heading, unit, is smaller better).
LENGTH_METRICS = {
    "tpot": ("time per output token", "ms", True),
    "ttft": ("time to first token", "ms", True),
    "throughput": ("throughput", "tokens/s", False),
    "peak_bytes": ("peak memory", "bytes", True),
    "kv_bytes": ("KV cache", "bytes", True),
}
#: Settings that say how long the sequence is, in the order in which they are looked for.
LENGTH_KEYS = ("tokens", "prefill_tokens", "length", "context_tokens")
_SHORT = {
    "num_subspaces": "M",
    "num_bits": "n",
    "nbits": "n",
    "page_size": "page",
    "extended_residual": "recent",
    "sink_tokens": "sinks",
    "q_group_size": "group",
    "group_size": "group",
    "residual_length": "recent",
}
#: Always told of a cache, even where all caches of the file agree.
_TOLD = {"num_subspaces", "num_bits", "nbits"}
#: Never told: they change no figure, or only how much room is reserved.
_UNTOLD = {"max_pages", "learn_tokens", "backend"}
#: Settings that belong to a cache, not to the condition that it was measured under.
_OF_CACHE = {"calibrated_on", "merged"}
#: Settings that say how a perplexity was computed, not of what.
_HOW = {"mode", "chunk"}
#: Settings that keep measurements apart and that nobody wants to read.
_UNREAD = {"text_sha256"}


@dataclass(frozen=True)
class Point:
    """One figure in a series; `row` says all about it."""

    x: float
    y: float
    row: Row


@dataclass(frozen=True)
class Chart:
    """Series over one axis that were measured under one condition.

    Attributes:
        name: of its files, unique in a report. title, condition: for people.
        series: points by cache, in the order of x. baseline: value of the exact cache, where it is one number.
        unit: of y. is_over_tokens: x counts tokens.
    """

    name: str
    title: str
    condition: str
    x_label: str
    y_label: str
    unit: str
    series: dict[str, list[Point]]
    baseline: float | None = None
    is_over_tokens: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Recall of one cache: values[i][j] at depths[i] and lengths[j]; None where not measured."""

    name: str
    title: str
    condition: str
    depths: list[float]
    lengths: list[int]
    values: list[list[float | None]]


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


def labels(rows: Sequence[Row]) -> dict[str, str]:
    """Row.key -> name of the row's cache, as short as tells the caches of these rows apart."""
    configs = defaultdict(list)
    for row in rows:
        configs[row.cache].append(row)
    found = {}
    for members in configs.values():
        seen = defaultdict(set)
        for row in members:
            for key, value in row.cache_config.items():
                seen[key].add(json.dumps(value))
        absent = {key for key in seen if any(key not in row.cache_config for row in members)}
        varying = {key for key, values in seen.items() if len(values) > 1 or (key in absent and len(members) > 1)}
        books: dict[tuple[str, str], set[str]] = defaultdict(set)
        for row in members:
            books[row.model, _name(row, varying)] |= {row.codebook} if row.codebook else set()
        for row in members:
            name = _name(row, varying)
            if len(books[row.model, name]) > 1 and row.codebook:
                name += f" #{row.codebook[:6]}"
            if row.settings.get("merged"):
                name += ", merged"
            if str(row.settings.get("calibrated_on", "")).endswith("/test"):
                name += f", calibrated on {row.settings['calibrated_on']}"
            found[row.key] = name
    return found


def length(row: Row) -> int | None:
    """Tokens of the sequence that the row was measured at, None if it does not say."""
    for key in LENGTH_KEYS:
        if isinstance(row.settings.get(key), int):
            return int(row.settings[key])
    return None


def models(rows: Iterable[Row]) -> list[str]:
    """The models of the rows, in the order of their first row."""
    return list(dict.fromkeys(row.model for row in rows))


def perplexity_charts(rows: Sequence[Row]) -> list[Chart]:
    """Perplexity against true bits a value, one chart for each model, task and window."""
    charts: list[Chart] = []
    for (model, task, _), members in _grouped(rows, {"perplexity"}, without=_HOW).items():
        exact = [row.value for row in members if is_exact(row)]
        series: dict[str, list[Point]] = defaultdict(list)
        for row in members:
            if not is_exact(row) and row.true_bits is not None and math.isfinite(row.value):
                series[row.cache + _mode(row, members)].append(Point(row.true_bits, row.value, row))
        if series:
            charts.append(
                Chart(
                    name=_slug("perplexity", model, task, len(charts)),
                    title=f"{task}, {model}",
                    condition=_condition(members[0], _HOW | _UNREAD),
                    x_label="true bits a value, side tables included",
                    y_label="perplexity",
                    unit="",
                    series={name: sorted(points, key=lambda point: point.x) for name, points in series.items()},
                    baseline=exact[0] if exact else None,
                )
            )
    return charts


def length_charts(rows: Sequence[Row], metrics: Iterable[str] = LENGTH_METRICS) -> list[Chart]:
    """Times, throughput and bytes against length, one chart for each model, metric and condition."""
    names = labels(rows)
    charts: list[Chart] = []
    for metric in metrics:
        heading, default_unit, _ = LENGTH_METRICS[metric]
        for (model, _task, _), members in _grouped(rows, {metric}, without=set(LENGTH_KEYS)).items():
            series: dict[str, list[Point]] = defaultdict(list)
            for row in members:
                if (tokens := length(row)) is not None and math.isfinite(row.value):
                    series[names[row.key]].append(Point(tokens, row.value, row))
            if series:
                charts.append(
                    Chart(
                        name=_slug(metric, model, "", len(charts)),
                        title=f"{heading[0].upper()}{heading[1:]}, {model}",
                        condition=_condition(members[0], {*LENGTH_KEYS, *_UNREAD}),
                        x_label="tokens in the cache",
                        y_label=heading,
                        unit=members[0].unit or default_unit,
                        series={name: sorted(points, key=lambda point: point.x) for name, points in series.items()},
                        is_over_tokens=True,
                    )
                )
    return charts


def recall_maps(rows: Sequence[Row]) -> list[HeatMap]:
    """Recall over depth and length, one map for each model and cache that was measured at several of them."""
    names = labels(rows)
    maps: list[HeatMap] = []
    for (model, _task, _), members in _grouped(rows, {"recall"}, without={*LENGTH_KEYS, "depth"}).items():
        caches: dict[str, list[Row]] = defaultdict(list)
        for row in members:
            if isinstance(row.settings.get("depth"), int | float) and length(row) is not None:
                caches[names[row.key]].append(row)
        for cache, points in caches.items():
            depths = sorted({float(row.settings["depth"]) for row in points})
            lengths = sorted({length(row) or 0 for row in points})
            cells = {(float(row.settings["depth"]), length(row)): row.value for row in points}
            maps.append(
                HeatMap(
                    name=_slug("recall", model, cache, len(maps)),
                    title=f"{cache}, {model}",
                    condition=_condition(members[0], {*LENGTH_KEYS, "depth", *_UNREAD}),
                    depths=depths,
                    lengths=lengths,
                    values=[[cells.get((depth, tokens)) for tokens in lengths] for depth in depths],
                )
            )
    return maps


def summary_table(rows: Sequence[Row], model: str) -> Table:
    """One line for each cache of a model: bits, perplexity and its change, recall, bytes and time at the longest length.

    LongBench and other scores come as their mean; `score_table` tells them apart.
    """
    rows = [row for row in rows if row.model == model]
    names = labels(rows)
    lines: dict[str, dict[_Column, Any]] = {}
    bits = {names[row.key]: float(row.true_bits) for row in rows if row.true_bits is not None}
    for row in sorted(rows, key=lambda row: (not is_exact(row), -bits.get(names[row.key], 0.0))):
        lines.setdefault(names[row.key], {})
    columns = [_Column("true bits")]
    for name, value in bits.items():
        lines[name][columns[0]] = value
    for row in rows:
        for column, value in _summary_cells(row, rows):
            columns.append(column)
            lines[names[row.key]].setdefault(column, []).append(value)
    used = sorted(dict.fromkeys(columns), key=lambda column: column.rank)
    used = [column for column in used if any(column in cells for cells in lines.values())]
    table = Table(title=model, columns=["cache", *(c.heading for c in used)], units=["", *(c.unit for c in used)])
    table.rows = [[name, *(_mean(cells.get(column)) for column in used)] for name, cells in lines.items()]
    return table


@dataclass(frozen=True)
class _Column:
    """A column of the summary; `about` tells columns of one heading apart, `rank` orders them."""

    heading: str
    unit: str = ""
    about: str = ""
    rank: int = 0


def _summary_cells(row: Row, rows: Sequence[Row]) -> list[tuple[_Column, float]]:
    """What a row adds to the summary of all `rows` of its model; several values of one column are averaged."""
    if row.metric == "perplexity":
        condition = _condition(row, _HOW)
        same = [r for r in rows if r.metric == row.metric and r.task == row.task]
        about = row.task + (f" ({condition})" if len({_condition(r, _HOW) for r in same}) > 1 else "") + _mode(row, same)
        cells = [(_Column(f"perplexity, {about}", rank=1), row.value)]
        exact = [r.value for r in same if is_exact(r) and _condition(r, _HOW) == condition]
        if exact and not is_exact(row):
            cells.append((_Column("change", "percent", about, rank=1), 100 * (row.value / exact[0] - 1)))
        return cells
    if row.metric == "recall":
        return [(_Column("recall", "share", rank=2), row.value)]
    if is_score(row):
        return [(_Column(f"{row.task.split('/')[0]}, mean score", rank=3), row.value)]
    if row.metric in LENGTH_METRICS and (tokens := length(row)) is not None:
        heading, unit, _ = LENGTH_METRICS[row.metric]
        if tokens == max(length(r) or 0 for r in rows if r.metric == row.metric):
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


def is_exact(row: Row) -> bool:
    return row.cache in EXACT


def is_score(row: Row) -> bool:
    """Whether the row is a task's score, not a perplexity, a recall, a time or a size."""
    return row.metric not in {"perplexity", "recall", *LENGTH_METRICS} and row.task not in ("speed", "memory", "breakdown")


def tokens_text(tokens: int) -> str:
    """2048 -> 2K, 1000 -> 1000."""
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def settings_text(settings: dict[str, Any]) -> str:
    """{"window": 1024, "stride": 512} -> "window 1024, stride 512"; what is None is not told."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items() if value is not None)


def format_value(value: Any, unit: str = "") -> str:
    """A number as people read it: 12.34 ms, +0.35 %, 1,024, 3.20 MiB; other values as they are, None as a dash.

    unit: "percent" is a signed change, "share" a fraction of 1, "bytes" becomes KiB, MiB, ...; any other stands behind.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if unit == "percent":
        return f"{value:+.2f} %"
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "bytes":
        power = min(4, int(math.log2(value) // 10)) if value >= 1 else 0
        return f"{value:,.0f} B" if power == 0 else f"{value / 1024**power:,.2f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return (f"{value:,.1f}" if abs(value) >= 1000 else f"{value:#.4g}".rstrip(".")) + (f" {unit}" if unit else "")


def _name(row: Row, varying: set[str]) -> str:
    config = row.cache_config
    told = [
        f"{_SHORT.get(key, key)}={config[key]}"
        for key in sorted(config, key=lambda key: (key not in _SHORT, list(_SHORT).index(key) if key in _SHORT else 0, key))
        if key not in _UNTOLD and config[key] is not None and (key in varying or key in _TOLD)
        if not (is_exact(row) and key in _TOLD)
    ]
    return " ".join([row.cache, *told])


def _grouped(rows: Sequence[Row], metrics: set[str], without: set[str]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows of these metrics by model, task and condition: their settings but those of `without`, as a text."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.metric in metrics:
            groups[row.model, row.task, _condition(row, without)].append(row)
    return dict(groups)


def _condition(row: Row, without: set[str]) -> str:
    return settings_text({key: value for key, value in sorted(row.settings.items()) if key not in without | _OF_CACHE})


def _mode(row: Row, rows: Iterable[Row]) -> str:
    """What tells the row's perplexity from others of the same cache among `rows`; "" for a cache as it is used.

    "distort" is MILLION's way (no exact window). A run of the real cache is told apart only where the same cache was
    simulated too.
    """
    mode = row.settings.get("mode")
    if mode == "distort":
        return ", distort"
    others = {
        r.settings.get("mode")
        for r in rows
        if (r.cache, r.cache_config, r.codebook) == (row.cache, row.cache_config, row.codebook)
    }
    return ", as deployed" if mode == "cache" and others & {"stream", "exact"} else ""


def _slug(*parts: Any) -> str:
    """A file name of these parts: lower-case letters, digits and dashes."""
    text = "-".join(str(part) for part in parts if part not in ("", 0))
    return "-".join("".join(c if c.isalnum() and c.isascii() else " " for c in text.lower()).split())
