"""What is easily passed in place of an object, a path or a whole model: refused in one line that says what to pass."""

from __future__ import annotations

import os
from typing import Any


def check_config(value: Any) -> None:
    """Raises TypeError unless `value` is a transformers config."""
    if hasattr(value, "get_text_config"):
        return
    if isinstance(value, str | os.PathLike):
        raise TypeError(f"config={os.fspath(value)!r} is a name: pass model.config, or AutoConfig.from_pretrained(that name)")
    if hasattr(value, "config"):
        raise TypeError(f"config is a whole {type(value).__name__}: pass its config, model.config")
    raise TypeError(f"config must be a transformers config such as model.config, got {type(value).__name__}")


def check_codebook(value: Any) -> None:
    """Raises TypeError unless `value` is a Codebook or None."""
    if value is None or hasattr(value, "check_model"):
        return
    if isinstance(value, str | os.PathLike):
        raise TypeError(f"codebook={os.fspath(value)!r} is a path or name: pass Codebook.from_pretrained({os.fspath(value)!r})")
    raise TypeError(f"codebook must be a Codebook, from calibrate() or Codebook.from_pretrained(), got {type(value).__name__}")


def check_pq_config(value: Any) -> None:
    """Raises TypeError unless `value` is a PQConfig or None."""
    if value is None or hasattr(value, "coded_tokens"):
        return
    hint = "PQConfig(**settings)" if isinstance(value, dict) else "PQConfig(num_subspaces=..., num_bits=...)"
    raise TypeError(f"expected a PQConfig, got {type(value).__name__}: pass {hint}")


def check_model(model: Any, tokenizer: Any) -> None:
    """Raises TypeError unless these are a loaded model and a tokenizer."""
    for name, value, loader in (("model", model, "AutoModelForCausalLM"), ("tokenizer", tokenizer, "AutoTokenizer")):
        if isinstance(value, str | os.PathLike):
            raise TypeError(f"{name}={os.fspath(value)!r} is a name: pass {loader}.from_pretrained({os.fspath(value)!r})")
    if not hasattr(model, "config"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
