"""What the server tells Prometheus; knows neither HTTP nor the engine's inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psutil
import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PER_TOKEN_S = (0.002, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
REQUEST_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = tuple(float(4**n) for n in range(11))
#: Gauges of `Engine.state`, and what they are.
GAUGES = {
    "waiting": ("pqcache_requests_waiting", "Requests that wait for room in a batch"),
    "running": ("pqcache_requests_running", "Requests that the engine works on"),
    "blocks_used": ("pqcache_blocks_used", "Blocks of the pool that hold tokens of requests"),
    "blocks_free": ("pqcache_blocks_free", "Blocks of the pool that are free"),
    "slots_used": ("pqcache_slots_used", "Requests that have an exact window"),
    "slots_free": ("pqcache_slots_free", "Exact windows that no request has"),
    "owned_bytes": ("pqcache_request_bytes", "Bytes of blocks and exact windows that requests have"),
    "empty_bytes": ("pqcache_request_empty_bytes", "Of these, bytes that hold no token yet: half-filled windows and blocks"),
    "image_tokens": ("pqcache_image_tokens", "Tokens of images that are remembered"),
    "image_tokens_held": ("pqcache_image_tokens_held", "Of these, tokens that requests under way may look at"),
    "image_room": ("pqcache_image_tokens_room", "Tokens of images that there is room for"),
    "pool_bytes": ("pqcache_pool_bytes", "Bytes of the pool, whatever it holds"),
    "process_bytes": ("pqcache_process_memory_bytes", "Memory of the process on the host"),
    "allocated_bytes": ("pqcache_gpu_memory_allocated_bytes", "Memory of the GPU that tensors have"),
    "reserved_bytes": ("pqcache_gpu_memory_reserved_bytes", "Memory of the GPU that torch holds; the rest of it is fragments"),
}

#: Counters of the same.
COUNTERS = {
    "prefix_hits": ("pqcache_prefix_hit_tokens", "Tokens of prompts that were stored already"),
    "stored_beside": ("pqcache_prompts_stored_beside", "Prompts that were stored beside steps of other requests"),
    "imported_tokens": ("pqcache_prefix_imported_tokens", "Tokens of prefixes that came from another replica, or a file"),
    "imported_bytes": ("pqcache_prefix_imported_bytes", "Bytes of their blocks"),
    "exported_tokens": ("pqcache_prefix_exported_tokens", "Tokens of prefixes that were handed over, or saved"),
    "exported_bytes": ("pqcache_prefix_exported_bytes", "Bytes of their blocks"),
    "refused_imports": ("pqcache_prefix_imports_refused", "Times that prefixes from elsewhere did not fit here"),
    "pruned_tokens": ("pqcache_pruned_tokens", "Tokens of prompts that a press has taken away"),
}


def _memory() -> dict[str, float]:
    found: dict[str, float] = {"process_bytes": psutil.Process().memory_info().rss}
    if torch.cuda.is_initialized():
        found |= {"allocated_bytes": torch.cuda.memory_allocated(), "reserved_bytes": torch.cuda.memory_reserved()}
    return found


class Metrics:
    """All figures of one server, in a registry of its own.

    Args:
        state, facts: `Engine.state` and `Engine.facts`, asked when the figures are; {} while there is no engine.
    """

    def __init__(self, state: Callable[[], dict[str, float]], facts: Callable[[], dict[str, str]] = dict) -> None:
        self.registry = CollectorRegistry()
        self.state, self.facts = state, facts

        def histogram(name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, told, buckets=buckets, registry=self.registry)

        def counter(name: str, told: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, told, labels, registry=self.registry)

        self.first_token = histogram("pqcache_time_to_first_token_seconds", "From arrival to first token", FIRST_TOKEN_S)
        self.per_token = histogram("pqcache_time_per_output_token_seconds", "Mean time of later tokens", PER_TOKEN_S)
        self.request = histogram("pqcache_request_seconds", "From arrival to last token", REQUEST_S)
        self.prompt_length = histogram("pqcache_request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self.prompt_tokens = counter("pqcache_prompt_tokens", "Tokens of all prompts")
        self.generated_tokens = counter("pqcache_generated_tokens", "Tokens of all answers")
        self.requests = counter("pqcache_requests", "Requests by how they ended", ("outcome",))
        self.responses = counter("pqcache_http_responses", "HTTP answers", ("path", "status"))
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Metric]:
        found = {**self.state(), **_memory()}
        for key, (name, told) in GAUGES.items():
            if key in found:
                yield GaugeMetricFamily(name, told, value=found[key])
        for key, (name, told) in COUNTERS.items():
            if key in found:
                yield CounterMetricFamily(name, told, value=found[key])
        if facts := self.facts():
            yield InfoMetricFamily("pqcache_engine", "What requests are kept as", value=facts)

    def describe(self) -> list[Metric]:
        return []

    def ended(self, outcome: str, arrival: float, first: float | None, last: float, tokens: int) -> None:
        """A request is over; moments in seconds of one clock."""
        self.requests.labels(outcome).inc()
        self.generated_tokens.inc(tokens)
        if first is None:
            return
        self.first_token.observe(first - arrival)
        self.request.observe(last - arrival)
        if tokens > 1:
            self.per_token.observe((last - first) / (tokens - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)
