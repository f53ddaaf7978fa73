"""Names of caches, conditions and numbers as reports write them; knows rows, no table and no drawing."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from hf_pqcache.eval.session.caches import CODES, codes_text
from hf_pqcache.eval.session.results import Row
from hf_pqcache.models.identity import short

K = TypeVar("K")
T = TypeVar("T")
#: Caches that keep every number as the model computed it: what the others are compared with.
EXACT = ("dynamic", "static", "paged-kv")
#: Metrics that are measured over the length of a sequence: (heading, unit, is smaller better).
LENGTH_METRICS = {
    "tpot": ("time per output token", "ms", True),
    "ttft": ("time to first token", "ms", True),
    "throughput": ("throughput", "tokens/s", False),
    "peak_bytes": ("peak memory", "bytes", True),
    "reserved_bytes": ("memory held by the cache", "bytes", True),
    "kv_bytes": ("KV cache", "bytes", True),
}
#: Settings that say how long the sequence is, in the order in which they are looked for.
LENGTH_KEYS = ("tokens", "prefill_tokens", "length", "context_tokens")
_SHORT = {
    "nbits": "n",
    "page_size": "page",
    "extended_residual": "recent",
    "sink_tokens": "sinks",
    "q_group_size": "group",
    "group_size": "group",
    "residual_length": "recent",
    "group": "group",
}
#: Always told of a cache, even where all caches of the file agree.
_TOLD = {"nbits"}
#: Never told: they change no figure, or only how much room is reserved; or, of pq, they are told in words of their own.
_UNTOLD = {"max_pages", "backend", "bits", *CODES}
#: Settings that belong to a cache, not to the condition that it was measured under.
_OF_CACHE = {"calibrated_on", "normalised", "codebook_of"}
#: Settings that say how a perplexity was computed, not of what.
HOW = {"mode", "chunk", "prefill"}
#: Settings that keep measurements apart and that nobody wants to read.
UNREAD = {"text_sha256", "contexts_sha256", "harness_version"}


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
        books: dict[tuple[str, str], set[str | None]] = defaultdict(set)
        for row in members:
            books[row.model, _name(row, varying)].add(row.codebook)
        for row in members:
            name = _name(row, varying)
            same = books[row.model, name]
            if row.codebook and len(same - {None}) > 1:
                name += f" #{row.codebook[:6]}"
            elif row.codebook and len(same) > 1:
                name += ", own codebook"
            if row.settings.get("normalised") is False:
                name += ", not normalised"
            if row.settings.get("codebook_of"):
                name += f", codebook of {row.settings['codebook_of']}"
            if str(row.settings.get("calibrated_on", "")).endswith("/test"):
                name += f", calibrated on {row.settings['calibrated_on']}"
            found[row.key] = name
    return found


def _name(row: Row, varying: set[str]) -> str:
    config = row.cache_config
    told = [
        f"{_SHORT.get(key, key)}={config[key]}"
        for key in sorted(config, key=lambda key: (key not in _SHORT, list(_SHORT).index(key) if key in _SHORT else 0, key))
        if key not in _UNTOLD and config[key] is not None and (key in varying or key in _TOLD)
        if not (is_exact(row) and key in _TOLD)
    ]
    return " ".join(filter(None, [row.cache, codes_text(config) if row.cache == "pq" else "", *told]))


def models(rows: Iterable[Row]) -> list[str]:
    """The models of the rows, in the order of their first row."""
    return list(dict.fromkeys(row.model for row in rows))


def told_apart(rows: Iterable[Row]) -> list[Row]:
    """The rows, models that share a name but not their weights renamed: "checkpoint-500 #3f2a1c"."""
    rows = list(rows)
    weights: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        weights[row.model].add(row.model_fingerprint)

    def renamed(row: Row) -> Row:
        mark = short(row.model_fingerprint) if row.model_fingerprint else "unknown"
        return replace(row, model=f"{row.model} #{mark}")

    return [renamed(row) if len(weights[row.model]) > 1 else row for row in rows]


def length(row: Row) -> int | None:
    """Tokens of the sequence that the row was measured at, None if it does not say."""
    for key in LENGTH_KEYS:
        if isinstance(row.settings.get(key), int):
            return int(row.settings[key])
    return None


def is_exact(row: Row) -> bool:
    return row.cache in EXACT


def is_score(row: Row) -> bool:
    """Whether the row is a task's score, not a perplexity, a recall, a time or a size."""
    return row.metric not in {"perplexity", "recall", *LENGTH_METRICS} and row.task not in ("speed", "memory", "breakdown")


def condition_text(row: Row, without: set[str]) -> str:
    return settings_text({key: value for key, value in sorted(row.settings.items()) if key not in without | _OF_CACHE})


def mode_text(row: Row, rows: Iterable[Row]) -> str:
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


def grouped(rows: Sequence[Row], metrics: set[str], without: set[str]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows of these metrics by model, task and condition: their settings but those of `without`, as a text."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.metric in metrics:
            groups[row.model, row.task, condition_text(row, without)].append(row)
    return dict(groups)


def split(rows: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The rows (or whatever else) by what `key` makes of them, in their order."""
    groups: dict[K, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def bits_by_length(rows: Sequence[Row], names: dict[str, str]) -> dict[tuple[str, int | None], dict[str, float]]:
    """(model, tokens that the bits were counted for) -> bits by cache; a weighed cache comes before a computed one."""
    found: dict[tuple[str, int | None], dict[str, float]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row.metric == "kv_bytes"):
        if row.true_bits is not None:
            found[row.model, length(row) or row.settings.get("window")][names[row.key]] = float(row.true_bits)
    return found


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
