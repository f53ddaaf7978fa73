"""Task breakdown: where the time of a decode step goes."""

from __future__ import annotations

from dataclasses import dataclass

from hf_pqcache.eval.breakdown import STAGES, measure_breakdown
from hf_pqcache.eval.results import Row
from hf_pqcache.eval.session import Session


@dataclass(frozen=True)
class BreakdownTask:
    name: str = "breakdown"
    version: str = "1"

    def run(self, session: Session, *, tokens: int = 2048, batch: int = 1, steps: int = 16) -> list[Row]:
        """One row a stage in ms of one step; `clock` says whether CUDA events or the CPU's clock took the time."""
        clock = "cuda_events" if session.device.type == "cuda" else "cpu_clock"
        settings = {"tokens": tokens, "batch": batch, "steps": steps, "clock": clock, "device": session.device_name}
        rows = [session.row(self.name, self.version, stage, "ms", **settings) for stage in STAGES]

        def run() -> list[float]:
            room = tokens + steps + 8
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
