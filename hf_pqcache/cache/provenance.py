"""What both sides of an export must share: the model, its weights and dtype, settings; knows no tensors of either."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short
from typing import Any

import torch.distributed as dist

from hf_pqcache.config import PQConfig
from hf_pqcache.models import identity

#: Settings that both sides must share besides codes.
_SIZES = ("page_size", "sink_tokens", "extended_residual")


def facts(holder: str, settings: PQConfig, config: Any, dtype: str | None, model: Any) -> dict[str, Any]:
    """Of one side, in JSON values.

    Args:
        holder: what holds the tokens, as users call it. settings: of its pages.
        config: of the model. dtype: of keys and values; None where it is not known.
        model: whose weights are to be compared; None leaves them out.
    """
    is_parallel = dist.is_available() and dist.is_initialized()
    return {
        "cache": holder,
        "settings": {name: getattr(settings, name) for name in _SIZES},
        "dtype": dtype,
        "processes": [dist.get_rank(), dist.get_world_size()] if is_parallel else [0, 1],
        "config": identity.settings_of_tokens(config),
        "weights": None if model is None else [identity.weights_fingerprint(model), identity.dtype_name(model)],
    }


def check(noted: Mapping[str, Any], own: Mapping[str, Any], what: str = "the sequence was") -> None:
    """Raises ValueError where what is `noted` is of another model than `own`, or of a cache of another shape.

    what: begins what the error says, "the prefixes were".
    """
    if noted["cache"] != own["cache"]:
        raise ValueError(f"{what} exported by a {short(noted['cache'])}, this is a {own['cache']}")
    if differing := identity.differences(noted["config"], own["config"]):
        told = ", ".join(f"{name} {short(noted['config'][name])} (here {short(own['config'][name])})" for name in differing[:4])
        raise ValueError(f"{what} made with another model: {told}")
    for name in _SIZES:
        if noted["settings"][name] != own["settings"][name]:
            raise ValueError(
                f"{what} exported with {name}={short(noted['settings'][name])}, this cache has "
                f"{name}={own['settings'][name]}: build the cache with the settings of the one that exported"
            )
    if None not in (noted["dtype"], own["dtype"]) and noted["dtype"] != own["dtype"]:
        raise ValueError(f"{what} exported by a model in {short(noted['dtype'])}, this one is in {own['dtype']}")
    if noted["processes"] != own["processes"]:
        raise ValueError(
            f"{what} exported by process [rank, world size] {short(noted['processes'])}, this is {own['processes']}: "
            "each process holds its own heads"
        )
    if noted["weights"] is not None:
        if own["weights"] is None:
            raise ValueError(f"{what} exported with a note of the weights: pass model= to compare them")
        if noted["weights"][0] != own["weights"][0]:
            raise ValueError(f"{what} made with other weights than this model's, in another dtype, or both")
