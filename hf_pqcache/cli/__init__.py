"""The `pqcache` command."""

from hf_pqcache.cli.app import main

__all__ = ["main"]
