"""A lane of an engine for tests: jobs are done late, fail, or are said to be done before they are."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence


class Late:
    """A lane that does a job after it has been asked for it some times, in order, or when the compute stream waits for it.

    Args:
        patience: how often each job is asked for in vain, in turn. None at the end is for ever.
        fails: numbers of jobs that are not done, which their tickets tell. raises: of those that are refused at once.
        is_lying: say at once that a job is done, as a lane would that forgets to wait.
    """

    name, runs_beside = "late", True

    def __init__(
        self,
        patience: Sequence[int] = (3,),
        fails: Container[int] = (),
        raises: Container[int] = (),
        is_lying: bool = False,
    ) -> None:
        self.patience, self.fails, self.raises, self.is_lying = patience, fails, raises, is_lying
        self.tickets: list[LateTicket] = []

    def run(self, job: Callable[[], None]) -> LateTicket:
        number = len(self.tickets)
        ticket = LateTicket(self, number, job, self.patience[number % len(self.patience)])
        self.tickets.append(ticket)
        if number in self.raises:
            ticket.has_run = True
            raise RuntimeError("the lane takes nothing")
        return ticket


class LateTicket:
    def __init__(self, lane: Late, number: int, job: Callable[[], None], patience: int) -> None:
        self.lane, self.number, self.job, self.left = lane, number, job, patience
        self.has_run, self.has_failed = False, False

    def is_done(self) -> bool:
        if self.lane.is_lying:
            return True
        self.left -= 1
        earlier = self.lane.tickets[: self.number]
        if self.left < 0 and all(ticket.has_run for ticket in earlier):
            self.work()
        return self.answer()

    def wait(self) -> None:
        for ticket in self.lane.tickets[: self.number + 1]:
            ticket.work()
        self.answer()

    def work(self) -> None:
        if not self.has_run:
            self.has_run, self.has_failed = True, self.number in self.lane.fails
            if not self.has_failed:
                self.job()

    def answer(self) -> bool:
        if self.has_failed:
            raise RuntimeError("the lane is broken")
        return self.has_run
