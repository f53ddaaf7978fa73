"""Coded blocks under transformers' continuous batching: `enable_batching(model, bits=4)`, then `model.generate_batch(...)`."""

from hf_pqcache.batching.enable import disable_batching, enable_batching, is_enabled

__all__ = ["disable_batching", "enable_batching", "is_enabled"]
