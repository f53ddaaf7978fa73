"""Task breakdown: where the time of a decode step goes."""

from __future__ import annotations

from dataclasses import dataclass

from hf_pqcache.eval.measure.breakdown import STAGES, WARM_UP, measure_breakdown
from hf_pqcache.eval.measure.lengths import lengths_within
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.models.positions import max_positions


@dataclass(frozen=True)
class BreakdownTask:
    name: str = "breakdown"
    version: str = "1"

    def run(self, session: Session, *, tokens: int | None = None, batch: int = 1, steps: int = 16) -> list[Row]:
        """One row a stage in ms of one step; `clock` says whether CUDA events or the CPU's clock took the time.

        tokens: of the prompt; None means 2048, or what the model can hold.
        """
        limit, asked = max_positions(session.model.config), None if tokens is None else (tokens,)
        tokens = lengths_within(limit, asked, WARM_UP + steps, "a breakdown", offered=(2048,))[0]
        clock = "cuda_events" if session.device.type == "cuda" else "cpu_clock"
        settings = {"tokens": tokens, "batch": batch, "steps": steps, "clock": clock, "device": session.device_name}
        rows = [session.row(self.name, self.version, stage, "ms", **settings) for stage in STAGES]

        def run() -> list[float]:
            room = tokens + WARM_UP + steps
            found = measure_breakdown(
                session.model,
                lambda: session.cache.make(session.model, room, batch),
                tokens=tokens,
                batch=batch,
                steps=steps,
                seed=session.seed,
            )
            return [found[stage] for stage in STAGES]

        return session.measure(rows, run)


task = BreakdownTask()
