"""Which lengths a measurement runs at, by what the model can hold; knows no task and no cache."""

from __future__ import annotations

from collections.abc import Sequence

from hf_pqcache.models.positions import check_positions

#: 1K to 128K tokens.
LENGTHS = tuple(1024 << i for i in range(8))


def lengths_within(
    limit: int | None, asked: Sequence[int] | None, room: int, what: str, offered: Sequence[int] = LENGTHS
) -> list[int]:
    """`asked`, or of those `offered` the ones that leave `room` tokens within `limit`; the longest that does if none is.

    Args:
        limit: what the model can hold, None without an end. what: for messages.

    Raises ValueError for an empty list, a length below 1, and one that the model cannot hold.
    """
    if asked is None:
        fits = [tokens for tokens in offered if limit is None or tokens + room <= limit]
        return fits or [max(1, (limit or 0) - room)]
    if not asked or min(asked) < 1:
        raise ValueError(f"{what} at lengths {list(asked)}: give one or more, each of 1 token or more")
    for tokens in asked:
        check_positions(tokens + room, limit, f"{what} at {tokens} tokens and {room} more that follow", "the length")
    return list(asked)
