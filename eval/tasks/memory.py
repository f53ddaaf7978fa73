"""Task memory: bytes over the length of a sequence, by the allocator on CUDA and by the cache's own count anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm.auto import tqdm

from hf_pqcache.eval.measure.lengths import lengths_within
from hf_pqcache.eval.measure.memory import Memory, measure_memory
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.models.positions import max_positions

#: Decoded after the prompt, where the model has room for them.
NEW_TOKENS = 4


@dataclass(frozen=True)
class MemoryTask:
    name: str = "memory"
    version: str = "2"

    def run(self, session: Session, *, lengths: Sequence[int] | None = None, batch: int = 1) -> list[Row]:
        """Rows of every length: kv_bytes (used, codebooks left out), codebook_bytes, reserved_bytes (held for both), and on
        CUDA peak_bytes.

        lengths: of the prompt; None means those of 1K to 128K that the model can hold.
        """
        limit = max_positions(session.model.config)
        lengths = lengths_within(limit, lengths, 0, "memory")
        done: list[Row] = []
        on_cuda = session.device.type == "cuda"
        for tokens in tqdm(lengths, desc="memory", unit="length", disable=not session.progress, leave=False):
            metrics = ("kv_bytes", "codebook_bytes", "reserved_bytes", *(("peak_bytes",) if on_cuda else ()))
            rows = [session.row(self.name, self.version, metric, "bytes", tokens=tokens, batch=batch) for metric in metrics]
            if on_cuda:
                rows[-1] = replace(rows[-1], settings={**rows[-1].settings, "device": session.device_name})
            found: list[Memory] = []

            def run(tokens: int = tokens, found: list[Memory] = found) -> list[float]:
                more = NEW_TOKENS if limit is None else min(NEW_TOKENS, limit - tokens)

                def make() -> Any:
                    return session.cache.make(session.model, tokens + more, batch)

                found += [measure_memory(session.model, make, tokens=tokens, batch=batch, new_tokens=more)]
                memory = found[0]
                return [
                    memory.cache.tokens,
                    memory.cache.shared,
                    memory.cache.reserved,
                    *([memory.peak_bytes] if memory.peak_bytes is not None else []),
                ]

            def bits(found: list[Memory] = found) -> float | None:
                return found[0].cache.bits

            done += session.measure(rows, run, true_bits=bits)
        return done


task = MemoryTask()
