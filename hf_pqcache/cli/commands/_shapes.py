"""Models of benchmarks: random weights in the shape of a known one, or a model by its name."""

from __future__ import annotations

from typing import Any

import click


def load(shape: str | None, model: str | None, revision: str | None, loading: dict[str, Any]) -> tuple[Any, Any]:
    """(model, tokenizer): of a shape, which needs a GPU, or of a folder, a Hub id or a model config."""
    if shape is None:
        from hf_pqcache.eval.session.model_config import load_model_config
        from hf_pqcache.eval.session.models import load_model

        described = load_model_config(str(model), {"revision": revision})
        return load_model(described.source, revision=described.revision, **loading)
    import torch
    from transformers import AutoTokenizer

    from hf_pqcache import demo
    from hf_pqcache.eval.bench.generate import SHAPES, build_model

    if shape not in SHAPES:
        raise click.BadParameter(f"{shape!r} is unknown; known ones are {sorted(SHAPES)}", param_hint="--shape")
    if not torch.cuda.is_available():
        raise click.ClickException("a model of that shape needs a GPU; torch sees no CUDA device (--model tiny does without)")
    return build_model(SHAPES[shape]), AutoTokenizer.from_pretrained(demo.MODEL)


def public_name(model: str) -> str:
    from hf_pqcache.eval.session.models import public_name

    return public_name(model)
