"""transformers' schedulers, which fail a request that can never be served alone and at once; they schedule nothing themselves.

They inherit from `scheduler.py` of transformers 5.20 to 5.24; `support.py` checks its signatures before.
"""

from __future__ import annotations

from typing import Any

from transformers.generation.continuous_batching import scheduler

from hf_pqcache.errors import PagesExhaustedError


class _Refusing:
    """What our schedulers do besides: a request that can never be served fails alone, and at once."""

    cache: Any
    processor: Any = None

    def add_waiting_request(self, state: Any) -> None:
        # The end of a text without a limit is not known; it fails when it has outgrown the pool.
        new = state.max_new_tokens or 1
        if not state.generated_tokens and (why := self.cache.why_unfit(len(state.initial_tokens), new)):
            raise PagesExhaustedError(why)
        if not state.initial_tokens:
            raise ValueError("the prompt is empty: a request needs at least one token")
        if state.num_children and len(state.initial_tokens) == 1:  # the engine forks before the last token: there is none
            children, state.num_children = state.num_children, 0
            for i in range(children):
                child = state.create_equivalent_initial_request()
                child.request_id = f"{state.request_id}__child#{i}"
                super().add_waiting_request(child)  # type: ignore[misc]
        super().add_waiting_request(state)  # type: ignore[misc]

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple[Any, bool, int, int]:
        while True:
            found, is_decode, *counts = super().schedule_batch(token_budget, cache_budget)  # type: ignore[misc]
            if found is None and (self.cache.evict_cached_blocks() or self._fail_the_hopeless()):
                continue
            # The last token of a prompt comes alone, too.
            is_decode = is_decode and not any(self.cache.is_in_prompt(request.state.request_id) for request in found or ())
            return found, is_decode, *counts

    def _fail_the_hopeless(self) -> bool:
        """Fail requests that have outgrown the pool though nothing else is in it."""
        active: dict[str, Any] = self.active_requests  # type: ignore[attr-defined]
        if len(active) != 1 or not self.starved_requests:  # type: ignore[attr-defined]
            return False
        (state,) = active.values()
        why = f"the request has grown to {state.current_len()} tokens, all that the blocks have room for"
        self.processor._handle_request_error(PagesExhaustedError(why), state)
        self.finish_request(state.request_id)  # type: ignore[attr-defined]
        return True


class FIFOScheduler(_Refusing, scheduler.FIFOScheduler):
    """transformers' scheduler of that name."""


class PrefillFirstScheduler(_Refusing, scheduler.PrefillFirstScheduler):
    """transformers' scheduler of that name."""


#: scheduler_type of a ContinuousBatchingConfig -> ours.
SCHEDULERS: dict[str, Any] = {"fifo": FIFOScheduler, "prefill_first": PrefillFirstScheduler}
