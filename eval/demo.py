"""The demo: calibrate a small model on part of a text, then compare exact and product-quantized caches on the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from hf_pqcache.cache.caches import PagedPQCache
from hf_pqcache.codebook.calibrate import calibrate
from hf_pqcache.config import PQConfig
from hf_pqcache.demo import MODEL, TEXT, split_text
from hf_pqcache.eval.measure.lengths import lengths_within
from hf_pqcache.eval.measure.perplexity import perplexity
from hf_pqcache.eval.measure.recall import check_recall, recall
from hf_pqcache.eval.report.naming import format_value
from hf_pqcache.eval.session.caches import head_dim_of
from hf_pqcache.eval.session.models import load_config, load_model, load_tokenizer, token_ids
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.models.positions import max_positions

#: Of the continuation that is shown.
NEW_TOKENS = 24
#: (bits per value, subspaces as a share of head_dim, bits of a code)
SETTINGS = ((4, 2, 8), (3, 2, 6), (2, 4, 8))


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table; bytes are those of one sequence of `tokens` tokens, shared codebooks aside."""

    cache: str
    perplexity: float
    perplexity_change: float
    recall: float
    kv_bytes: int
    kv_ratio: float
    codebook_bytes: int
    continuation: str


def _cache_bytes(model: Any, ids: torch.Tensor, cache: PagedPQCache) -> dict[str, Any]:
    with torch.inference_mode():
        model(ids, **cache_kwargs(cache), logits_to_keep=1)
    return cache.stats()


#: heading -> how a row's figure is told there.
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "cache": lambda row: row["cache"],
    "perplexity": lambda row: f"{row['perplexity']:.3f}",
    "change": lambda row: f"{row['perplexity_change']:+.2%}" if row["codebook_bytes"] else "",
    "recall": lambda row: f"{row['recall']:.0%}",
    "KV": lambda row: format_value(row["kv_bytes"], "bytes"),
    "of fp16": lambda row: f"{row['kv_ratio']:.0%}",
    "codebooks": lambda row: format_value(row["codebook_bytes"], "bytes") if row["codebook_bytes"] else "",
}


def markdown(result: dict[str, Any]) -> str:
    """The table for a README."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *([tell(row) for tell in COLUMNS.values()] for row in result["rows"])]
    return (
        "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
        .replace(" --- ", "---")
        .replace("|  |", "| |")
        .replace("%", " %")
    )


def _line(row: DemoRow) -> str:
    return f"{row.cache}: perplexity {row.perplexity:.3f}, recall {row.recall:.0%}"


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
    recall_count: int = 20,
    seed: int = 0,
    progress: bool = True,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Calibrate, measure, compare. Returns {"conditions": ..., "rows": [DemoRow as dict, ...]}.

    Args:
        model_path: a folder or Hub id of a causal language model; None and the default are the embedded tiny one.
        text: text to calibrate on (two thirds) and to evaluate on (one third); None is the embedded articles.
        tokens: window of the perplexity, length of the recall prompts and of the sequence whose bytes are counted; None
            means 1024, or what the model can hold.
        limit: windows of the perplexity; None means all. recall_count: pass keys to ask for.
        note: called with a line for every row as soon as it is there.

    Raises ValueError, before the model is loaded, for more tokens than it can hold and for a text that is too short.
    """
    text = TEXT.read_text() if text is None else text
    hf_config = load_config(model_path)
    tokens, tokenizer, width = demo_tokens(hf_config, tokens), load_tokenizer(model_path), head_dim_of(hf_config)
    for _, share, num_bits in SETTINGS:
        PQConfig(num_subspaces=width // share, num_bits=num_bits).subspaces(width)
    calibration, held_out = split_text(text)
    seen, ids = token_ids(tokenizer, calibration), token_ids(tokenizer, held_out)[None]
    if ids.shape[1] < tokens:
        raise ValueError(f"one third of the text has {ids.shape[1]} tokens and {tokens} are needed; pass a longer --text")
    check_recall(tokenizer, ids[0], (tokens,), (0.5,), None)
    note(f"calibrating on two thirds of the text, {seen.numel():,} tokens")
    model, _ = load_model(model_path, dtype="float32")
    prompt = ids[:, :tokens].to(model.device)

    def continuation(cache: Any) -> str:
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, **cache_kwargs(cache), max_new_tokens=NEW_TOKENS, do_sample=False)
        return str(tokenizer.decode(out[0, tokens:], skip_special_tokens=True))

    measure: dict[str, Any] = {"window": tokens, "max_windows": limit, "progress": progress}
    exact = perplexity(model, tokenizer, held_out, mode="exact", **measure).value
    sample = _cache_bytes(model, prompt, PagedPQCache(model.config))
    fp16_bytes = sample["bytes_fp16"]
    rows = [
        DemoRow(
            cache="exact (fp16)",
            perplexity=exact,
            perplexity_change=0.0,
            recall=recall(
                model,
                tokenizer,
                held_out,
                lambda: DynamicCache(config=model.config),
                tokens=tokens,
                count=recall_count,
                seed=seed,
                progress=progress,
            ),
            kv_bytes=fp16_bytes,
            kv_ratio=1.0,
            codebook_bytes=0,
            continuation=continuation(DynamicCache(config=model.config)),
        )
    ]
    note(_line(rows[0]))
    for bits, share, num_bits in SETTINGS:
        config = PQConfig(num_subspaces=width // share, num_bits=num_bits)
        codebook = calibrate(model, None, seen, config, num_tokens=seen.numel(), seed=seed, progress=progress)
        value = perplexity(model, tokenizer, held_out, mode="stream", codebook=codebook, config=config, **measure).value

        def make_cache(codebook: Any = codebook, config: PQConfig = config) -> PagedPQCache:
            return PagedPQCache(model.config, codebook, config)

        stats = _cache_bytes(model, prompt, make_cache())
        # The exact window is counted as a half-precision model would hold it; this one runs in float32.
        kv_bytes = stats["bytes"]["codes"] + stats["bytes"]["window"] // 2
        rows.append(
            DemoRow(
                cache=f"{bits} bits (M={width // share} n={num_bits})",
                perplexity=value,
                perplexity_change=value / exact - 1,
                recall=recall(
                    model, tokenizer, held_out, make_cache, tokens=tokens, count=recall_count, seed=seed, progress=progress
                ),
                kv_bytes=kv_bytes,
                kv_ratio=kv_bytes / fp16_bytes,
                codebook_bytes=stats["bytes"]["codebooks"],
                continuation=continuation(make_cache()),
            )
        )
        note(_line(rows[-1]))
    return {
        "conditions": {
            "model": str(model_path),
            "tokens": tokens,
            "evaluated_tokens": int(ids.shape[1]),
            "recall_prompts": recall_count,
            "seed": seed,
            "device": str(model.device),
            "torch": torch.__version__,
        },
        "prompt_end": tokenizer.decode(prompt[0, -24:]),
        "rows": [asdict(row) for row in rows],
    }
