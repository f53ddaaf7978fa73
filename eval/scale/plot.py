"""Cards by bits and by where idle conversations are, as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from hf_pqcache.eval.report.plots import THEME


def draw(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """rows: of `plan.table`."""
    places, bits = list(dict.fromkeys(row["where"] for row in rows)), list(dict.fromkeys(row["bits"] for row in rows))
    ink, muted = THEME["ink"][0], THEME["muted"][0]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(bits)
    for number, value in enumerate(bits):
        found = [row for row in rows if row["bits"] == value]
        at = [places.index(row["where"]) + (number - (len(bits) - 1) / 2) * width for row in found]
        colour = THEME["exact-1" if value == 16 else f"series-{number}"][0]
        bars = axes.bar(at, [row["cards"] for row in found], width * 0.94, color=colour, label=f"{value} bits")
        axes.bar_label(bars, [f"{row['cards']:,}" for row in found], fontsize=7, color=ink, padding=1)
    axes.set_yscale("log")
    axes.set_ylabel("cards", color=muted)
    axes.set_xticks(range(len(places)), places, color=ink)
    axes.tick_params(colors=muted, which="both")
    axes.tick_params(axis="x", length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10, color=ink)
    axes.legend(frameon=False, ncols=len(bits), fontsize=8, loc="upper right")
    return figure
