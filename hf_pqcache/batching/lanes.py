"""Where finished prompts are stored: within the step, or on a CUDA stream beside the next ones; knows no cache, no engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Ticket(Protocol):
    """A job that a lane has taken."""

    def is_done(self) -> bool:
        """Whether the job has ended. Waits for nothing."""
        ...

    def wait(self) -> None:
        """What the compute stream is given from now on comes after the job. The host waits for nothing."""
        ...


class Lane(Protocol):
    """Runs jobs one after the other, each after all that the compute stream has been given before.

    Attributes:
        name: for `stats`.
        runs_beside: whether the compute stream goes on meanwhile; if not, prompts are stored within their step.
    """

    name: str
    runs_beside: bool

    def run(self, job: Callable[[], None]) -> Ticket:
        """Take a job, to be called on the compute stream. Raises what the job raises; what it has done before then comes
        before what the compute stream is given from now on."""
        ...


class Inline:
    """The compute stream itself: no job is given to it."""

    name = "inline"
    runs_beside = False

    def run(self, job: Callable[[], None]) -> Ticket:
        raise NotImplementedError("prompts are stored within their step")


class StreamTicket:
    def __init__(self, event: torch.cuda.Event, compute: torch.cuda.Stream) -> None:
        self._event, self._compute = event, compute

    def is_done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._compute.wait_event(self._event)


class StreamLane:
    """A CUDA stream: a plain one, or one that has some of the multiprocessors (`streams.py`).

    A job's temporary tensors belong to that stream; what it reads is of the compute stream, and to be kept until its ticket
    is done.
    """

    runs_beside = True

    def __init__(self, stream: Any, name: str = "stream") -> None:
        self.stream, self.name = stream, name

    def run(self, job: Callable[[], None]) -> Ticket:
        compute = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(compute)
        ticket = StreamTicket(torch.cuda.Event(), compute)
        try:
            with torch.cuda.stream(self.stream):
                job()
        except BaseException:
            compute.wait_stream(self.stream)
            raise
        ticket._event.record(self.stream)
        return ticket
