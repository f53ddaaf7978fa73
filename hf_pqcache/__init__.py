"""Product-quantized, paged KV cache for Hugging Face transformers: `generate` unchanged, a quarter of the memory.

Nothing is imported before it is asked for: `pqcache --help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_pqcache.models import tested

if TYPE_CHECKING:
    from hf_pqcache.batching.enable import disable_batching, enable_batching
    from hf_pqcache.cache.caches import PagedKVCache, PagedPQCache
    from hf_pqcache.cache.footprint import MemoryPlan, plan_memory
    from hf_pqcache.cache.pressed import pressed
    from hf_pqcache.codebook.calibrate import calibrate
    from hf_pqcache.codebook.codebook import Codebook
    from hf_pqcache.config import PQConfig
    from hf_pqcache.errors import PQCacheError

__version__ = "0.2.0"
__all__ = ["Codebook", "MemoryPlan", "PQCacheError", "PQConfig", "PagedKVCache", "PagedPQCache", "calibrate"]
__all__ += ["disable_batching", "enable_batching", "plan_memory", "pressed"]

#: name -> the module that has it.
_HOMES = {
    "Codebook": "codebook.codebook",
    "MemoryPlan": "cache.footprint",
    "PQCacheError": "errors",
    "PQConfig": "config",
    "PagedKVCache": "cache.caches",
    "PagedPQCache": "cache.caches",
    "calibrate": "codebook.calibrate",
    "disable_batching": "batching.enable",
    "enable_batching": "batching.enable",
    "plan_memory": "cache.footprint",
    "pressed": "cache.pressed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ImportError as error:
        raise tested.explain(error) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
