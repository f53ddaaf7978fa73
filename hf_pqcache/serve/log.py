"""Lines for operators, one JSON object each: what came, how it ended, how long it took; never a prompt, an answer or a key."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

LOGGER = logging.getLogger("hf_pqcache.serve")
LOGGER.setLevel(logging.WARNING)


#: Facts of every line.
ALWAYS: dict[str, Any] = {}


def start(stream: TextIO | None = None, **always: Any) -> None:
    """Write lines from now on, to the error stream if none is named, each with the facts `always`."""
    ALWAYS.clear()
    ALWAYS.update(always)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


def tell(event: str, **facts: Any) -> None:
    """A line about `event`, if anybody listens. Facts are numbers and words of ours, seconds rounded to a millisecond."""
    if not LOGGER.isEnabledFor(logging.INFO):
        return
    rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in facts.items()}
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + "Z"
    LOGGER.info(json.dumps({"time": moment, "event": event, **ALWAYS, **rounded}))
