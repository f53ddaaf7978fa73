"""Result rows as the table that a command prints; knows no command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_pqcache.cli.commands import _output, _unfinished

if TYPE_CHECKING:
    from hf_pqcache.eval.session.results import Row


def finish(rows: Sequence[Row], json_file: Path | None, title: str) -> None:
    """Print the rows as a table, and write them as JSON; of several processes the main one does."""
    from hf_pqcache.eval.report.naming import UNREAD, labels, settings_text
    from hf_pqcache.eval.session.distributed import is_main

    if not is_main():
        return
    shared, names = _common([row.settings for row in rows]), labels(rows)
    caches = {key: name.partition(",")[0] for key, name in names.items()}
    told = settings_text({k: v for k, v in shared.items() if k not in UNREAD})
    columns = {
        "task": [row.task for row in rows],
        "metric": [row.metric for row in rows],
        "value": [value_text(row) for row in rows],
        "error": [f"± {e:.2g}" if isinstance(e := row.provenance.get("stderr"), float) else "" for row in rows],
        "change": _changes(rows),
        "bits": ["" if row.true_bits is None else f"{row.true_bits:.2f}" for row in rows],
        "cache": [caches[row.key] if len(set(caches.values())) > 1 else "" for row in rows],
        "settings": [settings_text({k: v for k, v in row.settings.items() if k not in {*shared, *UNREAD}}) for row in rows],
    }
    if rows:
        _output.show_table(title, columns, left=("metric", "cache", "settings"), notes=[told] if told else [])
    _unfinished.finished()
    _output.write_json(json_file, {"rows": [row.to_dict() for row in rows]})


def _changes(rows: Sequence[Row]) -> list[str]:
    """Of each perplexity against the exact cache's under the same condition, where the rows have that."""
    from hf_pqcache.eval.report.naming import HOW, condition_text, is_exact

    exact = {(row.model, row.task, condition_text(row, HOW)): row.value for row in rows if is_exact(row)}
    texts = []
    for row in rows:
        before = exact.get((row.model, row.task, condition_text(row, HOW)))
        told = row.metric == "perplexity" and before and not is_exact(row)
        texts.append(f"{row.value / before - 1:+.2%}" if told and before else "")
    return texts


def show(row: Row) -> None:
    """One line for a row that was just measured, above the progress bars; the table comes at the end."""
    from hf_pqcache.eval.report.naming import labels
    from hf_pqcache.eval.session.distributed import is_main

    if is_main():
        at = "".join(f", {name} {row.settings[name]}" for name in ("tokens", "depth", "mode", "length") if name in row.settings)
        _output.note(f"{labels([row])[row.key].partition(',')[0]}: {row.task}{at}: {row.metric} {value_text(row)}")


def value_text(row: Row) -> str:
    """The row's figure with its unit: 12.34 ms, 3.20 MiB, 23.4567."""
    from hf_pqcache.eval.report.naming import format_value

    return format_value(row.value, row.unit) if row.unit else f"{row.value:.4f}"


def _common(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Settings in which all rows that have them agree, where several rows are shown."""
    merged = {name: value for one in settings for name, value in one.items()}
    return {name: value for name, value in merged.items() if all(one.get(name, value) == value for one in settings)}
