"""Product-quantized, paged KV cache for Hugging Face transformers: `generate` unchanged, a quarter of the memory."""

from pathlib import Path

from hf_pqcache.cache import PagedKVCache, PagedPQCache
from hf_pqcache.calibrate import calibrate
from hf_pqcache.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.errors import PQCacheError

# A wheel carries eval/, kernels/ and model_configs/ inside this folder; a checkout has them beside it.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__version__ = "0.1.0"
__all__ = ["Codebook", "PQCacheError", "PQConfig", "PagedKVCache", "PagedPQCache", "calibrate"]
