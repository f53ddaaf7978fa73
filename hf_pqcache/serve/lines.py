"""Lines for operators of several processes of a Ray cluster, on the error stream of the one that serves; knows no replica."""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import time
from contextlib import suppress
from typing import Any, TextIO

import ray

from hf_pqcache.serve import log

#: Of the actor that collects, in the namespace of Ray Serve.
NAME, NAMESPACE = "pqcache-lines", "serve"
#: In which lines go together.
TOGETHER_S = 0.1
#: In which the last of them is written.
_END_S = 5.0


class Collector:
    """The actor: keeps what has come until it is taken."""

    def __init__(self) -> None:
        self.waiting: asyncio.Queue[str] = asyncio.Queue()

    async def put(self, text: str) -> None:
        self.waiting.put_nowait(text)

    async def take(self) -> str:
        """What has come; waits for the first."""
        found = await self.waiting.get()
        while not self.waiting.empty():
            found += self.waiting.get_nowait()
        return found


class Sender:
    """A stream that a logging handler writes to; lines reach the collector from a thread, and are lost without one.

    Args:
        collector: a handle.
    """

    def __init__(self, collector: Any) -> None:
        self.collector, self.lines = collector, queue.SimpleQueue[str]()
        threading.Thread(target=self._send, daemon=True).start()

    def write(self, text: str) -> None:
        self.lines.put(text)

    def flush(self) -> None:
        """Nobody waits for lines."""

    def _send(self) -> None:
        while True:
            text = self.lines.get()
            time.sleep(TOGETHER_S)
            while not self.lines.empty():
                text += self.lines.get()
            with suppress(Exception):
                self.collector.put.remote(text)


def send(**always: Any) -> None:
    """Let this process's lines go to the collector, each with these facts; where there is none, to its own error stream."""
    try:
        stream: Any = Sender(ray.get_actor(NAME, NAMESPACE))
    except ValueError:
        stream = None
    log.start(stream, **always)


class Collected:
    """Writes what comes, from when it is made until `stop`. Ray must run.

    Args:
        stream: the error stream if absent.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        made: Any = ray.remote(num_cpus=0)(Collector)
        self.stream = stream or sys.stderr
        self.collector = made.options(name=NAME, namespace=NAMESPACE, get_if_exists=True).remote()
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()

    def _write(self) -> None:
        while True:
            try:
                text = ray.get(self.collector.take.remote())
            except Exception:  # the cluster ends
                return
            self.stream.write(text)
            self.stream.flush()

    def stop(self) -> None:
        """Give the last lines their time, then let go of Ray, which ends a process that asks it for more afterwards."""
        time.sleep(3 * TOGETHER_S)
        with suppress(Exception):
            ray.kill(self.collector)
        self.thread.join(_END_S)
