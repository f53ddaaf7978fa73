"""Result rows -> PNG plots and one self-contained HTML page; knows no model and measures nothing."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hf_pqcache.eval.report import charts, naming, plots, summary
from hf_pqcache.eval.session.results import Results, Row

PAGE = "report.html"
_TEMPLATE = "report.html.j2"


def read_rows(paths: Iterable[str | Path]) -> list[Row]:
    """The rows of several files; of a measurement that stands in two of them, the later file's.

    Raises FileNotFoundError and, for a file that holds something else, ValueError.
    """
    rows: dict[str, Row] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"there is no results file {str(path)!r}")
        rows |= {row.key: row for row in Results(path).rows}
    return list(rows.values())


def items(rows: Sequence[Row]) -> list[plots.Item]:
    """Everything that can be drawn of these rows."""
    rows = naming.told_apart(rows)
    return [
        *charts.loss_charts(rows),
        *charts.perplexity_charts(rows),
        *charts.length_charts(rows),
        *charts.recall_maps(rows),
        *charts.breakdown_bars(rows),
    ]


def write_plots(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Draw all charts and heat maps as PNG files into `folder`, which is made if need be -> the files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for item in items(rows):
        files.append(folder / f"{item.name}.png")
        plots.save_png(item, files[-1])
    return files


def write_report(paths: Iterable[str | Path], folder: str | Path, title: str = "KV cache evaluation") -> list[Path]:
    """Turn result files into `report.html` and PNG plots in `folder` -> all files written, the page first.

    Raises ValueError when the files hold no row.
    """
    rows = read_rows(paths)
    if not rows:
        raise ValueError("the results files hold no row yet: run `pqcache run` or `pqcache eval` first")
    files = write_plots(rows, folder)
    page = Path(folder) / PAGE
    page.write_text(render(rows, title), encoding="utf-8")
    return [page, *files]


def render(rows: Sequence[Row], title: str) -> str:
    """The page: tables, drawings, conditions. It asks for nothing from outside."""
    rows = naming.told_apart(rows)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["drawing"] = lambda item: Markup(plots.svg(item))
    environment.filters["legend"] = plots.legend
    environment.filters["heading"] = _Headings()
    models = naming.models(rows)
    return environment.get_template(_TEMPLATE).render(
        title=title,
        theme=plots.THEME,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        models=models,
        num_rows=len(rows),
        summaries=[summary.summary_table(rows, model) for model in models],
        scores=[table for model in models if (table := summary.score_table(rows, model))],
        sections=_sections(rows),
        conditions=conditions(rows),
        everything=_everything(rows),
    )


class _Headings:
    """Texts for headings: fingerprints in them ("#3f2a1c") become letters, the same one everywhere on a page."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        def letter(match: re.Match[str]) -> str:
            count = len(self._letters)
            found: str = self._letters.setdefault(match[1], string.ascii_uppercase[count % 26] * (1 + count // 26))
            return f"({found})"

        return re.sub(r"#([0-9a-f]{6,})", letter, text)


def conditions(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What the figures were measured with: (name, all its values), from the rows' provenance."""
    found: dict[str, dict[str, None]] = {}

    def note(name: str, value: Any) -> None:
        if value not in (None, "", [], {}):
            found.setdefault(name, {})[str(value)] = None

    for row in rows:
        for name, value in row.provenance.items():
            if isinstance(value, dict):
                for key, inner in value.items():
                    note(key, inner)
            elif name not in ("time", "seconds", "stderr"):
                note(name, value)
        note("seed", row.seed)
        note("task version", f"{row.task}: {row.task_version}")
        note("codebook", row.codebook and row.codebook[:16])
    times = sorted(str(row.provenance["time"]) for row in rows if "time" in row.provenance)
    if times:
        note("measured", times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}")
    return [(name, ", ".join(values)) for name, values in found.items()]


def _sections(rows: Sequence[Row]) -> list[tuple[str, str, list[plots.Item]]]:
    """(heading, how to read it, drawings) of every kind of drawing that the rows allow."""
    loss, bits = charts.loss_charts(rows), charts.perplexity_charts(rows)
    time = charts.length_charts(rows, ["tpot", "ttft", "throughput"])
    memory = charts.length_charts(rows, ["peak_bytes", "reserved_bytes", "kv_bytes"])
    recall = charts.recall_maps(rows)
    sections: list[tuple[str, str, list[plots.Item]]] = [
        ("Loss against true bits", "Lower and further left is better. Bits count codes, scales and offsets.", [*loss]),
        ("Quality against memory", "Lower and further left is better. Bits count codes, exact window and tables.", [*bits]),
        ("Time against length", "Lower is better for times, higher for throughput.", [*time]),
        ("Memory against length", "Lower is better.", [*memory]),
        ("Where a decode step's time goes", "Stages of one step, laid end to end.", [*charts.breakdown_bars(rows)]),
        ("Recall", "How many pass keys hidden in a long text are found again, by where they stand.", [*recall]),
    ]
    return [section for section in sections if section[2]]


def _everything(rows: Sequence[Row]) -> summary.Table:
    names = naming.labels(rows)
    columns = ["model", "cache", "task", "metric", "value", "unit", "true bits", "settings"]
    table = summary.Table(title="All rows", columns=columns, units=[""] * len(columns))
    table.rows = [
        [
            row.model,
            names[row.key],
            row.task,
            row.metric,
            row.value,
            row.unit,
            row.true_bits,
            naming.settings_text({key: value for key, value in row.settings.items() if key not in naming.UNREAD}),
        ]
        for row in rows
    ]
    return table
