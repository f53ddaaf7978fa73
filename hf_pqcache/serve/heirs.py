"""A replica that ends hands its prefixes to those who will get its requests; knows Ray's handles, no model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from hf_pqcache.serve import log
from hf_pqcache.serve.engine import Engine
from hf_pqcache.serve.recent import Text

#: What a replica gets for it beside the time of its running requests; and of it, to learn who the others are.
HAND_OVER_S, ASK_S = 10.0, 3.0
#: Of a replica that ends: how often Ray looks whether it has answered everything.
LOOK_S = 0.25


async def hand_over(engine: Engine, own: str, replicas: Any, most_bytes: int) -> None:
    """Give what is stored of the last texts to the replicas that the router asks for them from now on.

    Nothing is lost where it fails or lasts too long but what would have to be computed again.

    Args:
        own: the name of this replica. replicas: a handle to all of them.
        most_bytes: of all prefixes.
    """
    if not engine.exchanges_prefixes or not engine.is_alive() or not engine.recent.texts() or not most_bytes:
        return
    try:
        async with asyncio.timeout(HAND_OVER_S):
            names = await replicas.broadcast("called").results_async(timeout_s=ASK_S)
            heirs = engine.recent.by_heir({*names} - {own})
            for texts in heirs.values():
                await _give(engine, texts, replicas, most_bytes // len(heirs))
    except Exception as error:  # Ray has many, and none of them may keep a replica from its end
        log.tell("prefixes_lost", kind=type(error).__name__)


async def _give(engine: Engine, texts: Sequence[Text], replicas: Any, most_bytes: int) -> None:
    """To one heir; the others get theirs whatever it says."""
    try:
        data = await asyncio.to_thread(engine.export_prefixes, texts, most_bytes)
        counts = await replicas.inherit.remote(data, texts, key=texts[0].key)
    except Exception as error:
        log.tell("prefixes_lost", kind=type(error).__name__)
    else:
        log.tell("prefixes_handed_over", bytes=len(data), **counts)


async def inherit(engine: Engine, data: bytes, texts: Sequence[Text]) -> dict[str, int]:
    """Take up what another replica hands over -> what has become of it, in blocks. Raises ValueError where it does not fit."""
    try:
        taken = await asyncio.to_thread(engine.import_prefixes, data, texts)
    except ValueError as error:
        log.tell("prefixes_refused", why=str(error))
        raise
    return taken._asdict()
