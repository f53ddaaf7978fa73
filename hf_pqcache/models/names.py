"""What the installed transformers calls a cache that goes into a model or comes out of it; knows no cache.

transformers 5.24 renamed the argument and the output `past_key_values` to `cache`; the old name warns since, and goes
with 5.40. Names are read from signatures, because a model's own code (trust_remote_code) may be older than transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from transformers import GenerationMixin

#: The newest first.
NAMES = ("cache", "past_key_values")


def _name_in(function: Callable[..., Any]) -> str | None:
    """Side of NAMES the function takes; None if neither is in its signature."""
    known = inspect.signature(function).parameters
    return next((name for name in NAMES if name in known), None)


#: What `generate`, and every model of transformers itself, takes.
CACHE = _name_in(GenerationMixin.prepare_inputs_for_generation) or NAMES[0]


@lru_cache
def _name_of(forward: Callable[..., Any]) -> str:
    return _name_in(forward) or CACHE


def cache_kwargs(cache: Any, model: Any = None) -> dict[str, Any]:
    """`cache` as keyword argument of `generate`, or of a call of `model`: {"cache": cache} since transformers 5.24."""
    return {CACHE if model is None else _name_of(type(model).forward): cache}


def output_cache(outputs: Any) -> Any:
    """The cache in what a model or `generate(return_dict_in_generate=True)` returned; None if there is none."""
    return next((outputs[name] for name in NAMES if name in outputs), None)
