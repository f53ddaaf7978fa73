"""One model under every cache: perplexity, recall, bytes and speed by the same code, side by side."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from hf_pqcache.eval import tasks
from hf_pqcache.eval.measure.lengths import lengths_within
from hf_pqcache.eval.measure.recall import ANSWER_TOKENS, check_recall
from hf_pqcache.eval.report.naming import format_value
from hf_pqcache.eval.session.caches import CacheSpec
from hf_pqcache.eval.session.models import token_ids
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.session.setup import Setup
from hf_pqcache.eval.tasks._text import run_perplexity

DEFAULT_CACHES: tuple[str, ...] = ("dynamic", "fp8", "quanto:4", "quanto:2", "hqq:4", "hqq:3", "hqq:2", "int4-token")
DEFAULT_CACHES += ("kivi:4", "kivi:3", "kivi:2", "turboquant:4", "turboquant:3.5", "turboquant:2.5", "pq:4", "pq:3", "pq:2")
MEASURES = ("perplexity", "recall", "memory", "speed")


@dataclass(frozen=True)
class Line:
    """One cache's line of the table; None where something was not measured, `note` says why the whole cache was not.

    Attributes:
        perplexity, change: of the first text. texts: both of every text, by its name.
        true_bits: of each number of an old token, with its scales and offsets. bits: with the exact window and tables, at
            the length of the comparison.
        compression: how many times fewer bits than 16 a number of a long prompt takes: by its bits and by pruning.
        slowdown: time per token over the dynamic cache's; like changes, only where that came before.
    """

    cache: str
    perplexity: float | None = None
    change: float | None = None
    texts: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    recall: float | None = None
    true_bits: float | None = None
    compression: float | None = None
    bits: float | None = None
    kv_bytes: int | None = None
    codebook_bytes: int | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    slowdown: float | None = None
    note: str = ""


def check(
    setup: Setup,
    texts: Mapping[str, str],
    *,
    tokens: int | None,
    recall_count: int,
    new_tokens: int,
    filler: str | None = None,
) -> int:
    """The length to compare at: `tokens`, or else 2048 or what leaves room for what is generated.

    texts: by name.

    Raises ValueError if the model cannot hold that, a text is shorter, or the pass keys' prompts are longer.
    """
    asked = None if tokens is None else (tokens,)
    room = max(new_tokens, ANSWER_TOKENS)
    (found,) = lengths_within(setup.limit, asked, room, "a comparison", offered=(2048,))
    for spec in setup.specs:
        spec.check_room(found + room)
    for name, text in texts.items():
        ids = token_ids(setup.tokenizer, text)
        if ids.numel() < found:
            raise ValueError(
                f"the text has {ids.numel()} tokens and {found} are compared ({name}): give a longer one, or fewer --tokens"
            )
    if recall_count:
        hidden_in = token_ids(setup.tokenizer, filler or next(iter(texts.values())))
        check_recall(setup.tokenizer, hidden_in, (found,), (0.5,), setup.limit)
    return found


def compare(
    session: Session,
    specs: Sequence[CacheSpec],
    ready: Callable[[CacheSpec], Session],
    texts: Mapping[str, str],
    *,
    measures: Collection[str] = MEASURES,
    tokens: int = 2048,
    windows: int | None = 4,
    chunk: int | None = None,
    recall_count: int = 20,
    new_tokens: int = 32,
    filler: str | None = None,
    question_after: bool = False,
) -> tuple[list[Line], list[Row]]:
    """Measure every cache -> (lines of the table, rows). A cache that fails gets a line that says why.

    Perplexity is that of the running cache (mode cache), for ours too: no simulation takes part.

    Args:
        ready: the session under a cache; see `Setup.ready`.
        texts: to evaluate on, by name: windows of `tokens` tokens each.
        measures: which of MEASURES.
        tokens: window of the perplexity, length of the recall prompts and of the sequence that is weighed and timed.
        windows: of the perplexity; None measures the whole text.
        chunk: tokens of a step of the perplexity. recall_count: pass keys, spread evenly over the depths.
        filler: what they are hidden in; None is the first of `texts`.
        question_after: see `recall_at`.

    Where one of `specs` has a press, the first half of a window is every cache's prompt, and only the other half is scored.
    """
    prompt = tokens // 2 if any(spec.press for spec in specs) else None
    lines: list[Line] = []
    rows: list[Row] = []
    exact: list[Row] = []
    with tqdm(specs, desc="caches", unit="cache", disable=not session.progress, leave=False) as bar:
        for spec in bar:
            bar.set_postfix_str(spec.label)
            try:
                one = ready(spec)
                one.cache.make(one.model, tokens)
                with one.cache.pressing(one.model):
                    found = _measure(
                        one, texts, measures, tokens, windows, chunk, recall_count, new_tokens, filler, prompt, question_after
                    )
            except Exception as error:  # of one cache; the others are measured all the same
                why = " ".join(str(error).split()) or type(error).__name__
                lines.append(Line(spec.label, note=why if isinstance(error, ImportError | ValueError) else f"failed: {why}"))
                continue
            rows += found
            exact = found if spec.name == "dynamic" else exact
            lines.append(_line(one, list(texts), found, exact))
    return lines, rows


def _line(session: Session, texts: Sequence[str], rows: Sequence[Row], exact: Sequence[Row]) -> Line:
    """The line of one cache, from its rows and the exact cache's."""
    now, before = ([row.value for row in some if row.metric == "perplexity"] for some in (rows, exact))
    changes = {
        name: (value, value / before[i] - 1 if before else None)
        for i, (name, value) in enumerate(zip(texts, now, strict=False))
    }
    perplexity, change = next(iter(changes.values()), (None, None))
    values = {row.metric: row.value for row in rows if row.task in ("memory", "speed")}
    tpot = next((row.value for row in exact if row.metric == "tpot"), None)
    grid = [row.value for row in rows if row.task == "recall"]
    return Line(
        cache=session.cache.label,
        perplexity=perplexity,
        change=change,
        texts=changes,
        recall=sum(grid) / len(grid) if grid else None,
        true_bits=session.code_bits,
        compression=16 / min(16.0, session.code_bits) / session.cache.kept if session.code_bits else None,
        bits=next((row.true_bits for row in rows if row.metric == "kv_bytes"), None),
        kv_bytes=int(values["kv_bytes"]) if "kv_bytes" in values else None,
        codebook_bytes=int(values["codebook_bytes"]) if "kv_bytes" in values else None,
        ttft_ms=values.get("ttft"),
        tpot_ms=values.get("tpot"),
        slowdown=values["tpot"] / tpot if tpot and "tpot" in values else None,
    )


def _measure(
    session: Session,
    texts: Mapping[str, str],
    measures: Collection[str],
    tokens: int,
    windows: int | None,
    chunk: int | None,
    recall_count: int,
    new_tokens: int,
    filler: str | None,
    prompt: int | None,
    question_after: bool,
) -> list[Row]:
    options: dict[str, Any] = {"window": tokens, "limit": windows, "chunk": chunk, "mode": "cache", "prompt": prompt}
    rows = []
    if "perplexity" in measures:
        rows += [run_perplexity(session, name, "1", text, **options) for name, text in texts.items()]
    if "recall" in measures and recall_count:
        depths = [(i + 0.5) / recall_count for i in range(recall_count)]
        rows += tasks.get("recall").run(
            session,
            filler or next(iter(texts.values())),
            lengths=(tokens,),
            depths=depths,
            count=1,
            question_after=question_after,
        )
    if "memory" in measures:
        rows += tasks.get("memory").run(session, lengths=(tokens,))
    if "speed" in measures:
        rows += tasks.get("speed").run(session, lengths=(tokens,), new_tokens=new_tokens)
    return rows


def picture(rows: Sequence[Row]) -> bytes:
    """A PNG: what each method loses against the exact cache over its true bits, one drawing for each text.

    Raises ValueError where the rows hold no exact cache's perplexity, or no other.
    """
    from hf_pqcache.eval.report import charts, plots

    found = charts.loss_charts(rows)
    if not found:
        raise ValueError("there is nothing to draw: perplexities of the dynamic cache and of another one are needed")
    return plots.side_by_side(found)


#: heading -> (field of a line, format) of the table's figures, in its order.
COLUMNS = {
    "perplexity": ("perplexity", ".3f"),
    "change": ("change", "+.2%"),
    "recall": ("recall", ".0%"),
    "true bits": ("true_bits", ".2f"),
    "smaller": ("compression", ".1f"),
    "with window": ("bits", ".2f"),
    "KV bytes": ("kv_bytes", ",d"),
    "codebooks": ("codebook_bytes", ",d"),
    "TTFT ms": ("ttft_ms", ".0f"),
    "ms/token": ("tpot_ms", ".1f"),
    "slower": ("slowdown", ".2f"),
}


def _further(lines: Sequence[Line]) -> list[str]:
    """The texts after the first one."""
    return next((list(line.texts)[1:] for line in lines if len(line.texts) > 1), [])


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
        if heading == "change":
            for text in _further(lines):
                texts |= {f"{text} {what}": column for what, column in zip(("", "change"), _pairs(lines, text), strict=True)}
    return texts


def _pairs(lines: Sequence[Line], text: str, empty: str = "") -> tuple[list[str], list[str]]:
    """Perplexities of a text, and their changes, as people read them."""
    pairs = [line.texts.get(text, (None, None)) for line in lines]
    return [empty if x is None else f"{x:.3f}" for x, _ in pairs], [empty if x is None else f"{x:+.2%}" for _, x in pairs]


def cells(line: Line, empty: str = "") -> list[str]:
    """The line's figures as people read them, in the order of COLUMNS."""
    values = [(getattr(line, name), form) for name, form in COLUMNS.values()]
    return [empty if value is None else format(value, form) for value, form in values]


def markdown(lines: Sequence[Line]) -> str:
    """The table for a README."""
    at = 2  # further texts stand behind the first one's perplexity and change
    more = [heading for text in _further(lines) for heading in (text, "change")]
    headings = [*list(COLUMNS)[:at], *more, *list(COLUMNS)[at:]]
    rows = [f"| cache | {' | '.join(headings)} |", "|---" + "|--:" * len(headings) + "|"]
    for line in lines:
        own = cells(line, "–")
        others = [column[0] for text in _further(lines) for column in _pairs([line], text, "–")]
        rows.append(" | ".join([f"| {line.cache}", *own[:at], *others, *own[at:]]) + " |")
    return "\n".join(rows) + "\n"
