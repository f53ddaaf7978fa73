"""Product-quantized, paged KV cache for Hugging Face transformers: `generate` unchanged, a quarter of the memory.

Nothing is imported before it is asked for: `pqcache --help` needs no torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_pqcache import tested

if TYPE_CHECKING:
    from hf_pqcache.cache import PagedKVCache, PagedPQCache
    from hf_pqcache.calibrate import calibrate
    from hf_pqcache.codebook import Codebook
    from hf_pqcache.config import PQConfig
    from hf_pqcache.errors import PQCacheError
    from hf_pqcache.footprint import MemoryPlan, plan_memory

__version__ = "0.1.0"
__all__ = ["Codebook", "MemoryPlan", "PQCacheError", "PQConfig", "PagedKVCache", "PagedPQCache", "calibrate", "plan_memory"]

#: name -> the file that has it.
_HOMES = {
    "Codebook": "codebook",
    "MemoryPlan": "footprint",
    "PQCacheError": "errors",
    "PQConfig": "config",
    "PagedKVCache": "cache",
    "PagedPQCache": "cache",
    "calibrate": "calibrate",
    "plan_memory": "footprint",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Once a file is imported Python makes it an attribute here; the function of that name (calibrate) comes first."""
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


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
