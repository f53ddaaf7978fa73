"""Task recall: pass keys over depth and length, the sharpest test of a compressed cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from hf_pqcache.eval.measure import shares
from hf_pqcache.eval.measure.recall import ANSWER_TOKENS, check_recall, recall_at
from hf_pqcache.eval.session import distributed
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
        cells = [(tokens, depth) for tokens in lengths for depth in depths]
        rows = []
        for tokens, depth in cells:
            told: dict[str, Any] = {"tokens": tokens, "depth": depth, "count": count, "text_sha256": digest}
            told |= {"question": "after"} if question_after else {}
            rows.append(session.row(self.name, self.version, "recall", **told))

        def share(i: int) -> float:
            tokens, depth = cells[i]
            found = recall_at(
                session.model,
                session.tokenizer,
                filler,
                lambda: session.cache.make(session.model, tokens + ANSWER_TOKENS),
                tokens=tokens,
                depths=[depth] * count,
                seed=session.seed,
                question_after=question_after,
            )
            return sum(found) / count

        def value(i: int) -> float:
            is_known = rows[i].key in session.results and not session.force
            return session.results[rows[i].key].value if is_known else share(i)

        if distributed.world()[1] > 1:
            values = shares.figures(session, [row.key for row in rows], name="recall", unit="cell")(len(rows), value)
            return [session.measure([row], partial(list, [found]))[0] for row, found in zip(rows, values, strict=True)]
        bar = tqdm(list(enumerate(rows)), desc="recall", unit="cell", disable=not session.progress, leave=False)
        return [session.measure([row], lambda i=i: [share(i)])[0] for i, row in bar]  # type: ignore[misc]


task = RecallTask()
