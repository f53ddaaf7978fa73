"""How many tokens a model has positions for, from its transformers config; knows no weights and no cache."""

from __future__ import annotations

from typing import Any


def max_positions(config: Any) -> int | None:
    """The longest sequence that the model of a transformers config can hold; None where the config sets no end.

    With YaRN (Peng et al. 2023) `max_position_embeddings` may be the length before the extension: both are looked at.
    """
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    found = getattr(text, "rope_parameters", None) or {}
    for rope in (found, *found.values()) if isinstance(found, dict) else ():
        if isinstance(rope, dict) and rope.get("rope_type") == "yarn" and rope.get("factor"):
            positions = max(positions, int(rope["factor"] * (rope.get("original_max_position_embeddings") or positions)))
    return positions


def check_positions(needed: int, limit: int | None, what: str, option: str) -> None:
    """Raises ValueError if `what` takes more tokens than a model holds; the message says which `option` to lower to what.

    Args:
        limit: what `max_positions` says.
    """
    if limit is not None and needed > limit:
        raise ValueError(
            f"{what} takes {needed} tokens and the model has positions for {limit} (max_position_embeddings): beyond them "
            f"figures mean nothing; lower {option} by {needed - limit} or more"
        )
