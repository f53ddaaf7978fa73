"""A process that computes the steps of another one's engine, its own heads of them: `python -m hf_pqcache.serve.follower`.

It is told over its input how the model is loaded and what the engine is like, and requests by transformers' engine, which
broadcasts them each step. It ends when its input does, or when its engine has, and then says why.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from typing import BinaryIO

from hf_pqcache.serve.engine import Engine


def _end_with_the_leader(stream: BinaryIO) -> None:
    stream.read()
    os._exit(1)


def main() -> None:
    orders = sys.stdin.buffer
    last_words = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is nobody's business
    load, settings = pickle.load(orders)
    threading.Thread(target=_end_with_the_leader, args=(orders,), daemon=True).start()

    def fail(error: BaseException) -> None:
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", file=last_words, flush=True)
        os._exit(1)  # others are in a collective that this process will never join

    try:
        model, _ = load()
        engine = Engine(model, settings, when_failed=fail)
        engine.start()
        engine.follow()
    except BaseException as error:
        fail(error)
    os._exit(0)  # NCCL would wait without end for captured graphs that hold its collectives


if __name__ == "__main__":
    main()
