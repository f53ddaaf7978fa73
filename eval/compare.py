"""One model under every cache: perplexity, recall, bytes and speed by the same code, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from hf_pqcache.eval import tasks
from hf_pqcache.eval.measure.deployed import CHUNK
from hf_pqcache.eval.measure.lengths import lengths_within
from hf_pqcache.eval.measure.recall import ANSWER_TOKENS, check_recall
from hf_pqcache.eval.report.naming import format_value
from hf_pqcache.eval.session.caches import CacheSpec, head_dim
from hf_pqcache.eval.session.models import token_ids
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.session.setup import Setup
from hf_pqcache.eval.tasks._text import run_perplexity

DEFAULT_CACHES = ("dynamic", "fp8", "quanto:4", "quanto:2", "hqq:4", "hqq:3", "hqq:2", "pq:4", "pq:3", "pq:2")


@dataclass(frozen=True)
class Line:
    """One cache's line of the table; None where the cache could not be measured, `note` says why.

    `change` (of the perplexity) and `slowdown` (time per token over) are against the dynamic cache, if it came before.
    """

    cache: str
    perplexity: float | None = None
    change: float | None = None
    recall: float | None = None
    bits: float | None = None
    kv_bytes: int | None = None
    codebook_bytes: int | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    slowdown: float | None = None
    note: str = ""


def check(setup: Setup, text: str, *, tokens: int | None, recall_count: int, new_tokens: int) -> int:
    """The length to compare at: `tokens`, or else 2048 or what leaves room for what is generated.

    Raises ValueError if the model cannot hold that, the text is shorter, or the pass keys' prompts are longer.
    """
    asked = None if tokens is None else (tokens,)
    room = max(new_tokens, ANSWER_TOKENS)
    (found,) = lengths_within(setup.limit, asked, room, "a comparison", offered=(2048,))
    for spec in setup.specs:
        spec.check_room(found + room)
    ids = token_ids(setup.tokenizer, text)
    if ids.numel() < found:
        raise ValueError(f"the text has {ids.numel()} tokens and {found} are compared: give a longer one, or fewer --tokens")
    if recall_count:
        check_recall(setup.tokenizer, ids, (found,), (0.5,), setup.limit)
    return found


def compare(
    session: Session,
    specs: Sequence[CacheSpec],
    ready: Callable[[CacheSpec], Session],
    text: str,
    text_name: str,
    *,
    tokens: int = 2048,
    windows: int | None = 4,
    chunk: int = CHUNK,
    recall_count: int = 20,
    new_tokens: int = 32,
) -> tuple[list[Line], list[Row]]:
    """Measure every cache -> (lines of the table, rows). A cache that fails gets a line that says why.

    Perplexity is that of the running cache (mode cache), for ours too: no simulation takes part.

    Args:
        ready: the session under a cache, its codebook made or found; see `Setup.ready`.
        text: to evaluate on: windows of `tokens` tokens, and filler for the pass keys.
        tokens: window of the perplexity, length of the recall prompts and of the sequence that is weighed and timed.
        windows: of the perplexity; None measures the whole text.
        chunk: tokens of a step of the perplexity. recall_count: pass keys, spread evenly over the depths.
    """
    lines: list[Line] = []
    rows: list[Row] = []
    exact: dict[str, float] = {}
    with tqdm(specs, desc="caches", unit="cache", disable=not session.progress, leave=False) as bar:
        for spec in bar:
            bar.set_postfix_str(spec.label)
            try:
                one = ready(spec)
                one.cache.make(one.model, tokens)
                found = _measure(one, text, text_name, tokens, windows, chunk, recall_count, new_tokens)
            except Exception as error:  # of one cache; the others are measured all the same
                why = " ".join(str(error).split()) or type(error).__name__
                lines.append(Line(spec.label, note=why if isinstance(error, ImportError | ValueError) else f"failed: {why}"))
                continue
            rows += found
            value = {row.metric: row.value for row in found if row.task != "recall"}
            grid = [row.value for row in found if row.task == "recall"]
            exact = value if spec.name == "dynamic" else exact
            lines.append(
                Line(
                    cache=_name(one.cache, one.model),
                    perplexity=value["perplexity"],
                    change=value["perplexity"] / exact["perplexity"] - 1 if exact else None,
                    recall=sum(grid) / len(grid) if grid else None,
                    bits=next(row.true_bits for row in found if row.metric == "kv_bytes"),
                    kv_bytes=int(value["kv_bytes"]),
                    codebook_bytes=int(value["codebook_bytes"]),
                    ttft_ms=value["ttft"],
                    tpot_ms=value["tpot"],
                    slowdown=value["tpot"] / exact["tpot"] if exact else None,
                )
            )
    return lines, rows


def _name(spec: CacheSpec, model: Any) -> str:
    """The cache's label; of ours also the bits of a code for each value, by which it is compared."""
    if spec.name != "pq":
        return spec.label
    return f"pq {spec.config.bits_per_value(head_dim(model)):g} bits ({spec.label.removeprefix('pq ')})"


def _measure(
    session: Session,
    text: str,
    text_name: str,
    tokens: int,
    windows: int | None,
    chunk: int,
    recall_count: int,
    new_tokens: int,
) -> list[Row]:
    options: dict[str, Any] = {"window": tokens, "limit": windows, "chunk": chunk, "mode": "cache"}
    rows = [run_perplexity(session, text_name, "1", text, **options)]
    if recall_count:
        depths = [(i + 0.5) / recall_count for i in range(recall_count)]
        rows += tasks.get("recall").run(session, text, lengths=(tokens,), depths=depths, count=1)
    rows += tasks.get("memory").run(session, lengths=(tokens,))
    return rows + tasks.get("speed").run(session, lengths=(tokens,), new_tokens=new_tokens)


#: heading -> (field of a line, format) of the table's figures, in its order.
COLUMNS = {
    "perplexity": ("perplexity", ".3f"),
    "change": ("change", "+.2%"),
    "recall": ("recall", ".0%"),
    "bits": ("bits", ".2f"),
    "KV bytes": ("kv_bytes", ",d"),
    "codebooks": ("codebook_bytes", ",d"),
    "TTFT ms": ("ttft_ms", ".0f"),
    "ms/token": ("tpot_ms", ".1f"),
    "slower": ("slowdown", ".2f"),
}


def table(lines: Sequence[Line]) -> dict[str, list[str]]:
    """The columns of the table for a terminal, bytes in binary units."""
    texts: dict[str, list[str]] = {"cache": [line.cache for line in lines]}
    for heading, (name, form) in COLUMNS.items():
        values = [getattr(line, name) for line in lines]
        if form == ",d":
            texts[heading.removesuffix(" bytes")] = [
                "" if x is None else format_value(x, "bytes") if x else "0" for x in values
            ]
        else:
            texts[heading] = ["" if x is None else format(x, form) for x in values]
    return texts


def cells(line: Line, empty: str = "") -> list[str]:
    """The line's figures as people read them, in the order of COLUMNS."""
    values = [(getattr(line, name), form) for name, form in COLUMNS.values()]
    return [empty if value is None else format(value, form) for value, form in values]


def markdown(lines: Sequence[Line]) -> str:
    """The table for a README."""
    rows = [f"| cache | {' | '.join(COLUMNS)} |", "|---" + "|--:" * len(COLUMNS) + "|"]
    rows += [" | ".join([f"| {line.cache}", *cells(line, "–")]) + " |" for line in lines]
    return "\n".join(rows) + "\n"
