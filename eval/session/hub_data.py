"""Data sets from the Hub through `datasets`: an answer at once where there is no network. Knows no task."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from hf_pqcache.codebook import hub


def load(path: str, config: str | None = None, *, split: str, revision: str | None = None, **options: Any) -> Any:
    """A split of a data set: a `datasets.Dataset`. Without a network the local cache must have it.

    Raises OSError saying which data set is not to be had, and how to do without the Hub.
    """
    from datasets import load_dataset

    try:
        with nullcontext() if hub.is_reachable() else hub.offline():
            return load_dataset(path, config, split=split, revision=revision, **options)
    except Exception as error:
        named = path if config is None else f"{path} ({config})"
        why = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"cannot get the data set {named} from the Hub: {why}; give --data-dir a folder with its plain files to do without"
        ) from error
