"""transformers' schedulers, which leave out prompts that are being stored, and fail a request that can never be served.

They schedule nothing themselves.

They inherit from `scheduler.py` of transformers 5.20 to 5.24; `support.py` checks its signatures before.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from transformers.generation.continuous_batching import scheduler
from transformers.generation.continuous_batching.requests import RequestStatus

from hf_pqcache.errors import PagesExhaustedError


class _Besides:
    """What our schedulers do besides: a request that can never be served fails alone, and at once; one whose prompt is being
    stored takes no step before that is done."""

    cache: Any
    processor: Any = None
    images: Any = None
    _leaving: list[Any]
    active_requests: dict[str, Any]
    block_new_requests: bool

    def add_waiting_request(self, state: Any) -> None:
        # The end of a text without a limit is not known; it fails when it has outgrown the pool.
        new = state.max_new_tokens or 1
        if not state.generated_tokens and (why := self.cache.why_unfit(len(state.initial_tokens), new)):
            raise PagesExhaustedError(why)
        if not state.initial_tokens:
            raise ValueError("the prompt is empty: a request needs at least one token")
        if self.images is not None:
            state.held_images = self.images.hold(state.initial_tokens)
        if state.num_children and len(state.initial_tokens) == 1:  # the engine forks before the last token: there is none
            children, state.num_children = state.num_children, 0
            for i in range(children):
                child = state.create_equivalent_initial_request()
                child.request_id = f"{state.request_id}__child#{i}"
                super().add_waiting_request(child)  # type: ignore[misc]
        super().add_waiting_request(state)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._leaving = []

    def finish_request(self, request_id: str) -> None:
        if (state := self.active_requests.get(request_id)) is not None:
            self._leaving.append(vars(state).pop("held_images", None))  # a soft reset asks for them at once
        super().finish_request(request_id)  # type: ignore[misc]

    def clear_cancelled_requests(self) -> list[Any]:
        """The engine asks in each of its rounds, without requests, too; it may have the states of its last step for long."""
        self._leaving.clear()
        found: list[Any] = super().clear_cancelled_requests()  # type: ignore[misc]
        for state in found:
            vars(state).pop("held_images", None)
        return found

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[Any, bool, int, int]:
        compression = self.cache.compression
        while True:
            compression.take_in_done()
            self._fail_the_unstored()
            found, is_decode, *counts = self._schedule_others(compression.jobs, token_budget, cache_budget)
            if not found and compression.take_in_oldest():
                continue
            if found is None and (self.cache.evict_cached_blocks() or self._fail_the_hopeless()):
                continue
            compression.another_step()
            # The last token of a prompt comes alone, too.
            is_decode = is_decode and not any(self.cache.is_in_prompt(request.state.request_id) for request in found or ())
            return found, is_decode, *counts

    def _schedule_others(self, under_way: Container[str], token_budget: int, cache_budget: int) -> tuple[Any, ...]:
        """As without the requests that are under way elsewhere, which keep their place in line."""
        everyone = self.active_requests
        if not everyone:  # the engine lets new ones in again when one that is active finishes: here all were cancelled
            self.block_new_requests = False
        self.active_requests = {name: state for name, state in everyone.items() if name not in under_way}
        try:
            return super().schedule_batch(token_budget, cache_budget)  # type: ignore[misc, no-any-return]
        finally:
            self.active_requests = everyone | self.active_requests

    def _fail_the_unstored(self) -> None:
        """Fail requests whose prompts could not be stored."""
        for request_id, error in list(self.cache.compression.failed.items()):
            self._fail(self.active_requests[request_id], error)

    def _fail_the_hopeless(self) -> bool:
        """Fail requests that have outgrown the pool though nothing else is in it."""
        if len(self.active_requests) != 1 or not self.starved_requests:  # type: ignore[attr-defined]
            return False
        (state,) = self.active_requests.values()
        why = f"the request has grown to {state.current_len()} tokens, all that the blocks have room for"
        self._fail(state, PagesExhaustedError(why))
        return True

    def _fail(self, state: Any, error: Exception) -> None:
        self.processor._handle_request_error(error, state)
        self.finish_request(state.request_id)  # type: ignore[attr-defined]
        # With asynchronous batching its last step may be under way, and the engine passes over what is finished only.
        state._status = RequestStatus.FINISHED


class FIFOScheduler(_Besides, scheduler.FIFOScheduler):
    """transformers' scheduler of that name."""


class PrefillFirstScheduler(_Besides, scheduler.PrefillFirstScheduler):
    """transformers' scheduler of that name."""


#: scheduler_type of a ContinuousBatchingConfig -> ours.
SCHEDULERS: dict[str, Any] = {"fifo": FIFOScheduler, "prefill_first": PrefillFirstScheduler}
