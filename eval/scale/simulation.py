"""The same card simulated, step by step and person by person: what the closed forms of plan.py leave out shows here."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

from hf_pqcache.eval.scale.plan import Card, Conversation, Use, fixed, transfer_of


@dataclass(frozen=True)
class Seen:
    """Averages over a simulated time: decoding at once, turns and seconds of the link's use a second; of a busy step."""

    decoding: float
    turns: float
    step: float
    link: float


def simulate(
    card: Card, one: Conversation, use: Use, conversations: int, tier: str = "device", *, seconds: float = 3600.0, seed: int = 0
) -> Seen:
    """People think for exponential times and ask; the link brings one conversation after the other; all that are there
    decode in step, and a step that begins answers also reads their questions. The first quarter is not counted.
    """
    random_ = random.Random(seed)
    transfer = transfer_of(card, one, tier)
    asking = [random_.expovariate(1 / use.think) for _ in range(conversations)]
    heapq.heapify(asking)
    arriving: list[float] = []  # moments at which conversations are on the card
    left: list[int] = []  # the step at which each answer ends
    now = link_free = link_used = 0.0
    steps = turns = busy = 0
    decoded = counted = 0.0
    begin = seconds / 4
    while now < seconds:
        while asking and asking[0] <= now:
            asked = heapq.heappop(asking)
            link_free = max(link_free, asked) + transfer
            link_used += transfer if now >= begin else 0.0
            heapq.heappush(arriving, link_free)
        new = 0
        while arriving and arriving[0] <= now:
            heapq.heappop(arriving)
            heapq.heappush(left, steps + use.answer)
            new += 1
        if not left:
            now = min([*asking[:1], *arriving[:1]])
            continue
        length = fixed(card) + one.launch + len(left) * one.attention + new * one.question
        if now >= begin:
            decoded, counted, busy = decoded + len(left) * length, counted + length, busy + 1
        now, steps = now + length, steps + 1
        while left and left[0] <= steps:
            heapq.heappop(left)
            turns += now >= begin
            heapq.heappush(asking, now + random_.expovariate(1 / use.think))
    measured = now - begin
    return Seen(decoded / measured, turns / measured, counted / max(1, busy), link_used / measured)
