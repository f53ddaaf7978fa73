"""One HTTP request's answers while they are made: choices in the engine, their texts, how each ends; knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hf_pqcache.serve import log
from hf_pqcache.serve.engine import Engine
from hf_pqcache.serve.errors import ApiError
from hf_pqcache.serve.metrics import Metrics
from hf_pqcache.serve.sampling import Sampling
from hf_pqcache.serve.text import TextStream


class Event(NamedTuple):
    """New text of a choice, and why it ended ("stop", "length") if it did."""

    choice: int
    text: str
    finish: str | None


@dataclass(eq=False)
class Choice:
    """One answer."""

    index: int
    ids: list[int]
    max_tokens: int
    sampling: Sampling
    text: TextStream
    name: str | None = None
    said: list[int] = field(default_factory=list)
    first: float | None = None
    last: float = 0.0
    is_over: bool = False

    @property
    def tokens(self) -> int:
        return len(self.said)


class Run:
    """All choices of a request.

    Args:
        is_streaming: whether texts are wanted as they are made. arrival: when the request came, `time.perf_counter`.

    Attributes:
        tells_silence: whether tokens that bring no text yet are events, too. key: by which routers know how it begins.
        images: what keeps those of its prompt.
    """

    def __init__(self, engine: Engine, metrics: Metrics, choices: list[Choice], is_streaming: bool, arrival: float) -> None:
        self.engine, self.metrics, self.choices = engine, metrics, choices
        self.hears_tokens = is_streaming or any(choice.text.stops for choice in choices)
        self.queue: asyncio.Queue[tuple[Choice, Any] | ApiError] = asyncio.Queue()
        self.arrival = arrival
        self.tells_silence = False
        self.key: str | None = None
        self.images: Any = None

    @property
    def tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    @property
    def open_choices(self) -> int:
        return sum(not choice.is_over for choice in self.choices)

    async def events(self) -> AsyncIterator[Event]:
        """Texts of all choices as they come. Raises ApiError if the engine fails one of them: the others end, too."""
        for choice in self.choices:
            await self._submit(choice)
        while self.open_choices:
            found = await self.queue.get()
            if isinstance(found, ApiError):
                raise found
            choice, output = found
            if not choice.is_over and (event := self._heard(choice, output)) is not None:
                yield event

    def abort(self, error: ApiError) -> None:
        """Let `events` raise."""
        self.queue.put_nowait(error)

    def close(self, outcome: str = "cancelled") -> None:
        """Cancel what has not ended. Call it whatever happens; more than once does no harm."""
        for choice in self.choices:
            if not choice.is_over and choice.name is not None:
                self.engine.cancel(choice.name)
            self._end(choice, outcome)

    async def _submit(self, choice: Choice) -> None:
        def hear(output: Any) -> None:
            self.queue.put_nowait((choice, output))

        choice.name = await self.engine.submit(choice.ids, choice.max_tokens, choice.sampling, hear, self.hears_tokens)
        if choice.name is None:
            raise ApiError(503, "the engine takes no more requests; ask again once the server has been restarted")

    def _heard(self, choice: Choice, output: Any) -> Event | None:
        if output.error is not None:
            self._end(choice, "error")
            is_too_long = "PQC001" in output.error
            raise ApiError(400 if is_too_long else 500, output.error, code="context_length_exceeded" if is_too_long else None)
        choice.last = time.perf_counter()
        moments = output.timestamps or [choice.last]
        new = output.generated_tokens[choice.tokens :]
        if choice.first is None and new:
            choice.first = moments[0]
        is_ended = output.is_finished()
        text = ""
        for position, token in enumerate(new):
            choice.said.append(token)
            is_end = is_ended and position == len(new) - 1 and token in choice.sampling.ends
            text += "" if is_end else choice.text.add(token)
            if choice.text.is_stopped:
                self._stop(choice, is_ended)
                return Event(choice.index, text, "stop")
        if is_ended:
            text += choice.text.flush()
            is_length = not choice.text.is_stopped and not (new and new[-1] in choice.sampling.ends)
            finish = "length" if is_length else "stop"
            self._end(choice, finish)
            return Event(choice.index, text, finish)
        return Event(choice.index, text, None) if text or self.tells_silence else None

    def _stop(self, choice: Choice, is_ended: bool) -> None:
        if not is_ended and choice.name is not None:
            self.engine.cancel(choice.name)
        self._end(choice, "stop")

    def _end(self, choice: Choice, outcome: str) -> None:
        if not choice.is_over:
            choice.is_over = True
            if choice.said:
                self.engine.recent.note(self.key, [*choice.ids, *choice.said])
            self.metrics.ended(outcome, self.arrival, choice.first, choice.last, choice.tokens)
            first = None if choice.first is None else choice.first - self.arrival
            counts = {"prompt_tokens": len(choice.ids), "tokens": choice.tokens}
            log.tell("request", outcome=outcome, **counts, first_s=first, seconds=time.perf_counter() - self.arrival)
