"""Task memory: bytes over the length of a sequence, by the allocator on CUDA and by the cache's own count anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from hf_pqcache.eval.memory import Memory, measure_memory
from hf_pqcache.eval.results import Row
from hf_pqcache.eval.session import Session
from hf_pqcache.eval.tasks.speed import LENGTHS


@dataclass(frozen=True)
class MemoryTask:
    name: str = "memory"
    version: str = "1"

    def run(self, session: Session, *, lengths: Sequence[int] = LENGTHS, batch: int = 1) -> list[Row]:
        """Rows of every length: kv_bytes (codebooks left out), codebook_bytes, and on CUDA peak_bytes."""
        done: list[Row] = []
        on_cuda = session.device.type == "cuda"
        for tokens in tqdm(lengths, desc="memory", unit="length", disable=not session.progress, leave=False):
            metrics = ("kv_bytes", "codebook_bytes", *(("peak_bytes",) if on_cuda else ()))
            rows = [session.row(self.name, self.version, metric, "bytes", tokens=tokens, batch=batch) for metric in metrics]
            if on_cuda:
                settings = {**rows[2].settings, "device": session.device_name}
                rows[2] = replace(rows[2], settings=settings)
            found: list[Memory] = []

            def run(tokens: int = tokens, found: list[Memory] = found) -> list[float]:
                room = tokens + 4
                found += [
                    measure_memory(
                        session.model, lambda: session.cache.make(session.model, room, batch), tokens=tokens, batch=batch
                    )
                ]
                memory = found[0]
                return [
                    memory.cache.tokens,
                    memory.cache.shared,
                    *([memory.peak_bytes] if memory.peak_bytes is not None else []),
                ]

            def bits(found: list[Memory] = found) -> float | None:
                return found[0].cache.bits

            done += session.measure(rows, run, true_bits=bits)
        return done


task = MemoryTask()
