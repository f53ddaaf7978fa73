"""Whether a codebook is what the settings beside it ask for: it decides how vectors are coded, and would win in silence."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, get_args

from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig, Side
from hf_pqcache.models.shapes import has_latent_attention, kv_shape, layer_configs

#: Settings that say how many codes a vector has, and of how many bits.
SIZES = {"key": {"bits", "num_subspaces"}, "value": {"bits", "num_subspaces", "value_subspaces"}}
BITS = {"key": {"bits", "num_bits"}, "value": {"bits", "num_bits", "value_bits"}}


def check_asked(codebook: Codebook, config: Any, settings: PQConfig, asked: Collection[str]) -> None:
    """Raises ValueError where a setting in `asked`, the names of those that were given, says something else.

    config: of the model, a transformers config.
    """
    text = config.get_text_config(decoder=True)
    layers = [] if has_latent_attention(text) else layer_configs(text)
    for head_dim in {found for layer in layers if (found := kv_shape(layer)[1]) is not None}:
        for which in get_args(Side):
            sizes, bits = SIZES[which] & {*asked}, BITS[which] & {*asked}
            own = codebook.codes(which, head_dim)
            if not sizes | bits:
                continue
            # Where nobody asked into how many codes vectors are cut, the usual number may not even cut them.
            wanted = settings.codes(which, head_dim) if sizes else own._replace(num_bits=_bits(settings, which))
            at_fault = set[str]()
            if own.num_subspaces != wanted.num_subspaces:
                at_fault |= sizes
            if own.num_bits != wanted.num_bits:
                at_fault |= bits
            if at_fault:
                given = ", ".join(f"{name}={getattr(settings, name)}" for name in sorted(at_fault))
                raise ValueError(
                    f"{given} asks for {which}s of {wanted.num_subspaces} codes of {wanted.num_bits} bits, and this codebook "
                    f"has {own.num_subspaces} of {own.num_bits}: leave out one of the two"
                )


def _bits(settings: PQConfig, which: Side) -> int:
    """Of a code, which is the same for vectors of any length."""
    return settings.replace(num_subspaces=None, value_subspaces=None).codes(which, 128).num_bits
