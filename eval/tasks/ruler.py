"""RULER (Hsieh et al. 2024) for any tokenizer and length: synthetic tasks, made here, and questions over documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_pqcache import demo
from hf_pqcache.eval.measure import questions, ruler, ruler_qa
from hf_pqcache.eval.measure.lengths import lengths_within
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session


@dataclass(frozen=True)
class RulerTask:
    kind: str
    version: str = "1"

    @property
    def name(self) -> str:
        return f"ruler/{self.kind}"

    @property
    def reads_data(self) -> bool:
        return self.kind in ruler_qa.SOURCES

    def check(
        self,
        context: int | None,
        tokenizer: Any = None,
        *,
        lengths: Sequence[int] | None = None,
        max_tokens: int | None = None,
        data_dir: Path | None = None,
        limit: int | None = None,
    ) -> list[int]:
        """The lengths of prompt and answer together, as `run` takes them, for a model that holds `context` tokens.

        Raises ValueError for a length that the model cannot hold; for questions FileNotFoundError if data_dir lacks them,
        OSError without the Hub.
        """
        if self.reads_data:
            ruler_qa.corpus(self.kind, data_dir)
        asked = lengths if lengths is not None else None if max_tokens is None else (max_tokens,)
        return lengths_within(context, asked, 0, self.name, offered=(4096,))

    def run(
        self,
        session: Session,
        *,
        lengths: Sequence[int] | None = None,
        max_tokens: Sequence[int] | int | None = None,
        limit: int | None = None,
        text: str | None = None,
        data_dir: Path | None = None,
    ) -> list[Row]:
        """One row a length: the mean share of right answers that appear, 0 to 100, and its standard error.

        Args:
            lengths: tokens of prompt and answer together; `max_tokens` is another name for them.
            data_dir: folder with the plain files of questions; None asks the Hub.
            limit: examples; None is 20. text: haystack of the tasks that hide needles in text; None is the articles.
        """
        given = lengths if lengths is not None else [max_tokens] if isinstance(max_tokens, int) else max_tokens
        make, most, score, metric = self._recipe(data_dir)
        haystack, count = text or demo.TEXT.read_text(encoding="utf-8").replace("<|endoftext|>", " "), int(limit or 20)
        digest = hashlib.sha256(("" if self.reads_data else haystack).encode()).hexdigest()[:16]
        rows: list[Row] = []
        for tokens in given or (4096,):
            row = session.row(self.name, self.version, metric, length=tokens, examples=count, text_sha256=digest)
            if not session.force and row.key in session.results:
                rows.append(session.results[row.key])
                continue
            new_tokens = min(most, max(8, tokens // 8))
            made = ruler.fitted(self.kind, make, session.tokenizer, tokens - new_tokens, count, session.seed, haystack)
            asked = [questions.Question(example.prompt, example.answers) for example in made]
            rows += questions.measure(
                session,
                row,
                asked,
                lambda prediction, question: score(prediction, question.answers),
                max_tokens=None,
                new_tokens=new_tokens,
            )
        return rows

    def _recipe(self, data_dir: Path | None) -> tuple[ruler.Make, int, Callable[[str, tuple[str, ...]], float], str]:
        """(how examples are made, most tokens of an answer, how that is scored, what the score is called)."""
        if self.reads_data:
            return ruler_qa.make(ruler_qa.corpus(self.kind, data_dir)), ruler_qa.NEW_TOKENS, ruler_qa.score, "string_match_part"
        kind = ruler.KINDS[self.kind]
        return kind.make, kind.new_tokens, ruler.score, "string_match"


tasks = tuple(RulerTask(kind) for kind in (*ruler.KINDS, *ruler_qa.SOURCES))
