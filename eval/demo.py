"""The demo: an exact cache and product-quantized ones side by side, on a small model and a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from hf_pqcache.cache.caches import PagedPQCache
from hf_pqcache.cache.footprint import plan_memory
from hf_pqcache.config import OPERATING_POINTS, PQConfig
from hf_pqcache.demo import MODEL, TEXT, split_text
from hf_pqcache.eval.measure.lengths import lengths_within
from hf_pqcache.eval.measure.perplexity import perplexity
from hf_pqcache.eval.measure.recall import check_recall, recall
from hf_pqcache.eval.report.naming import format_value
from hf_pqcache.eval.session.caches import CacheSpec
from hf_pqcache.eval.session.models import load_config, load_model, load_tokenizer, token_ids
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.models.positions import max_positions

#: Of the continuation that is shown.
NEW_TOKENS = 24


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table.

    Attributes:
        true_bits: of a number that is not exact, with its scales and offsets.
        kv_bytes: of one sequence of `tokens` tokens, everything counted.
    """

    cache: str
    true_bits: float | None
    perplexity: float
    perplexity_change: float
    recall: float
    kv_bytes: int
    kv_ratio: float
    continuation: str


#: heading -> how a row's figure is told there.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "cache": lambda row: row["cache"],
    "true bits": lambda row: "" if row["true_bits"] is None else f"{row['true_bits']:.2f}",
    "perplexity": lambda row: f"{row['perplexity']:.3f}",
    "change": lambda row: f"{row['perplexity_change']:+.2%}" if row["true_bits"] != 16.0 else "",
    "recall": lambda row: f"{row['recall']:.0%}",
    "KV": lambda row: format_value(row["kv_bytes"], "bytes"),
    "of fp16": lambda row: f"{row['kv_ratio']:.0%}",
}


def markdown(result: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *([tell(row) for tell in COLUMNS.values()] for row in result["rows"])]
    return (
        "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
        .replace(" --- ", "---")
        .replace("|  |", "| |")
        .replace("%", " %")
    )


def demo_tokens(config: Any, tokens: int | None = None) -> int:
    """Length of the demo's sequences for a transformers config: `tokens`, or 1024 or what leaves room for the answer.

    Raises ValueError if the model cannot hold that.
    """
    asked = None if tokens is None else (tokens,)
    return lengths_within(max_positions(config), asked, NEW_TOKENS, "the demo", offered=(1024,))[0]


def run_demo(
    model_path: str | Path = MODEL,
    text: str | None = None,
    *,
    tokens: int | None = None,
    limit: int | None = None,
    recall_count: int = 10,
    seed: int = 0,
    progress: bool = True,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure and compare. Returns {"conditions": ..., "rows": [DemoRow as dict, ...]}.

    Args:
        model_path: a folder or Hub id of a causal language model; None and the default are the embedded tiny one.
        text: text to evaluate on; None is the part of the embedded articles that the tiny model has not seen.
        tokens: window of the perplexity, length of the recall prompts and of the sequence whose bytes are counted; None
            means 1024, or what the model can hold.
        limit: windows of the perplexity; None means all. recall_count: pass keys to ask for.
        note: called with a line for every row as soon as it is there.

    Raises ValueError, before the model is loaded, for more tokens than it can hold and for a text that is too short.
    """
    hf_config = load_config(model_path)
    text = split_text(TEXT.read_text(encoding="utf-8"))[1] if text is None else text
    tokens, tokenizer = demo_tokens(hf_config, tokens), load_tokenizer(model_path)
    ids = token_ids(tokenizer, text)[None]
    if ids.shape[1] < tokens:
        raise ValueError(f"the text has {ids.shape[1]} tokens and {tokens} are needed; pass a longer --text")
    check_recall(tokenizer, ids[0], (tokens,), (0.5,), None)
    model, _ = load_model(model_path, dtype="float32")
    prompt = ids[:, :tokens].to(model.device)
    rows: list[DemoRow] = []
    for bits in (None, *OPERATING_POINTS):
        rows.append(_measure(model, tokenizer, text, prompt, bits, rows[:1], limit, recall_count, seed, progress))
        note(f"{rows[-1].cache}: perplexity {rows[-1].perplexity:.3f}, recall {rows[-1].recall:.0%}")
    return {
        "conditions": {
            "model": str(model_path),
            "tokens": tokens,
            "evaluated_tokens": min(int(ids.shape[1]), (limit or ids.shape[1]) * tokens),
            "recall_prompts": recall_count,
            "seed": seed,
            "device": str(model.device),
            "torch": torch.__version__,
        },
        "prompt_end": tokenizer.decode(prompt[0, -24:]),
        "rows": [asdict(row) for row in rows],
    }


def _measure(
    model: Any,
    tokenizer: Any,
    text: str,
    prompt: torch.Tensor,
    bits: int | None,
    exact: Sequence[DemoRow],
    limit: int | None,
    recall_count: int,
    seed: int,
    progress: bool,
) -> DemoRow:
    """One row; bits None is the exact cache, which the others are compared with: `exact` holds its row, or nothing yet."""
    tokens, config = prompt.shape[1], PQConfig(bits=bits or 4)

    def make() -> Any:
        return DynamicCache(config=model.config) if bits is None else PagedPQCache(model.config, pq_config=config)

    value = perplexity(
        model,
        tokenizer,
        text,
        window=tokens,
        mode="exact" if bits is None else "stream",
        config=config,
        max_windows=limit,
        progress=progress,
    ).value
    share = recall(model, tokenizer, text, make, tokens=tokens, count=recall_count, seed=seed, progress=progress)
    # Planned, not measured: this model runs in float32, and bytes are those of a half-precision one.
    planned = plan_memory(model.config, tokens=tokens, pq_config=config)
    kv_bytes, fp16_bytes = planned["dynamic" if bits is None else "pq"].total, planned["dynamic"].total
    cache = make()
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, **cache_kwargs(cache), max_new_tokens=NEW_TOKENS, do_sample=False)
    return DemoRow(
        cache="exact (fp16)" if bits is None else f"{bits} bits",
        true_bits=16.0 if bits is None else CacheSpec("pq", config.to_dict()).true_bits(model.config),
        perplexity=value,
        perplexity_change=value / exact[0].perplexity - 1 if exact else 0.0,
        recall=share,
        kv_bytes=kv_bytes,
        kv_ratio=kv_bytes / fp16_bytes,
        continuation=str(tokenizer.decode(out[0, tokens:], skip_special_tokens=True)),
    )
