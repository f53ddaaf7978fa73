"""Which options of the command line do anything for which caches: the others are refused. Knows no command and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.eval import quantizers
from hf_pqcache.eval.session.caches import CODES, WINDOW, codes_of, codes_text

#: Settings of a cache that shape what it computes -> how the command line calls them.
FLAGS = {
    "bits": "--bits",
    "num_subspaces": "-M",
    "num_bits": "--nbits",
    "value_subspaces": "--value-subspaces",
    "value_bits": "--value-nbits",
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
    caches: Sequence[str],
    given: Mapping[str, Any],
    book: Codebook | None,
    sources: Mapping[str, str | None],
    *,
    head_dim: int = 0,
    learns: bool = False,
) -> None:
    """Raises ValueError if something was asked for that none of the caches would heed.

    Args:
        sources: codebook and calibration as they were given, by the names that the user knows. head_dim: see `head_dim_of`.
        learns: whether a codebook is learnt even if nobody names a text for it.
    """
    names = {text.partition(":")[0] for text in caches if not text.endswith(":own")}
    told = ", ".join(caches)
    for name in (name for name in FLAGS if name in given):
        if not any(name in _SHAPED.get(cache, ()) for cache in names):
            raise ValueError(f"{FLAGS[name]} does nothing for {told}: leave it out, or use --cache pq")
        if name in ("bits", *CODES) and "pq" not in caches:
            raise ValueError(f"{FLAGS[name]} does nothing for {told}: the bits after the colon decide; use pq without them")
    used = {name: value for name, value in sources.items() if value is not None}
    used |= {"--calibration-tokens": ""} if "calibration_tokens" in given else {}
    if "pq" not in names and used:
        raise ValueError(f"{next(iter(used))} does nothing for {told}: only pq caches have a codebook")
    of_calibration = [name for name in used if name.lstrip("-").startswith("calibration")]
    if of_calibration == ["--calibration-tokens"] and not (learns or book):
        raise ValueError("--calibration-tokens does nothing without --calibration TEXT: pq caches need no calibration")
    if book is not None:
        if of_calibration:
            raise ValueError(f"{of_calibration[0]} does nothing beside a codebook that is there already: leave one of them out")
        if head_dim:
            _check_codes(caches, given, book, head_dim)


def _check_codes(caches: Sequence[str], given: Mapping[str, Any], book: Codebook, head_dim: int) -> None:
    """Raises ValueError for codes that were asked for and are not those of the codebook."""
    found = codes_of(book, head_dim)
    asked = {FLAGS[name]: (given[name], found[name]) for name in CODES if name in given}
    for flag, (value, own) in asked.items():
        if value != own:
            raise ValueError(f"{flag} {value} and a codebook of {own}: the codebook decides; leave {flag} out")
    points = {text: text.partition(":")[2] for text in caches if text.startswith("pq:")}
    points |= {f"--bits {given['bits']}": given["bits"]} if "bits" in given else {}
    for name, bits in points.items():
        if codes_of(PQConfig(bits=int(bits)), head_dim) != found:
            raise ValueError(f"{name} and a codebook of {codes_text(found)}: the codebook decides; use --cache pq alone")
