"""Task speed: TTFT, TPOT and tokens/s over prompt lengths; MILLION calls its prompts `_synthetic`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from hf_pqcache.eval.measure.lengths import lengths_within
from hf_pqcache.eval.measure.speed import measure_speed
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.models.positions import max_positions


@dataclass(frozen=True)
class SpeedTask:
    name: str = "speed"
    version: str = "1"

    def run(
        self,
        session: Session,
        *,
        lengths: Sequence[int] | None = None,
        new_tokens: int = 64,
        batch: int = 1,
        repeats: int = 3,
        warmup: int = 1,
    ) -> list[Row]:
        """Three rows a length: ttft and tpot in ms, throughput in tokens/s. The device is one of the settings.

        lengths: of the prompt; None means those of 1K to 128K that the model can hold.
        """
        lengths = lengths_within(max_positions(session.model.config), lengths, new_tokens, "speed")
        done: list[Row] = []
        for tokens in tqdm(lengths, desc="speed", unit="length", disable=not session.progress, leave=False):
            settings: dict[str, Any] = {"tokens": tokens, "new_tokens": new_tokens, "batch": batch, "repeats": repeats}
            settings |= {"warmup": warmup, "device": session.device_name}
            metrics = (("ttft", "ms"), ("tpot", "ms"), ("throughput", "tokens/s"))
            rows = [session.row(self.name, self.version, metric, unit, **settings) for metric, unit in metrics]

            def run(tokens: int = tokens) -> list[float]:
                found = measure_speed(
                    session.model,
                    lambda: session.cache.make(session.model, tokens + new_tokens, batch),
                    prompt_tokens=tokens,
                    new_tokens=new_tokens,
                    batch=batch,
                    repeats=repeats,
                    warmup=warmup,
                    seed=session.seed,
                )
                return [found.ttft_ms, found.tpot_ms, found.tokens_per_s]

            done += session.measure(rows, run)
        return done


task = SpeedTask()
