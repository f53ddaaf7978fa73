"""Figures of requests that were served: throughput, time to tokens, goodput; knows no engine and no HTTP."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Served:
    """One request; moments in seconds of one clock.

    Attributes:
        begun: when it was sent. tokens: when each token of its answer came. error: why it failed.
    """

    prompt_tokens: int
    begun: float
    tokens: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.begun

    @property
    def tpot(self) -> float:
        """Seconds between two tokens after the first, on average."""
        return (self.tokens[-1] - self.tokens[0]) / max(1, len(self.tokens) - 1)


@dataclass(frozen=True)
class Goal:
    """What a request has to keep to count as good: milliseconds to its first token, and between later ones."""

    ttft_ms: float = 2000.0
    tpot_ms: float = 50.0


def figures(requests: Sequence[Served], goal: Goal) -> dict[str, Any]:
    """What rows tell of requests; prompt tokens are no part of `throughput_tok_s`.

    Returns:
        throughput_tok_s: generated tokens over the time from the first request to the last token; total_tok_s: with prompts.
        decode_tok_s: the same while all requests were generating, None if they never all were.
        goodput_req_s: requests that kept the goal. ttft, tpot, itl (gaps of all requests): _p50_ms, _p99_ms.
        failed: number of requests with an error, and the first one's.
    """
    good = [request for request in requests if request.error is None and request.tokens]
    failed = [request.error for request in requests if request.error is not None]
    row: dict[str, Any] = {"requests": len(requests), "failed": len(failed), **({"error": failed[0]} if failed else {})}
    if not good:
        return row
    seconds = max(request.tokens[-1] for request in good) - min(request.begun for request in good)
    generated = sum(len(request.tokens) for request in good)
    kept = [r for r in good if r.ttft * 1e3 <= goal.ttft_ms and r.tpot * 1e3 <= goal.tpot_ms]
    row |= {
        "seconds": seconds,
        "throughput_tok_s": generated / seconds,
        "total_tok_s": (generated + sum(request.prompt_tokens for request in good)) / seconds,
        "decode_tok_s": decode_rate(good),
        "goodput_req_s": len(kept) / seconds,
        "goal_ttft_ms": goal.ttft_ms,
        "goal_tpot_ms": goal.tpot_ms,
    }
    gaps = [after - before for request in good for before, after in pairwise(request.tokens)]
    for name, found in (("ttft", [r.ttft for r in good]), ("tpot", [r.tpot for r in good]), ("itl", gaps)):
        if found:
            row |= {f"{name}_p{p}_ms": 1e3 * percentile(found, p / 100) for p in (50, 99)}
    return row


def decode_rate(requests: Sequence[Served]) -> float | None:
    """Tokens a second from when the last request has its first token until the first one ends."""
    begin, end = max(request.tokens[0] for request in requests), min(request.tokens[-1] for request in requests)
    if end <= begin:
        return None
    return sum(begin < moment <= end for request in requests for moment in request.tokens) / (end - begin)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]
