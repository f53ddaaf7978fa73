"""Finished prompts on their way into blocks while other requests go on; knows no scheduler and no transformers.

A prompt's exact keys and values wait for its end (`Staging`). What happens then is a *job*: they are stored by a lane
(`lanes.py`), a layer as soon as it is computed, and the request takes no further step before all are. A job is *taken in* when
its ticket is done or the compute stream has been told to wait for it; only then may others be given its slot or blocks, or
share what is in them.

All calls come from the engine's thread.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from hf_pqcache.batching.lanes import Inline, Lane
from hf_pqcache.batching.requests import Job, Request
from hf_pqcache.batching.slots import SlotLayers

logger = logging.getLogger(__name__)


class Room:
    """How many tokens of prompts may wait exactly, all requests together.

    Args:
        tokens: the most. A prompt that is longer gets all of it if nothing else waits, and is stored in parts.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._taken: dict[int, int] = {}  # by slot

    @property
    def taken(self) -> int:
        return sum(self._taken.values())

    def has(self, tokens: int) -> bool:
        return self.taken + min(tokens, self.tokens) <= self.tokens

    def stage(self, slot: int, prompt: int, tokens: int) -> bool:
        """Whether the first `tokens` of a prompt may wait, of `prompt` that are to come in all. Keeps room for all of them."""
        if slot not in self._taken:
            if not self.has(prompt):
                return False
            self._taken[slot] = min(prompt, self.tokens)
        return tokens <= self._taken[slot]

    def leave(self, slot: int) -> None:
        self._taken.pop(slot, None)


class Compression:
    """The jobs of one engine.

    Args:
        layers: where prompts are stored.
        room: for prompts that wait.
        on_compute: a context in which the compute stream is the current one.

    Attributes:
        lane: where jobs are done.
        taken_in: called with a job once the compute stream may rely on it.
    """

    def __init__(
        self,
        layers: SlotLayers,
        room: Room,
        on_compute: Callable[[], AbstractContextManager[Any]],
        taken_in: Callable[[Job], None],
    ) -> None:
        self.layers, self.room = layers, room
        self.lane: Lane = Inline()
        self.jobs: dict[str, Job] = {}  # under way, oldest first
        self.failed: dict[str, Exception] = {}  # requests whose prompt could not be stored
        self.counts: Counter[str] = Counter()
        self._on_compute, self._taken_in = on_compute, taken_in

    # -- preparing a step ------------------------------------------------------------------------------------------------
    def plan(self, request_id: str, request: Request, length: int) -> Job | None:
        """The job of a prompt whose end, token `length`, comes in the step that is being prepared. None is within that step.

        The first pages of all must be those of the compute stream, which makes the equaliser of them.
        """
        if not self.lane.runs_beside:
            return None
        tokens = length - request.stored
        if not self.layers.is_equalised or not self.room.stage(request.slot, tokens, tokens):
            self.counts["within"] += 1
            return None
        return Job(request_id, request.slot, request.stored, request.coded)

    # -- computing -------------------------------------------------------------------------------------------------------
    def go_on(self, jobs: Sequence[Job], is_last: bool) -> None:
        """One more layer of a step's jobs is there: begin to store it, after what the compute stream has been given.

        Each layer at once, not all of them in the end: so the host gives the lane its work while the device has some of the
        step before it.
        """
        sound, ticket = [job for job in jobs if job.error is None], None
        try:
            ticket = self.lane.run(lambda: self._store_all(sound))
        except Exception as error:
            for job in sound:
                job.error = error if job.stored_layers < len(job.sides) else None
        for job in jobs if is_last else ():
            self.counts["jobs"] += 1
            self.jobs[job.request_id], job.ticket = job, ticket
            if job.error is not None or ticket is None:
                self._store_within(job, job.error)

    def another_step(self) -> None:
        """A step is prepared: jobs under way may be done beside it."""
        for job in self.jobs.values():
            job.steps_beside += 1

    def _store_all(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._store(job)

    def _store(self, job: Job) -> None:
        while job.stored_layers < len(job.sides):
            layer = job.stored_layers
            self.layers.store(layer, job.slot, *job.sides[layer], job.stored, job.coded)
            job.stored_layers += 1

    def _store_within(self, job: Job, error: Exception | None) -> None:
        """What a lane has failed to store, the compute stream stores; else the request fails, and others go on."""
        logger.warning("a prompt could not be stored beside other steps, and is stored between them: %s", error)
        self.counts["failed_jobs"] += 1
        try:
            with self._on_compute():
                self._store(job)
        except Exception as again:
            self.failed[job.request_id] = again
        self._end(job)

    # -- taking in -------------------------------------------------------------------------------------------------------
    def take_in_done(self) -> None:
        for job in list(self.jobs.values()):
            try:
                is_done = job.ticket.is_done()
            except Exception as error:
                self._store_within(job, error)
                continue
            if is_done:
                self._end(job)

    def take_in_oldest(self) -> bool:
        """Let the compute stream wait for the job that began first; whether there is one."""
        for request_id in self.jobs:
            self.counts["waits"] += 1
            self.settle(request_id)
            return True
        return False

    def settle(self, request_id: str) -> None:
        """Let the compute stream wait for a request's job, if there is one."""
        if (job := self.jobs.get(request_id)) is None:
            return
        try:
            job.ticket.wait()
        except Exception as error:
            self._store_within(job, error)
        else:
            self._end(job)

    def forget(self, request_id: str, request: Request | None) -> None:
        """A request is about to give back its slot and blocks."""
        self.settle(request_id)
        self.failed.pop(request_id, None)
        if request is not None:
            self.room.leave(request.slot)

    def _end(self, job: Job) -> None:
        del self.jobs[job.request_id]
        self.room.leave(job.slot)
        self.counts["beside"] += job.steps_beside > 0
        job.sides.clear()
        if job.request_id not in self.failed:
            with self._on_compute():
                self._taken_in(job)

    def stats(self) -> dict[str, Any]:
        """What has become of finished prompts.

        lane: where they are stored. jobs: that it was given; under_way: not taken in yet; beside: not ended when a step of
        other requests was prepared. waits: times that steps had to wait, as there was nothing else to do. within: prompts
        stored within their step, for want of room or of an equaliser. failed_jobs: stored so after an error.
        waiting_tokens: of prompts, exact at this moment, of room_tokens at most.
        """
        names = ("jobs", "beside", "waits", "within", "failed_jobs")
        told = {"lane": self.lane.name, **{name: self.counts[name] for name in names}, "under_way": len(self.jobs)}
        return told | {"waiting_tokens": self.room.taken, "room_tokens": self.room.tokens}
