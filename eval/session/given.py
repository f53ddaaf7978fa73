"""Which options of the command line do anything for which caches: the others are refused. Knows no command and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.eval import quantizers
from hf_pqcache.eval.session.caches import PQ_BITS, WINDOW

#: Settings of a cache that shape what it computes -> how the command line calls them.
FLAGS = {
    "num_subspaces": "-M",
    "num_bits": "--nbits",
    "page_size": "--page-size",
    "max_pages": "--max-pages",
    "extended_residual": "--extended-residual",
    "sink_tokens": "--sink-tokens",
}
#: What each cache has of them; the others have none.
_SHAPED = {"pq": tuple(FLAGS), "paged-kv": ("page_size", "max_pages"), **dict.fromkeys(quantizers.METHODS, WINDOW)}
#: What a codebook recommends beside its codes.
RECOMMENDED = ("page_size", "extended_residual", "sink_tokens")


def check_data_dir(data_dir: Path | None, *, is_read: bool) -> None:
    """Raises ValueError if a folder of data sets was given and none of them is read."""
    if data_dir is not None and not is_read:
        raise ValueError("--data-dir does nothing here, where no data set is read: leave it out, or name a data set's text")


def check_given(
    caches: Sequence[str], given: Mapping[str, Any], book: Codebook | None, sources: Mapping[str, str | None]
) -> None:
    """Raises ValueError if something was asked for that none of the caches would heed."""
    names = {text.partition(":")[0] for text in caches if not text.endswith(":own")}
    told = ", ".join(caches)
    for name in (name for name in FLAGS if name in given):
        if not any(name in _SHAPED.get(cache, ()) for cache in names):
            raise ValueError(f"{FLAGS[name]} does nothing for {told}: leave it out, or use --cache pq")
        if name in ("num_subspaces", "num_bits"):
            if "pq" not in caches:
                raise ValueError(f"{FLAGS[name]} does nothing for {told}: the bits after the colon decide; use pq without them")
            if book is None:
                continue
            found = book.num_bits if name == "num_bits" else next(iter(book.layers.values())).keys.shape[1]
            if found != given[name]:
                asked = f"{FLAGS[name]} {given[name]}"
                raise ValueError(f"{asked} and a codebook of {found}: the codebook decides; leave {FLAGS[name]} out")
    used = {name: value for name, value in sources.items() if value is not None}
    if "pq" not in names:
        for name in (*used, *(("--calibration-tokens",) if "calibration_tokens" in given else ())):
            raise ValueError(f"{name} does nothing for {told}: only pq caches have a codebook")
    if book is not None:
        unused = [n for n in ("--calibration",) if n in used] + ["--calibration-tokens"] * ("calibration_tokens" in given)
        if unused:
            raise ValueError(f"{unused[0]} does nothing beside a codebook that is there already: leave one of them out")
        for bits in (text.partition(":")[2] for text in caches if text.startswith("pq:")):
            width, num_bits = PQ_BITS[int(bits)]
            keys = next(iter(book.layers.values())).keys
            if (keys.shape[3], book.num_bits) != (width, num_bits):
                made = f"M={keys.shape[1]}, {book.num_bits} bits"
                raise ValueError(f"pq:{bits} and a codebook of {made}: the codebook decides; use --cache pq")
