"""True bits of a product-quantized cache for each number, everything counted, before it is run; knows no model."""

from __future__ import annotations

from collections.abc import Sequence

from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig


def bits_per_value(config: PQConfig, codebook: Codebook, num_tokens: int, element_bits: int = 16) -> dict[str, float]:
    """True bits for each key or value number of one sequence of `num_tokens` tokens, by where they lie.

    codes, window, table, total: see `cache_bits`. codebook: float16 centroids, which all sequences share; charged to one
    here. with_codebook: total and the codebook.
    """
    shapes = [(layer.keys.shape[0], *layer.head_dims) for layer in codebook.layers.values()]
    fitted = config.replace(num_subspaces=codebook.num_subspaces, num_bits=codebook.num_bits)
    parts = cache_bits(fitted, shapes, num_tokens, element_bits)
    parts["codebook"] = 8 * codebook.nbytes / (num_tokens * sum(heads * (dk + dv) for heads, dk, dv in shapes))
    parts["with_codebook"] = parts["total"] + parts["codebook"]
    return parts


def cache_bits(
    config: PQConfig, shapes: Sequence[tuple[int, int, int]], num_tokens: int, element_bits: int = 16
) -> dict[str, float]:
    """True bits for each key or value number, known before anything is calibrated.

    codes: of the coded tokens. window: exact tokens (their slots are allocated in full). table: one 32-bit page number
    for every page, shared by all layers. total: their sum.

    Args:
        shapes: (KV heads, numbers in a key, numbers in a value) of every compressed layer.
    """
    values = sum(heads * (dk + dv) for heads, dk, dv in shapes) * num_tokens
    coded = config.coded_tokens(num_tokens)
    code_bits = sum(heads * 2 * config.subspaces(dk) * config.num_bits * coded for heads, dk, _ in shapes)
    parts = {
        "codes": code_bits / values,
        "window": element_bits * (config.sink_tokens + config.window_slots) / num_tokens,
        "table": 32 * (coded // config.page_size) / values,
    }
    parts["total"] = sum(parts.values())
    return parts
