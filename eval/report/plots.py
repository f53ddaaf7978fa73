"""Charts and heat maps as PNG files and as SVG for a page; knows series, no results and no HTML.

One drawing serves both: in the colours of the light theme for a PNG, in placeholders for a page, which become CSS
variables (`var(--series-1)`), so that the page's style sheet decides, light or dark. Text in a page stays text.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from hf_pqcache.eval.report.charts import Bars, Chart, HeatMap, Point
from hf_pqcache.eval.report.naming import format_value, is_exact, tokens_text

#: What can be drawn.
Item = Chart | HeatMap | Bars

#: name of a CSS variable -> its colours, light and dark. Series colours keep a contrast of 3 with both backgrounds.
THEME: dict[str, tuple[str, str]] = {
    "ink": ("#1c2430", "#e6eaf0"),
    "muted": ("#5d6876", "#9aa7b8"),
    "grid": ("#e3e7ed", "#2b3442"),
    "paper": ("#ffffff", "#161c26"),
    "series-1": ("#2467d6", "#6ea8ff"),
    "series-2": ("#c8551b", "#ff9b5e"),
    "series-3": ("#0f8068", "#3fcfae"),
    "series-4": ("#8447c2", "#c596fa"),
    "series-5": ("#97700a", "#e6bf45"),
    "series-6": ("#bd2c5a", "#ff7fa3"),
    "series-7": ("#4a8420", "#96d556"),
    "exact-1": ("#6b7788", "#94a3b8"),
    "exact-2": ("#2b3440", "#e3e8ef"),
    "exact-3": ("#71876f", "#aebfac"),
    "exact-4": ("#8d6a5b", "#c4a294"),
}
#: Colours of caches that lose something, and of exact ones, which are plainer.
NUM_SERIES, NUM_EXACT = 7, 4
#: Steps of the heat map, from nothing to all found: one hue, light to strong (dark theme: dark to bright).
HEAT = [
    ("#f3f6fb", "#1d2633"),
    ("#dfe9f7", "#20344f"),
    ("#c6daf4", "#21416a"),
    ("#a7c7ef", "#235086"),
    ("#83b1e9", "#2760a4"),
    ("#5f99e2", "#2f72c2"),
    ("#3f81da", "#3f87dc"),
    ("#2c69c3", "#5b9dec"),
    ("#2153a3", "#7cb4f6"),
    ("#173f82", "#a3ccfb"),
    ("#0f2d61", "#cfe4fe"),
]
#: From this step on the number on a cell is written in the paper's colour.
_HEAT_TURN = 6
THEME |= {f"heat-{i}": colours for i, colours in enumerate(HEAT)}

LIGHT = {name: colours[0] for name, colours in THEME.items()}
#: A colour for each variable that nothing else in a drawing has.
_PLACEHOLDERS = {name: f"#0a0b{i:02x}" for i, name in enumerate(THEME)}
_MARKERS = "osD^vPX*"
_MAX_CELLS_WITH_TEXT = 200
_TITLE_INCHES = 0.5
#: Inches; on a page 5.2 x 72 units, so that text is about as large as it says from a telephone to half a desktop.
_WIDTH = 5.2


def save_png(item: Item, path: str | Path) -> None:
    """Write `item` as a PNG in the light theme, its title on it."""
    with mpl.rc_context(style(LIGHT)):
        figure, _ = _draw(item, LIGHT)
        _add_legend(figure, item, LIGHT)
        Path(path).write_bytes(png(figure, item.title, item.condition))


def png(figure: Figure, title: str, condition: str) -> bytes:
    """A figure with constrained layout as a PNG of 160 dots an inch, grown upwards by its title and condition."""
    width, height = figure.get_size_inches()
    whole = height + _TITLE_INCHES
    figure.set_size_inches(width, whole)
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, 0, 1, height / whole))
    figure.text(0.02, 1 - 0.22 / whole, title, ha="left", weight="bold", size=11)
    figure.text(0.02, 1 - 0.42 / whole, condition, ha="left", size=8, color=LIGHT["muted"])
    figure.set_dpi(160)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def svg(item: Item) -> str:
    """`item` as an <svg> element for a page: CSS variables for colours, a tool tip on every point, ids of its own."""
    stream = io.StringIO()
    with mpl.rc_context({**style(_PLACEHOLDERS), "svg.fonttype": "none", "svg.hashsalt": item.name}):
        figure, tips = _draw(item, _PLACEHOLDERS)
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for name, placeholder in _PLACEHOLDERS.items():
        text = text.replace(placeholder, f"var(--{name})")
    for i, tip in enumerate(tips):
        text = text.replace(f'<g id="tip-{i}">', f'<g id="tip-{i}" class="point"><title>{html.escape(tip)}</title>')
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{item.name}-", text)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{html.escape(item.title)}" xmlns:xlink="http://www.w3.org/1999/xlink">',
        text,
        count=1,
    )


def style(colours: Mapping[str, str]) -> Any:
    """matplotlib's settings for every drawing here, in these colours (`LIGHT`, or one of the same names)."""
    ink, muted, grid = colours["ink"], colours["muted"], colours["grid"]
    return {
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": grid,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": colours["paper"],
        "grid.color": grid,
        "grid.linewidth": 0.8,
        "xtick.color": grid,
        "ytick.color": grid,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 5.5,
    }


def _draw(item: Item, colours: Mapping[str, str]) -> tuple[Figure, list[str]]:
    """The figure, and a text for every part of it whose id is tip-<i>."""
    if isinstance(item, Chart):
        return _draw_chart(item, colours)
    return _draw_bars(item, colours) if isinstance(item, Bars) else _draw_heat_map(item, colours)


def legend(item: Item) -> list[tuple[str, str]]:
    """(name, CSS variable of its colour) of what is drawn; a page shows it beside the drawing, where it can wrap."""
    if isinstance(item, Chart):
        return [(name, _variable(item, point)) for name, point in item.legend()]
    return [(stage, _stage(i)) for i, stage in enumerate(item.stages)] if isinstance(item, Bars) else []


def _variable(chart: Chart, point: Point) -> str:
    """CSS variable of the colour of a point's cache."""
    kind, count = ("exact", NUM_EXACT) if is_exact(point.row) else ("series", NUM_SERIES)
    return f"{kind}-{chart.number(point) % count + 1}"


def _stage(index: int) -> str:
    """Stages of a step are steps of one hue, apart from the colours of caches."""
    return f"heat-{(10, 3, 8, 1, 6, 4, 9, 2)[index % 8]}"


def side_by_side(charts: Sequence[Chart]) -> bytes:
    """A PNG of charts of the same caches, beside each other under one legend."""
    with mpl.rc_context(style(LIGHT)):
        figure = Figure(figsize=(_WIDTH * len(charts), 3.8), layout="constrained")
        for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            _fill_chart(axes, chart, LIGHT)
            if len(charts) > 1:
                axes.set_title(f"{chart.title}, {chart.unit}", loc="left", size=9, color=LIGHT["muted"])
        _add_legend(figure, max(charts, key=lambda chart: len(chart.series)), LIGHT)
        label = charts[0].y_label
        title = f"{label[0].upper()}{label[1:]}" + (f", {charts[0].title}" if len(charts) == 1 else "")
        return png(figure, title, charts[0].condition)


def _draw_chart(chart: Chart, colours: Mapping[str, str]) -> tuple[Figure, list[str]]:
    figure = Figure(figsize=(_WIDTH, 3.4), layout="constrained")
    return figure, _fill_chart(figure.add_subplot(), chart, colours)


def _fill_chart(axes: Any, chart: Chart, colours: Mapping[str, str]) -> list[str]:
    tips: list[str] = []
    values = [point.y for points in chart.series.values() for point in points]
    scale, unit = _binary_unit(max(values)) if chart.unit == "bytes" else (1.0, chart.unit)
    drawn: set[str] = set()
    for name, points in chart.series.items():
        xs, ys = [point.x for point in points], [point.y / scale for point in points]
        is_one = len({chart.name_of(name, point) for point in points}) == 1  # or a line joins several caches of a kind
        line = _look(chart, points[0], colours)[0] if is_one else colours["grid"]
        axes.plot(xs, ys, color=line, linewidth=1.8 if is_one else 1.2, zorder=1)
        for x, y, point in zip(xs, ys, points, strict=True):
            colour, marker = _look(chart, point, colours)
            told = chart.name_of(name, point)
            axes.plot([x], [y], color=colour, marker=marker, markeredgewidth=0, label="_" if told in drawn else told)
            drawn.add(told)
            # an unseen, larger mark: what the pointer meets
            axes.plot([x], [y], marker="o", markersize=14, color=colour, alpha=0, gid=f"tip-{len(tips)}", label="_")
            where = f"{tokens_text(int(x))} tokens" if chart.is_over_tokens else f"{x:.2f} bits"
            tips.append(f"{told}: {format_value(point.y, chart.unit)} at {where}")
    if chart.baseline is not None:
        axes.axhline(chart.baseline, color=colours["muted"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            "exact cache" if chart.is_change else f"exact cache {chart.baseline:.4g}",
            (1, chart.baseline),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            color=colours["muted"],
            size=8,
        )
    elif min(values) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log", base=2)
    else:
        axes.set_ylim(bottom=0, top=1.08 * max(values) / scale or 1)
    if chart.is_change:  # of 0.1 and of 50 percent in one picture
        axes.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    if chart.is_over_tokens:
        lengths = sorted({point.x for points in chart.series.values() for point in points})
        token_axis(axes, lengths)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(chart.x_label)
    axes.set_title(f"{chart.y_label}, {unit}" if unit else chart.y_label, loc="left", size=9, color=colours["muted"])
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.06, y=0.12)
    return tips


def _look(chart: Chart, point: Point, colours: Mapping[str, str]) -> tuple[str, str]:
    """Colour and marker of a point: those of its cache."""
    turn = chart.number(point) // (NUM_EXACT if is_exact(point.row) else NUM_SERIES)
    return colours[_variable(chart, point)], _MARKERS[turn % len(_MARKERS)]


def _add_legend(figure: Figure, item: Item, colours: Mapping[str, str]) -> None:
    """A legend below the drawing, for pictures without a page around them."""
    names = legend(item)
    if not names:
        return
    longest = max(len(name) for name, _ in names)
    columns = 4 if longest < 12 else 3 if longest < 18 else 2 if longest < 34 else 1
    shapes = [mpl.patches.Patch(color=colours[colour], label=name) for name, colour in names]
    figure.legend(handles=shapes, loc="outside lower left", ncols=columns, labelcolor=colours["ink"], handlelength=1.0)


def _draw_bars(chart: Bars, colours: Mapping[str, str]) -> tuple[Figure, list[str]]:
    figure = Figure(figsize=(_WIDTH, 1.1 + 0.42 * max(2, len(chart.bars))), layout="constrained")
    axes = figure.add_subplot()
    tips: list[str] = []
    for row, (cache, values) in enumerate(chart.bars.items()):
        left = 0.0
        for i, (stage, value) in enumerate(zip(chart.stages, values, strict=True)):
            bar = mpl.patches.Rectangle((left, row - 0.32), value, 0.64, facecolor=colours[_stage(i)], linewidth=0)
            bar.set_gid(f"tip-{len(tips)}")
            axes.add_patch(bar)
            tips.append(f"{cache}, {stage}: {format_value(value, 'ms')}")
            left += value
        told = format_value(left, "ms")
        where: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(told, (left, row), size=9, color=colours["muted"], **where)
    longest = max((sum(values) for values in chart.bars.values()), default=0.0)
    axes.set_xlim(0, 1.25 * longest or 1)
    axes.set_ylim(len(chart.bars) - 0.5, -0.5)
    axes.set_yticks(range(len(chart.bars)), [textwrap.fill(name, 16, break_long_words=False) for name in chart.bars])
    axes.tick_params(length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("ms of one decode step")
    return figure, tips


def _draw_heat_map(chart: HeatMap, colours: Mapping[str, str]) -> tuple[Figure, list[str]]:
    figure = Figure(figsize=(_WIDTH, 1.3 + 0.32 * max(4, len(chart.depths))), layout="constrained")
    axes = figure.add_subplot()
    tips: list[str] = []
    is_small = len(chart.depths) * len(chart.columns) <= _MAX_CELLS_WITH_TEXT
    for i, (depth, line) in enumerate(zip(chart.depths, chart.values, strict=True)):
        for j, (column, value) in enumerate(zip(chart.columns, line, strict=True)):
            if value is None or not math.isfinite(value):
                continue
            step = round(min(1.0, max(0.0, value)) * (len(HEAT) - 1))
            cell = mpl.patches.Rectangle((j - 0.48, i - 0.46), 0.96, 0.92, facecolor=colours[f"heat-{step}"], linewidth=0)
            cell.set_gid(f"tip-{len(tips)}")
            axes.add_patch(cell)
            tips.append(f"{value:.0%} found at depth {depth:.0%}, {column}")
            if is_small:
                ink = colours["paper" if step >= _HEAT_TURN else "ink"]
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", size=8, color=ink)
    axes.set_xlim(-0.5, len(chart.columns) - 0.5)
    axes.set_ylim(len(chart.depths) - 0.5, -0.5)
    axes.set_xticks(
        range(len(chart.columns)),
        [textwrap.fill(column, 8 if len(chart.columns) <= 6 else 6, break_long_words=False) for column in chart.columns],
    )
    axes.set_yticks(range(len(chart.depths)), [f"{depth:.0%}" for depth in chart.depths])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(chart.column_label)
    axes.set_title("depth of the pass key; cells: % found", loc="left", size=9, color=colours["muted"])
    return figure, tips


def _binary_unit(most: float) -> tuple[float, str]:
    """The unit in which `most` bytes are a number of one to four digits: (its bytes, its name)."""
    power = min(4, max(0, int(math.log2(max(most, 1)) // 10)))
    return 1024.0**power, ("bytes", "KiB", "MiB", "GiB", "TiB")[power]


def token_axis(axes: Any, lengths: Iterable[float]) -> None:
    """A logarithmic x axis with a tick at the lengths measured, written 512, 1K, 2K, ..."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(_thinned(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(round(x))))


def _thinned(lengths: Iterable[float], most: int = 9) -> list[float]:
    """Every second, third, ... length, so that at most `most` are left, the last one among them."""
    ordered = list(lengths)
    step = -(-len(ordered) // most)
    return ordered[::-1][::step][::-1]
