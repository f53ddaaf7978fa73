"""Result rows -> series and heat maps worth drawing; knows neither how figures were measured nor how they are drawn."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_pqcache.eval.report.naming import (
    EXACT,
    HOW,
    LENGTH_KEYS,
    LENGTH_METRICS,
    UNREAD,
    bits_by_length,
    condition_text,
    grouped,
    is_exact,
    labels,
    length,
    mode_text,
    split,
    tokens_text,
)
from hf_pqcache.eval.session.results import Row


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
        unit: of y. is_over_tokens: x counts tokens. is_change: y is a change in percent, of any size and either sign.
        names: row.key -> its cache. numbers: cache -> number of its colour, the same in all charts of the same rows; exact
            caches and others are numbered apart.
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
    is_change: bool = False
    names: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    def legend(self) -> list[tuple[str, Point]]:
        """(what is drawn, its first point) in the order of drawing."""
        found: dict[str, Point] = {}
        for name, points in self.series.items():
            for point in points:
                found.setdefault(self.name_of(name, point), point)
        return list(found.items())

    def name_of(self, series: str, point: Point) -> str:
        """The cache of a point, with what its series adds to it (", distort")."""
        name = self.names.get(point.row.key, series)
        return name if series == name else name + series.removeprefix(point.row.cache)

    def number(self, point: Point) -> int:
        """Which colour the point's cache has, in every chart of the same rows."""
        return self.numbers.get(self.names.get(point.row.key, ""), 0)


@dataclass(frozen=True)
class Bars:
    """Where the time of a decode step goes: for every cache the milliseconds of each stage, laid end to end."""

    name: str
    title: str
    condition: str
    stages: list[str]
    bars: dict[str, list[float]]


@dataclass(frozen=True)
class HeatMap:
    """Recall: values[i][j] at depths[i] and columns[j], which are lengths or caches; None where not measured."""

    name: str
    title: str
    condition: str
    depths: list[float]
    columns: list[str]
    column_label: str
    values: list[list[float | None]]


def perplexity_charts(rows: Sequence[Row]) -> list[Chart]:
    """Perplexity against true bits a value, one chart for each model, task and window."""
    charts: list[Chart] = []
    names = labels(rows)
    bits = bits_by_length(rows, names)
    for (model, task, _), members in grouped(rows, {"perplexity"}, without=HOW).items():
        exact = [row.value for row in members if is_exact(row)]
        series: dict[str, list[Point]] = defaultdict(list)
        for row in members:
            # A running cache is weighed by the memory task, in a row of its own; a simulated one has computed bits.
            weighed = bits.get((model, row.settings.get("window")), {}).get(names[row.key])
            is_weighed = weighed is not None and (row.true_bits is None or row.settings.get("mode") == "cache")
            x = weighed if is_weighed else row.true_bits
            if not is_exact(row) and x is not None and math.isfinite(row.value):
                series[row.cache + mode_text(row, members)].append(Point(x, row.value, row))
        if series:
            charts.append(
                Chart(
                    name=_slug("perplexity", model, task, len(charts)),
                    title=f"{task}, {model}",
                    condition=condition_text(members[0], HOW | UNREAD),
                    x_label="true bits a value, side tables included",
                    y_label="perplexity",
                    unit="",
                    series={name: sorted(points, key=lambda point: point.x) for name, points in series.items()},
                    baseline=exact[0] if exact else None,
                    names=names,
                    numbers=_numbers(rows, names),
                )
            )
    return charts


def loss_charts(rows: Sequence[Row]) -> list[Chart]:
    """What each cache loses of the exact one's perplexity against its true bits, one chart for each model, text and window.

    True bits are those of an old token: codes, scales and offsets; what stays exact beside them is left out, for all caches
    alike. Only running caches count, and only where the exact one was run as well.
    """
    found: list[Chart] = []
    for (model, task, _), members in grouped(rows, {"perplexity"}, without=HOW).items():
        run = [row for row in members if row.settings.get("mode") in ("cache", "exact")]
        exact = next((row.value for row in run if row.cache == "dynamic"), None)
        series: dict[str, list[Point]] = defaultdict(list)
        for row in run:
            bits = row.provenance.get("code_bits")
            if exact and not is_exact(row) and isinstance(bits, int | float) and math.isfinite(row.value):
                own = ", own window" if row.cache_config.get("window") == "own" else ""
                series[row.cache + own].append(Point(bits, 100 * (row.value / exact - 1), row))
        if series:
            found.append(
                Chart(
                    name=_slug("loss", model, task, len(found)),
                    title=f"{task}, {model}",
                    condition=condition_text(run[0], HOW | UNREAD),
                    x_label="true bits a value: codes, scales and offsets",
                    y_label="change of the perplexity",
                    unit="percent",
                    series={name: sorted(points, key=lambda point: point.x) for name, points in series.items()},
                    baseline=0.0,
                    is_change=True,
                    names={row.key: name for name, points in series.items() for row in [point.row for point in points]},
                    numbers={name: i for i, name in enumerate(series)},
                )
            )
    return found


def length_charts(rows: Sequence[Row], metrics: Iterable[str] = LENGTH_METRICS) -> list[Chart]:
    """Times, throughput and bytes against length, one chart for each model, metric and condition of several lengths."""
    names = labels(rows)
    charts: list[Chart] = []
    for metric in metrics:
        heading, default_unit, _ = LENGTH_METRICS[metric]
        for (model, _task, _), members in grouped(rows, {metric}, without=set(LENGTH_KEYS)).items():
            series: dict[str, list[Point]] = defaultdict(list)
            for row in members:
                if (tokens := length(row)) is not None and math.isfinite(row.value):
                    series[names[row.key]].append(Point(tokens, row.value, row))
            if len({point.x for points in series.values() for point in points}) > 1:
                charts.append(
                    Chart(
                        name=_slug(metric, model, "", len(charts)),
                        title=f"{heading[0].upper()}{heading[1:]}, {model}",
                        condition=condition_text(members[0], {*LENGTH_KEYS, *UNREAD}),
                        x_label="tokens in the cache",
                        y_label=heading,
                        unit=members[0].unit or default_unit,
                        series={name: sorted(points, key=lambda point: point.x) for name, points in series.items()},
                        is_over_tokens=True,
                        names=names,
                        numbers=_numbers(rows, names),
                    )
                )
    return charts


def recall_maps(rows: Sequence[Row]) -> list[HeatMap]:
    """Recall over depth and length, one map for each model and cache; at a single length one map over depth and cache."""
    names = labels(rows)
    maps: list[HeatMap] = []

    def add(title: str, column_label: str, columns: dict[str, list[Row]]) -> None:
        depths = sorted({float(row.settings["depth"]) for members in columns.values() for row in members})
        cells = {(float(row.settings["depth"]), name): row.value for name, members in columns.items() for row in members}
        some = next(iter(columns.values()))[0]
        maps.append(
            HeatMap(
                name=_slug("recall", some.model, title, len(maps)),
                title=f"{title}, {some.model}",
                condition=condition_text(some, {*LENGTH_KEYS, "depth", *UNREAD}),
                depths=depths,
                columns=list(columns),
                column_label=column_label,
                values=[[cells.get((depth, name)) for name in columns] for depth in depths],
            )
        )

    for members in grouped(rows, {"recall"}, without={*LENGTH_KEYS, "depth"}).values():
        placed = [row for row in members if isinstance(row.settings.get("depth"), int | float) and length(row) is not None]
        placed.sort(key=lambda row: length(row) or 0)
        lengths = {length(row) or 0 for row in placed}
        if len(lengths) == 1:
            add(f"All caches at {tokens_text(lengths.pop())} tokens", "", split(placed, lambda row: names[row.key]))
            continue
        for cache, own in split(placed, lambda row: names[row.key]).items():
            add(cache, "tokens in the prompt", split(own, lambda row: tokens_text(length(row) or 0)))
    return maps


def breakdown_bars(rows: Sequence[Row]) -> list[Bars]:
    """The stages of a decode step, one drawing for each model and condition."""
    names = labels(rows)
    stages = {row.metric for row in rows if row.task == "breakdown"}
    found: list[Bars] = []
    for (model, _task, condition), members in grouped([r for r in rows if r.task == "breakdown"], stages, set(UNREAD)).items():
        order = list(dict.fromkeys(row.metric for row in members))
        by_cache = split(members, lambda row: names[row.key])
        bars = {}
        for cache, own in by_cache.items():
            values = {row.metric: row.value for row in own if math.isfinite(row.value)}
            bars[cache] = [max(0.0, values.get(stage, 0.0)) for stage in order]
        found.append(Bars(_slug("breakdown", model, "", len(found)), f"A decode step, {model}", condition, order, bars))
    return found


def _numbers(rows: Sequence[Row], names: dict[str, str]) -> dict[str, int]:
    """cache -> number of its colour: exact caches in the order of EXACT, then all others from 0 in that of the rows."""
    exact = sorted((row for row in rows if is_exact(row)), key=lambda row: EXACT.index(row.cache))
    others = [row for row in rows if not is_exact(row)]
    return {name: i for part in (exact, others) for i, name in enumerate(dict.fromkeys(names[row.key] for row in part))}


def _slug(*parts: Any) -> str:
    """A file name of these parts: lower-case letters, digits and dashes."""
    text = "-".join(str(part) for part in parts if part not in ("", 0))
    return "-".join("".join(c if c.isalnum() and c.isascii() else " " for c in text.lower()).split())
