"""The report shows every figure of its rows, asks for nothing from outside, and works in a browser, light and dark."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hf_pqcache.cli import main
from hf_pqcache.eval.report import charts, naming, plots, summary
from hf_pqcache.eval.report.html import conditions, read_rows, render, write_report
from hf_pqcache.eval.session.results import Results, Row

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PQ = [{"num_subspaces": m, "num_bits": n, "page_size": 64} for m, n in ((32, 8), (32, 6), (16, 8))]
CACHES: list[tuple[str, dict[str, Any], float]] = [
    ("dynamic", {}, 16.0),
    ("quanto", {"nbits": 4, "q_group_size": 64}, 4.5),
    *(("pq", config, bits) for config, bits in zip(PQ, (4.3, 3.3, 2.3), strict=True)),
]
PROVENANCE = {"versions": {"torch": "2.13.0"}, "device": "cpu", "time": "2026-01-02T03:04:05+00:00", "commit": "0123abc"}


def rows(model: str = "small") -> list[Row]:
    """One of everything that is drawn, for five caches; figures follow from the bits."""
    found = []
    for cache, config, bits in CACHES:
        common: dict[str, Any] = {
            "model": model,
            "cache": cache,
            "cache_config": config,
            "true_bits": bits,
            "provenance": {**PROVENANCE, "code_bits": bits},
        }
        loss = 0.0 if cache == "dynamic" else 0.5 / bits
        mode = "exact" if cache == "dynamic" else "stream"
        found.append(Row("wikitext-2-raw-v1", "perplexity", 20 + loss, settings={"window": 1024, "mode": mode}, **common))
        for tokens in (1024, 2048, 4096):
            settings = {"tokens": tokens, "batch": 1}
            found.append(Row("speed", "tpot", tokens / 100 * bits, "ms", settings=settings, **common))
            found.append(Row("memory", "kv_bytes", tokens * bits * 256, "bytes", settings=settings, **common))
            for depth in (0.0, 0.5, 1.0):
                recall = {"tokens": tokens, "depth": depth}
                found.append(Row("recall", "recall", min(1.0, bits / 4), settings=recall, **common))
        found.append(Row("longbench/qasper", "f1", 30 + bits, **common))
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    results = Results(folder / "rows.jsonl")
    for row in rows():
        results.add(row)
    files = write_report([folder / "rows.jsonl"], folder / "out")
    assert all(file.is_file() for file in files)
    return files[0]


def test_names_tell_caches_apart_and_no_more() -> None:
    names = set(naming.labels(rows()).values())
    assert names == {"dynamic", "quanto n=4", "pq M=32 n=8", "pq M=32 n=6", "pq M=16 n=8"}
    pages = [Row("t", "m", 1.0, cache="pq", cache_config={**PQ[0], "page_size": size}) for size in (16, 64)]
    assert set(naming.labels(pages).values()) == {"pq M=32 n=8 page=16", "pq M=32 n=8 page=64"}
    books = [Row("t", "m", 1.0, cache="pq", cache_config=PQ[0], codebook=book * 32) for book in ("ab", "cd")]
    assert set(naming.labels(books).values()) == {"pq M=32 n=8 #ababab", "pq M=32 n=8 #cdcdcd"}
    models = [Row("t", "m", 1.0, model=book, cache="pq", cache_config=PQ[0], codebook=book * 32) for book in ("ab", "cd")]
    assert set(naming.labels(models).values()) == {"pq M=32 n=8"}  # of course each model has its own
    test_split = Row("t", "m", 1.0, cache="pq", cache_config=PQ[0], settings={"calibrated_on": "ptb/test", "normalised": False})
    assert set(naming.labels([test_split]).values()) == {"pq M=32 n=8, not normalised, calibrated on ptb/test"}
    shipped = [Row("t", "m", 1.0, cache="pq", cache_config={"bits": 4}, codebook=book) for book in (None, "ab" * 32)]
    assert list(naming.labels(shipped).values()) == ["pq 4 bits", "pq 4 bits, own codebook"]
    sides = {"bits": 4, "num_subspaces": 64, "num_bits": 8, "value_subspaces": 32, "value_bits": 6}
    apart = Row("t", "m", 1.0, cache="pq", cache_config=sides)
    assert list(naming.labels([apart]).values()) == ["pq M=64/32 n=8/6"]
    paged = Row("t", "m", 1.0, cache="paged-kv", cache_config={"page_size": 64, "num_bits": 8})
    assert naming.labels([paged]) == {paged.key: "paged-kv"}


def test_summary_has_each_figure_once() -> None:
    table = summary.summary_table(rows(), "small")
    lines = [dict(zip(table.columns, line, strict=True)) for line in table.rows]
    assert [line["cache"] for line in lines] == ["dynamic", "quanto n=4", "pq M=32 n=8", "pq M=32 n=6", "pq M=16 n=8"]
    exact, two_bits = lines[0], lines[-1]
    assert exact["true bits"] == 16.0
    assert (exact["bits at 4K"], exact["perplexity, wikitext-2-raw-v1"], exact["change"]) == (16.0, 20.0, None)
    assert two_bits["perplexity, wikitext-2-raw-v1"] == 20 + 0.5 / 2.3
    assert two_bits["change"] == pytest.approx(100 * 0.5 / 2.3 / 20)
    assert two_bits["recall at 4K"] == pytest.approx(2.3 / 4)
    assert two_bits["time per output token at 4K"] == pytest.approx(40.96 * 2.3)
    assert two_bits["KV cache at 4K"] == pytest.approx(4096 * 2.3 * 256)
    assert two_bits["longbench, mean score"] == pytest.approx(32.3)


def test_different_conditions_are_never_mixed() -> None:
    mixed = [*rows(), Row("wikitext-2-raw-v1", "perplexity", 25.0, model="small", settings={"window": 256, "mode": "exact"})]
    table = summary.summary_table(mixed, "small")
    exact = dict(zip(table.columns, table.rows[0], strict=True))
    assert exact["perplexity, wikitext-2-raw-v1 (window 1024)"] == 20.0
    assert exact["perplexity, wikitext-2-raw-v1 (window 256)"] == 25.0
    chart = charts.perplexity_charts(mixed)
    assert [(c.condition, c.baseline) for c in chart] == [("window 1024", 20.0)]  # nothing to compare in the other one
    distort = Row(
        "wikitext-2-raw-v1",
        "perplexity",
        23.0,
        model="small",
        cache="pq",
        cache_config=PQ[0],
        true_bits=4.0,
        settings={"window": 1024, "mode": "distort"},
    )
    assert set(charts.perplexity_charts([*rows(), distort])[0].series) == {"quanto", "pq", "pq, distort"}


def test_series_run_along_the_axis_and_keep_their_rows() -> None:
    chart = next(c for c in charts.length_charts(rows()[::-1]) if c.name.startswith("tpot"))
    points = chart.series["pq M=16 n=8"]
    assert [point.x for point in points] == [1024, 2048, 4096]
    assert all(point.y == point.row.value for point in points)
    heat = next(m for m in charts.recall_maps(rows()) if m.title.startswith("pq M=16"))
    assert (heat.depths, heat.columns) == ([0.0, 0.5, 1.0], ["1K", "2K", "4K"])
    assert heat.values == [[2.3 / 4] * 3] * 3


def test_recall_at_one_length_is_one_map_over_all_caches() -> None:
    (heat,) = charts.recall_maps([row for row in rows() if row.settings.get("tokens") == 1024])
    assert heat.columns == ["dynamic", "quanto n=4", "pq M=32 n=8", "pq M=32 n=6", "pq M=16 n=8"]
    assert heat.values == [[1.0, 1.0, 1.0, 3.3 / 4, 2.3 / 4]] * 3
    assert charts.length_charts([row for row in rows() if row.settings.get("tokens") == 1024]) == []


def test_a_running_cache_stands_where_it_was_weighed() -> None:
    """Its perplexity row knows no bits, or computed ones: those of the memory task, at the length of the window, count."""
    cache: dict[str, Any] = {"model": "small", "cache": "hqq", "cache_config": {"nbits": 4}}
    settings = {"window": 1024, "mode": "cache", "chunk": 16}
    perplexity = [
        Row("wikitext-2-raw-v1", "perplexity", 20.1 + n, settings=settings | {"chunk": n}, true_bits=bits, **cache)
        for n, bits in ((1, None), (2, 4.1))
    ]
    weighed = [
        Row("memory", "kv_bytes", 1.0, "bytes", settings={"tokens": tokens}, true_bits=bits, **cache)
        for tokens, bits in ((1024, 4.6), (4096, 4.5))
    ]
    (chart,) = charts.perplexity_charts([*rows(), *perplexity, *weighed])
    assert [(point.x, point.y) for point in chart.series["hqq"]] == [(4.6, 21.1), (4.6, 22.1)]


def test_summary_tells_the_length_that_most_caches_share() -> None:
    longer = Row("speed", "tpot", 1.0, "ms", model="small", settings={"tokens": 8192, "batch": 1})
    assert "time per output token at 4K" in summary.summary_table([*rows(), longer], "small").columns


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "", "–"),
        (math.nan, "ms", "–"),
        (12.3456, "ms", "12.35 ms"),
        (2.0, "", "2.000"),
        (0.35, "percent", "+0.35 %"),
        (0.825, "share", "82.5 %"),
        (1536, "bytes", "1.50 KiB"),
        (3 * 2**30, "bytes", "3.00 GiB"),
        (0, "bytes", "0 B"),
        (123456.7, "", "123,457"),
        ("f1", "", "f1"),
    ],
)
def test_numbers_read_well(value: Any, unit: str, text: str) -> None:
    assert naming.format_value(value, unit) == text


def test_a_later_file_wins(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        Results(tmp_path / name).add(Row("t", "f1", value))
    assert [row.value for row in read_rows([tmp_path / "a", tmp_path / "b"])] == [2.0]
    with pytest.raises(FileNotFoundError, match="no results file"):
        read_rows([tmp_path / "c"])


def test_drawings_take_all_colours_from_the_page() -> None:
    for item in (*charts.perplexity_charts(rows()), *charts.length_charts(rows()), *charts.recall_maps(rows())):
        text = plots.svg(item)
        used = set(re.findall(r"var\(--([a-z0-9-]+)\)", text))
        assert used <= set(plots.THEME)
        assert not re.findall(r"#[0-9a-f]{6}\b", text.replace("#000000", "")), "a colour that the theme does not decide"
        assert text.count("<title>") == text.count('id="' + item.name + "-tip-")


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.targets.append(value or "")
            if name == "id":
                self.ids.append(value or "")


def test_page_asks_for_nothing_from_outside(page: Path) -> None:
    links = _Links()
    text = page.read_text()
    links.feed(text)
    assert all(target.startswith("#") or target == "data:," for target in links.targets)
    assert "@import" not in text
    assert len(links.ids) == len(set(links.ids))
    assert {target[1:] for target in links.targets if target.startswith("#")} <= set(links.ids)


def test_what_rows_say_is_never_markup() -> None:
    evil = "<script>alert(1)</script>\"'&"
    row = Row(evil, "perplexity", 1.0, model=evil, cache="pq", settings={"tokens": 4, "note": evil}, true_bits=4.0)
    speed = Row("speed", "tpot", 1.0, evil, model=evil, cache=evil, settings={"tokens": 4})
    assert "<script>alert" not in render([row, speed], evil)


def test_page_lists_its_conditions() -> None:
    told = dict(conditions(rows()))
    assert told["torch"] == "2.13.0"
    assert told["measured"] == "2026-01-02T03:04:05+00:00"
    assert "wikitext-2-raw-v1: 1" in told["task version"]


def test_a_row_of_any_kind_alone_makes_a_page() -> None:
    kinds = {(row.metric, row.cache == "dynamic"): row for row in rows()}
    for row in [*kinds.values(), Row("wikitext-2-raw-v1", "perplexity", math.nan, cache="pq", true_bits=4.0)]:
        assert "</html>" in render([row], "one row")


def test_command(tmp_path: Path) -> None:
    runner = CliRunner()
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    failed = runner.invoke(main, ["report", str(empty), "-o", str(tmp_path / "out")])
    assert failed.exit_code == 1
    assert "hold no row yet" in failed.output
    Results(tmp_path / "rows.jsonl").add(rows()[0])
    done = runner.invoke(
        main, ["report", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "out"), "--json", str(tmp_path / "files.json")]
    )
    assert done.exit_code == 0, done.output
    assert Path(json.loads((tmp_path / "files.json").read_text())["page"]).is_file()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {BROWSERS} is on the PATH")
    with playwright.sync_playwright() as api:
        running = api.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_works_in_a_browser(page: Path, browser: Any, scheme: str) -> None:
    tab = browser.new_page(color_scheme=scheme, viewport={"width": 1240, "height": 900})
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: request.url.startswith("file:") or problems.append(f"asked for {request.url}"))
    tab.goto(page.as_uri())

    drawings = tab.locator("figure svg")
    assert drawings.count() == len(list(page.parent.glob("*.png"))) == 1 + 2 + 5
    for i in range(drawings.count()):
        box = drawings.nth(i).bounding_box()
        assert box["width"] > 300
        assert box["height"] > 100
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # What is drawn stands out from what it is drawn on, in both themes.
    colours = tab.evaluate(
        "['--ink', '--paper', '--series-1'].map(v => getComputedStyle(document.documentElement).getPropertyValue(v).trim())"
    )
    ink, paper, series = (_luminance(colour) for colour in colours)
    assert (ink < paper) == (scheme == "light")
    assert _contrast(ink, paper) > 7
    assert _contrast(series, paper) > 3

    heading = tab.locator("#summary-1 thead button", has_text="bits at")
    column = "[...document.querySelectorAll('#summary-1 tbody tr')].map(r => Number(r.cells[1].dataset.value))"
    heading.click()
    assert tab.evaluate(column) == sorted(bits for _, _, bits in CACHES)
    heading.click()
    assert tab.evaluate(column) == sorted((bits for _, _, bits in CACHES), reverse=True)
    assert problems == []
    tab.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_cut_on_a_desk_and_in_a_hand(page: Path, browser: Any, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.goto(page.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    inside = """[...document.querySelectorAll('.legend li, figcaption, figure svg text')].every(e => {
        const a = e.getBoundingClientRect(), b = e.closest('figure').getBoundingClientRect();
        return a.left >= b.left - 1 && a.right <= b.right + 1; })"""
    assert tab.evaluate(inside)
    sizes = "[...document.querySelectorAll('figure svg text')].map(e => e.getBoundingClientRect().height)"
    assert min(tab.evaluate(sizes)) >= 9
    tab.close()


def test_a_cache_has_one_colour_in_all_charts() -> None:
    seen: dict[str, set[str]] = {}
    for item in [*charts.perplexity_charts(rows()), *charts.length_charts(rows())]:
        for name, colour in plots.legend(item):
            seen.setdefault(name, set()).add(colour)
    assert set(seen) == {"dynamic", "quanto n=4", "pq M=32 n=8", "pq M=32 n=6", "pq M=16 n=8"}
    assert all(len(colours) == 1 for colours in seen.values())
    assert len(set.union(*seen.values())) == len(seen)


def test_exact_caches_have_colours_of_their_own() -> None:
    caches = [("dynamic", {}), ("paged-kv", {"page_size": 16}), ("paged-kv", {"page_size": 64}), ("static", {}), ("pq", PQ[0])]
    found = [
        Row("speed", "tpot", tokens / 9, "ms", model="m", cache=name, cache_config=config, settings={"tokens": tokens})
        for name, config in caches
        for tokens in (512, 1024)
    ]
    for order in (found, found[::-1]):
        (chart,) = charts.length_charts(order)
        colours = dict(plots.legend(chart))
        assert len(set(colours.values())) == len(colours) == len(chart.series) == 5, "two caches look the same"
        assert colours["dynamic"] == "exact-1"
        assert all(colour.startswith("exact") == (not name.startswith("pq")) for name, colour in colours.items())


def test_a_breakdown_is_drawn(tmp_path: Path) -> None:
    stages = {"attention": 1.0, "mlp": 2.0, "other": float("nan")}
    found = [
        Row("breakdown", stage, value, "ms", model="m", cache=cache, settings={"tokens": 64})
        for cache in ("dynamic", "pq")
        for stage, value in stages.items()
    ]
    (bars,) = charts.breakdown_bars(found)
    assert bars.bars == {"dynamic": [1, 2, 0], "pq": [1, 2, 0]}
    text = plots.svg(bars)
    assert "pq, mlp: 2.000 ms" in text
    plots.save_png(bars, tmp_path / "bars.png")
    assert [name for name, _ in plots.legend(bars)] == list(stages)


def test_headings_hold_no_hash_and_no_standard_error() -> None:
    found = [
        Row("t/x", "f1", value, model="m", cache="pq", codebook=book * 32, provenance={"stderr": 0.5})
        for value, book in ((1.0, "ab"), (2.0, "cd"))
    ]
    text = render(found, "title")
    headings = re.findall(r"<(?:th|h[1-3]|figcaption|dt)\b[^>]*>(.*?)</(?:th|h[1-3]|figcaption|dt)>", text, re.DOTALL)
    told = [heading for heading in headings if "scope" not in heading]
    assert any("(A)" in heading for heading in told)
    assert not any("stderr" in heading for heading in told)
    columns = re.findall(r"<button[^>]*>(.*?)</button>", text)
    assert columns
    assert not any(re.search(r"[0-9a-f]{6}", column) for column in columns)


def test_theme_is_legible() -> None:
    for name, colours in plots.THEME.items():
        if name.startswith(("series", "exact")) or name in ("muted", "ink"):
            for colour, paper in zip(colours, plots.THEME["paper"], strict=True):
                assert _contrast(_luminance(colour), _luminance(paper)) >= 3, name


def _luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
