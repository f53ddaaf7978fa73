"""What `pqcache bench` measured, as a PNG; knows the fields of its rows, not how they were timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from hf_pqcache.eval.report.naming import split, tokens_text
from hf_pqcache.eval.report.plots import LIGHT, NUM_SERIES, png, style, token_axis

_BAR_INCHES = 0.155
_FLOOR = (0, (4, 3))  # dashes


def draw(rows: Sequence[dict[str, Any]], kind: str) -> bytes:
    """A PNG of the rows of one bench.

    Args:
        rows: of `bench_kernel`, `bench_generate`, `bench_serve` or `bench_pipeline`; what was not timed is left out.
        kind: "kernel" draws, for every case, how many times slower each fp16 path of torch is; "generate" milliseconds per
            token against length, a panel for every shape of model; "serve" and "pipeline" tokens a second of every case
            and variant.

    Raises:
        ValueError: an unknown kind, or no row that can be drawn.
    """
    kinds: dict[str, tuple[Callable[[dict[str, Any]], bool], Callable[[list[dict[str, Any]]], tuple[Figure, str]]]] = {
        "kernel": (lambda row: bool(row.get("fp16_us")), _kernel),
        "generate": (lambda row: row.get("kind") == "decode", _generate),
        "serve": (lambda row: "throughput_tok_s" in row, _serve),
        "pipeline": (lambda row: "throughput_tok_s" in row, _pipeline),
    }
    if kind not in kinds:
        raise ValueError(f"kind={kind!r} is unknown; use one of {sorted(kinds)}")
    is_drawn, figure_of = kinds[kind]
    if not (drawn := [row for row in rows if is_drawn(row)]):
        raise ValueError(f"none of the {len(rows)} rows is a timed {kind} row with something to compare")
    with mpl.rc_context(style(LIGHT)):
        figure, title = figure_of(drawn)
        return png(figure, title, _condition(drawn[0]))


def _condition(row: dict[str, Any]) -> str:
    told = [row.get("gpu"), row.get("torch") and f"torch {row['torch']}", row.get("dtype")]
    if "copy_tb_per_s" in row:
        told.append(f"copy {row['copy_tb_per_s']:.2f} TB/s, read + written")
    return ", ".join(str(part) for part in told if part)


def _kernel(rows: list[dict[str, Any]]) -> tuple[Figure, str]:
    """Bars: time of each fp16 path, in its faster form, over ours; a mark where the copy bandwidth would end the bar."""
    times = [_by_backend(row["fp16_us"]) for row in rows]
    backends = list(dict.fromkeys(name for one in times for name in one))
    colours = {name: LIGHT[f"series-{i % NUM_SERIES + 1}"] for i, name in enumerate(backends)}
    figure = Figure(figsize=(7.6, 0.9 + _BAR_INCHES * (sum(map(len, times)) + len(rows))), layout="constrained")
    axes = figure.add_subplot()
    y, middles = 0.0, []
    for row, found in zip(rows, times, strict=True):
        ours = row["best_fp16_us"] / row["speedup"]
        middles.append(y + (len(found) - 1) / 2)
        for name in (name for name in backends if name in found):
            ratio, ceiling = found[name] / ours, found[name] / row["floor_us"]
            axes.barh(y, ratio - 1, left=1, height=0.86, color=colours[name])
            axes.plot([ceiling] * 2, [y - 0.43, y + 0.43], color=LIGHT["ink"], linewidth=1.6, solid_capstyle="butt")
            if ratio >= 1.5:  # inside the bar, where no mark runs through the number
                axes.text(ratio, y, f"{ratio:.3g} ", va="center", ha="right", size=7, color="white")
            else:
                axes.text(max(1.0, ratio), y, f" {ratio:.3g}", va="center", size=7)
            y += 1
        y += 1
    axes.axvline(1, color=LIGHT["muted"], linewidth=1.2)
    axes.set_ylim(y - 1.4, -0.6)
    axes.set_xscale("log", base=2)
    axes.set_yticks(middles, [_case(row) for row in rows], size=7.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("time of fp16 attention over ours; longer is better")
    keys: list[Any] = [mpl.patches.Patch(color=colour, label=f"fp16 {name}") for name, colour in colours.items()]
    keys.append(Line2D([], [], color=LIGHT["ink"], linewidth=1.6, label="ceiling: our bytes at copy bandwidth"))
    figure.legend(handles=keys, loc="outside lower left", ncols=4)
    return figure, "Decode attention over pages against every fp16 path"


def _by_backend(times: dict[str, float]) -> dict[str, float]:
    """{"flash/gqa": 9.0, "flash/rows": 4.0} -> {"flash": 4.0}: a path counts in the form that suits it."""
    return {name: min(times[path] for path in paths) for name, paths in split(times, lambda path: path.split("/")[0]).items()}


def _case(row: dict[str, Any]) -> str:
    heads = f"{row['kv_heads']} KV heads x {row['group']}"
    own = [f"{m}x{n}" for m, n in filter(None, (row["keys"], row["values"]))]
    stored = " + ".join(own) or (f"{row['bits']} bits" if row["bits"] else "exact pages")
    return f"batch {row['batch']}, {tokens_text(row['tokens'])} tokens\n{heads}, {stored}"


def _generate(rows: list[dict[str, Any]]) -> tuple[Figure, str]:
    """A panel a shape: lines are measured, dashes the floor of the caches in the same colour."""
    shapes = split(rows, lambda row: str(row["shape"]))
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    colours = {name: LIGHT[f"series-{i % NUM_SERIES + 1}"] for i, name in enumerate(caches)}
    figure = Figure(figsize=(max(5.2, 4.2 * len(shapes)), 4.2), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, (shape, members) in zip(panels, shapes.items(), strict=True):
        floors: dict[tuple[tuple[int, float], ...], str] = {}
        for name, own in split(members, lambda row: str(row["cache"])).items():
            own.sort(key=lambda row: row["tokens"])
            timed = [(row["tokens"], row["ms_per_token"]) for row in own if "ms_per_token" in row]
            if timed:
                axes.plot(*zip(*timed, strict=True), marker="o", markeredgewidth=0, color=colours[name])
            floors.setdefault(tuple((row["tokens"], row["floor_ms"]) for row in own), name)
        for points, name in floors.items():  # caches of equal size have one floor, drawn once
            marks = {"marker": "_", "markersize": 11, "markeredgewidth": 1.4}
            axes.plot(*zip(*points, strict=True), color=colours[name], linewidth=1.2, linestyle=_FLOOR, **marks)
        axes.set_yscale("log", base=2)
        token_axis(axes, sorted({row["tokens"] for row in members}))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", visible=False)
        axes.margins(x=0.15, y=0.1)
        axes.set_xlabel("tokens in the cache")
        axes.set_title(shape, loc="left", size=9, color=LIGHT["muted"])
        failed = [f"{row['cache']} at {tokens_text(row['tokens'])}: {row['error']}" for row in members if "error" in row]
        axes.text(0.02, 0.98, "\n".join(failed), transform=axes.transAxes, va="top", size=7.5, color=LIGHT["muted"])
    panels[0].set_ylabel("ms per token; lower is better")
    keys = [Line2D([], [], color=colour, marker="o", markeredgewidth=0, label=name) for name, colour in colours.items()]
    keys.append(Line2D([], [], color=LIGHT["muted"], linewidth=1.2, linestyle=_FLOOR, label="floor: bytes at copy bandwidth"))
    figure.legend(handles=keys, loc="outside lower left", ncols=3)
    return figure, f"A decode step of generate, batch {rows[0].get('batch', 1)}"


def _serve(rows: list[dict[str, Any]]) -> tuple[Figure, str]:
    """Bars: generated tokens a second; a mark where all requests generate at once."""
    figure = _rates(
        rows, _serve_case, lambda row: f"{row['variant']} bits" if row["variant"].isdigit() else f"{row['variant']} blocks"
    )
    return figure, f"Many requests at once, {rows[0]['model']}"


def _pipeline(rows: list[dict[str, Any]]) -> tuple[Figure, str]:
    """The same of every way that prompts get into blocks."""
    figure = _rates(rows, _pipeline_case, _pipeline_variant)
    return figure, f"Compression within steps and beside them, {rows[0]['model']}"


def _pipeline_case(row: dict[str, Any]) -> str:
    return f"{tokens_text(row['context'])} + {tokens_text(row['output_tokens'])} tokens\n{row['batch']} requests"


def _pipeline_variant(row: dict[str, Any]) -> str:
    parts = row["sm_counts"]
    return f"{row['variant']}, {parts['compress']} of {parts['device']} SMs" if parts else str(row["variant"])


def _rates(
    rows: list[dict[str, Any]], case_of: Callable[[dict[str, Any]], str], variant_of: Callable[[dict[str, Any]], str]
) -> Figure:
    cases = split(rows, case_of)
    variants = list(dict.fromkeys(map(variant_of, rows)))
    colours = {name: LIGHT[f"series-{i % NUM_SERIES + 1}"] for i, name in enumerate(variants)}
    figure = Figure(figsize=(7.6, 1.1 + 1.4 * _BAR_INCHES * (len(rows) + len(cases))), layout="constrained")
    axes = figure.add_subplot()
    y, middles = 0.0, []
    for members in cases.values():
        middles.append(y + (len(members) - 1) / 2)
        for row in members:
            rate = row["throughput_tok_s"]
            axes.barh(y, rate, height=0.86, color=colours[variant_of(row)])
            axes.text(rate, y, f" {rate:,.0f}", va="center", size=7)
            if row.get("decode_tok_s"):
                axes.plot([row["decode_tok_s"]] * 2, [y - 0.43, y + 0.43], color=LIGHT["ink"], linewidth=1.6)
            y += 1
        y += 1
    axes.set_ylim(y - 1.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.12)
    axes.set_yticks(middles, list(cases), size=7.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("generated tokens a second; longer is better")
    keys: list[Any] = [mpl.patches.Patch(color=colour, label=name) for name, colour in colours.items()]
    keys.append(Line2D([], [], color=LIGHT["ink"], linewidth=1.6, label="while all requests generate"))
    figure.legend(handles=keys, loc="outside lower left", ncols=4 if max(map(len, variants)) < 20 else 2)
    return figure


def _serve_case(row: dict[str, Any]) -> str:
    in_flight = "memory full" if row["concurrency"] is None else f"{row['concurrency']} requests"
    flow = f"{row['rate']:g} requests/s" if row.get("rate") else in_flight
    return f"{tokens_text(row['prompt_tokens'])} + {tokens_text(row['output_tokens'])} tokens\n{flow}"
