"""Coded blocks under transformers' continuous batching: `enable_batching(model, bits=4)`, then `model.generate_batch(...)`."""

from hf_pqcache.batching.enable import disable_batching, enable_batching, is_enabled
from hf_pqcache.batching.images import image_prompt
from hf_pqcache.batching.streams import Partition

__all__ = ["Partition", "disable_batching", "enable_batching", "image_prompt", "is_enabled"]
