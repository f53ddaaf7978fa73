"""Loads a causal language model and its tokenizer, from a folder or the Hub; knows no cache and no task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DTYPES = ("auto", "float32", "float16", "bfloat16")


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer). A local folder is read without asking the Hub anything.

    Args:
        name: folder or Hub id.
        revision: of the Hub repository.
        dtype: "auto" (as saved), "float32", "float16" or "bfloat16".
        device: "cpu", "cuda", "cuda:1", ...; None means CUDA if there is one. "auto" spreads it over all devices.
        attn_implementation: passed on; None leaves the choice to transformers.

    Raises:
        ValueError: an unknown dtype. OSError: no such model, or no network to fetch it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; use one of {DTYPES}")
    where: dict[str, Any] = {"local_files_only": True} if Path(name).is_dir() else {"revision": revision}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(str(name), **where)
    placing = {"device_map": "auto"} if device == "auto" else {}
    implementation = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(str(name), dtype=wanted, **where, **placing, **implementation)
    if not placing:
        model.to(device)
    return model.eval(), tokenizer


def public_name(name: str | Path) -> str:
    """What result rows call a model: its Hub id, or the bare name of its folder (a path is nobody's business)."""
    return Path(name).resolve().name if Path(name).is_dir() else str(name)


def context_tokens(model: Any) -> int:
    """Longest context that the model's config allows, 2048 if it does not say."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(limit) if limit else 2048
