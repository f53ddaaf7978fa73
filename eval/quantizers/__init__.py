"""Published quantizers of keys and values, re-made in plain torch to compare with: by name, as transformers Caches.

They compute what their papers describe, not how fast their kernels do: use their figures of accuracy and bytes, not of time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_pqcache.eval.quantizers.cache import QuantizedSide, Quantizer, ReferenceQuantizedCache, Window
from hf_pqcache.eval.quantizers.integers import PerChannel, PerToken
from hf_pqcache.eval.quantizers.kvquant import BLOCK, DenseAndSparse
from hf_pqcache.eval.quantizers.turboquant import Turbo

#: Tokens or numbers of a group that share a scale.
GROUPS = (64, 32)


@dataclass(frozen=True)
class Method:
    """A published quantizer.

    Attributes:
        about: a few words, and where it is from.
        bits: that it offers, the default first; none where there is no choice.
        keys, values: (bits, group) -> the quantizer of one side.
        own: the windows of keys and of values that its authors use, for a group.
        has_groups: whether the size of a group can be chosen.
    """

    about: str
    bits: tuple[float, ...]
    keys: Callable[[Any, int], Quantizer]
    values: Callable[[Any, int], Quantizer]
    own: Callable[[int], tuple[Window, Window]]
    has_groups: bool = True


#: Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (arXiv:2402.02750), section 3: keys per
#: channel, values per token, both in groups (32 there). Up to 128 newest keys stay exact and leave together; values leave
#: one by one and 128 stay.
_KIVI = Method(
    "KIVI (Liu et al. 2024): keys per channel, values per token, integers in groups",
    (4, 3, 2),
    PerChannel,
    PerToken,
    lambda group: (Window(0, 0, 128), Window(0, 128, 1)),
)
#: What quanto's cache in transformers does to each vector; there a window of up to 128 tokens is emptied as a whole.
_INT4 = Method(
    "4-bit integers per token in groups, as in transformers' quanto cache, re-made in plain torch",
    (),
    lambda bits, group: PerToken(4, group),
    lambda bits, group: PerToken(4, group),
    lambda group: (Window(0, 0, 128), Window(0, 0, 128)),
)
#: Section 4.3 there: every token is quantized as it comes.
_TURBO = Method(
    "TurboQuant (Zandieh et al. 2025): random rotation, norm per token, one Lloyd-Max codebook",
    (4, 3.5, 3, 2.5, 2),
    lambda bits, group: Turbo(bits),
    lambda bits, group: Turbo(bits),
    lambda group: (Window(), Window()),
    has_groups=False,
)
#: Its authors quantize every token as it comes; here, a block of tokens at a time.
_KVQUANT = Method(
    "after KVQuant (Hooper et al. 2024): uneven levels, 1 % of the numbers exact; without its calibration",
    (4, 3, 2),
    lambda bits, group: DenseAndSparse(bits, True),
    lambda bits, group: DenseAndSparse(bits, False),
    lambda group: (Window(1, 0, BLOCK), Window(1, 0, BLOCK)),
    has_groups=False,
)
METHODS = {"kivi": _KIVI, "turboquant": _TURBO, "kvquant": _KVQUANT, "int4-token": _INT4}


def settings_of(name: str, bits: float | None, options: tuple[str, ...], window: dict[str, int]) -> dict[str, Any]:
    """Settings of a cache, JSON values, from what stands behind its name: bits, "g32" (size of groups), "own".

    Args:
        window: sink_tokens, extended_residual and page_size that it is to have, unless its own ("own") was asked for.

    Raises ValueError naming the choices.
    """
    method = METHODS[name]
    settings: dict[str, Any] = {} if not method.bits else {"nbits": method.bits[0] if bits is None else bits}
    group = GROUPS[0]
    for option in options:
        if option.startswith("g") and option[1:].isdigit() and int(option[1:]) in GROUPS and method.has_groups:
            group = int(option[1:])
        elif option != "own":
            groups = [f"g{size}" for size in GROUPS] if method.has_groups else []
            raise ValueError(f"cache {name}: {option!r} is unknown; use one of {(*groups, 'own')}")
    if method.has_groups:
        settings["group"] = group
    return {**settings, **({"window": "own"} if "own" in options else window)}


def _sides(name: str, settings: dict[str, Any]) -> tuple[tuple[Quantizer, Window], tuple[Quantizer, Window]]:
    method, group, bits = METHODS[name], settings.get("group", GROUPS[0]), settings.get("nbits")
    keys, values = method.keys(bits, group), method.values(bits, group)
    if settings.get("window") == "own":
        windows = method.own(group)
    else:
        block = math.lcm(settings["page_size"], keys.tokens_together, values.tokens_together)
        windows = (Window(settings["sink_tokens"], settings["extended_residual"], block),) * 2
    return (keys, windows[0]), (values, windows[1])


def make_cache(name: str, settings: dict[str, Any], config: Any) -> ReferenceQuantizedCache:
    """A fresh cache for a model of `config`; settings as from `settings_of`."""
    keys, values = _sides(name, settings)
    return ReferenceQuantizedCache(config, partial(QuantizedSide, *keys), partial(QuantizedSide, *values))


def true_bits(name: str, settings: dict[str, Any], head_dim: int) -> float:
    """Bits of a coded number with all scales, offsets, norms and indices, the mean of keys and values."""
    (keys, _), (values, _) = _sides(name, settings)
    return (keys.bits(head_dim) + values.bits(head_dim)) / 2
