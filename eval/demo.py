"""The demo: calibrate a small model on part of a text, then compare exact and product-quantized caches on the rest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_pqcache.cache import PagedPQCache
from hf_pqcache.calibrate import calibrate
from hf_pqcache.config import PQConfig
from hf_pqcache.demo import MODEL, TEXT
from hf_pqcache.eval.perplexity import perplexity
from hf_pqcache.eval.recall import recall
from hf_pqcache.hf_names import cache_kwargs

SEPARATOR = "<|endoftext|>"
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


def split_text(text: str, documents: int = 3) -> tuple[str, str]:
    """(two thirds to calibrate on, one third to evaluate), whole documents, every third one held out."""
    parts = [part.strip() for part in text.split(SEPARATOR) if part.strip()]
    if len(parts) < documents:
        cut = len(text) * 2 // 3
        return text[:cut], text[cut:]
    held_out = parts[documents - 1 :: documents]
    rest = [part for i, part in enumerate(parts) if i % documents != documents - 1]
    return f"\n{SEPARATOR}\n".join(rest), f"\n{SEPARATOR}\n".join(held_out)


def _cache_bytes(model: Any, ids: torch.Tensor, cache: PagedPQCache) -> dict[str, Any]:
    with torch.inference_mode():
        model(ids, **cache_kwargs(cache), logits_to_keep=1)
    return cache.stats()


def run_demo(
    model_path: str | Path = MODEL,
    text: str | None = None,
    *,
    tokens: int = 1024,
    recall_count: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Calibrate, measure, compare. Returns {"conditions": ..., "rows": [DemoRow as dict, ...]}.

    Args:
        model_path: a folder or Hub id of a causal language model; None and the default are the embedded tiny one.
        text: text to calibrate on (two thirds) and to evaluate on (one third); None is the embedded articles.
        tokens: window of the perplexity, length of the recall prompts and of the sequence whose bytes are counted.
    """
    text = TEXT.read_text() if text is None else text
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    calibration, held_out = split_text(text)
    ids = tokenizer(held_out, return_tensors="pt")["input_ids"].to(model.device)
    if ids.shape[1] < tokens:
        raise ValueError(f"one third of the text has {ids.shape[1]} tokens and {tokens} are needed; pass a longer --text")
    prompt = ids[:, :tokens]
    head_dim = model.config.get_text_config().head_dim

    def continuation(cache: Any) -> str:
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, **cache_kwargs(cache), max_new_tokens=24, do_sample=False)
        return str(tokenizer.decode(out[0, tokens:], skip_special_tokens=True))

    measure: dict[str, Any] = {"window": tokens, "progress": progress}
    exact = perplexity(model, tokenizer, held_out, mode="exact", **measure).value
    sample = _cache_bytes(model, prompt, PagedPQCache(model.config, max_pages=64))
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
    for bits, share, num_bits in SETTINGS:
        config = PQConfig(num_subspaces=head_dim // share, num_bits=num_bits, max_pages=64 + tokens // 32)
        codebook = calibrate(model, tokenizer, calibration, config, seed=seed, progress=progress)
        value = perplexity(model, tokenizer, held_out, mode="stream", codebook=codebook, config=config, **measure).value

        def make_cache(codebook: Any = codebook, config: PQConfig = config) -> PagedPQCache:
            return PagedPQCache(model.config, codebook, config)

        stats = _cache_bytes(model, prompt, make_cache())
        # The exact window is counted as a half-precision model would hold it; this one runs in float32.
        kv_bytes = stats["bytes"]["codes"] + stats["bytes"]["window"] // 2
        rows.append(
            DemoRow(
                cache=f"PQ {bits} bits (M={head_dim // share}, n={num_bits})",
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
