"""Task recall: pass keys over depth and length, the sharpest test of a compressed cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from hf_pqcache.eval.measure.recall import ANSWER_TOKENS, check_recall, recall_at
from hf_pqcache.eval.session.models import token_ids
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.models.positions import max_positions

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class RecallTask:
    name: str = "recall"
    version: str = "1"

    def run(
        self,
        session: Session,
        text: str,
        *,
        lengths: Sequence[int],
        depths: Sequence[float] = DEPTHS,
        count: int = 4,
        question_after: bool = False,
    ) -> list[Row]:
        """One row for every length and depth: the share of `count` pass keys that greedy decoding gives back.

        Args:
            text: what they are hidden in, of at least the greatest length.
            question_after: see `recall_at`.

        Raises ValueError, before anything is measured, for lengths and depths that mean nothing; see `check_recall`.
        """
        filler = token_ids(session.tokenizer, text)
        check_recall(session.tokenizer, filler, lengths, depths, max_positions(session.model.config))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        done: list[Row] = []
        cells = [(tokens, depth) for tokens in lengths for depth in depths]
        for tokens, depth in tqdm(cells, desc="recall", unit="cell", disable=not session.progress, leave=False):
            told: dict[str, Any] = {"tokens": tokens, "depth": depth, "count": count, "text_sha256": digest}
            told |= {"question": "after"} if question_after else {}
            row = session.row(self.name, self.version, "recall", **told)

            def run(tokens: int = tokens, depth: float = depth) -> list[float]:
                make = session.cache.make
                found = recall_at(
                    session.model,
                    session.tokenizer,
                    filler,
                    lambda: make(session.model, tokens + ANSWER_TOKENS),
                    tokens=tokens,
                    depths=[depth] * count,
                    seed=session.seed,
                    question_after=question_after,
                )
                return [sum(found) / count]

            done += session.measure([row], run)
        return done


task = RecallTask()
