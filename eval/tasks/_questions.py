"""QuestionTask: a benchmark of questions over long contexts, from the Hub or a plain file; knows no particular one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_pqcache.eval.measure import questions
from hf_pqcache.eval.measure.questions import Question
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.models.positions import check_positions, max_positions

#: Tokens left to a chat template.
TEMPLATE = 64


@dataclass(frozen=True)
class QuestionTask:
    """A benchmark.

    Attributes:
        files: names of its plain file (JSON lines, or one JSON list). load: the Hub's examples.
        ask: an example -> its question. score: (prediction, question) -> 0 to 1. metric: what that is called.
        new_tokens: of an answer.
    """

    name: str
    version: str
    files: tuple[str, ...]
    load: Callable[[], Sequence[dict[str, Any]]]
    ask: Callable[[dict[str, Any]], Question]
    score: Callable[[str, Question], float]
    metric: str
    new_tokens: int

    def questions(self, data_dir: str | Path | None) -> list[Question]:
        """All of them. Raises FileNotFoundError if data_dir has no such file, OSError without the Hub."""
        if data_dir is None:
            return [self.ask(dict(example)) for example in self.load()]
        text = self._file(data_dir).read_text(encoding="utf-8")
        found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x.strip()]
        return [self.ask(example) for example in found]

    def _file(self, data_dir: str | Path) -> Path:
        family = self.name.partition("/")[0]
        for folder in (Path(data_dir), Path(data_dir, family), Path(data_dir, "data")):
            for name in self.files:
                if (folder / name).is_file():
                    return folder / name
        raise FileNotFoundError(f"{data_dir} holds no {' nor '.join(self.files)}, neither in itself nor in {family}/ or data/")

    def check(
        self,
        context: int | None,
        tokenizer: Any,
        *,
        data_dir: str | Path | None = None,
        limit: float | None = None,
        max_tokens: int | None = None,
        max_new_tokens: int | None = None,
        use_chat: bool | None = None,
    ) -> int:
        """Tokens of a prompt, as `run` takes them, for a model that holds `context` tokens (None: without an end).

        Raises FileNotFoundError if data_dir lacks the examples, OSError without it and without the Hub, ValueError for what the
        model or its tokenizer cannot do.
        """
        if data_dir is not None:
            self._file(data_dir)
        if use_chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError("the model's tokenizer has no chat template: leave --chat out")
        new = min(self.new_tokens, max_new_tokens or self.new_tokens)
        found = max_tokens or max(2, (context or 131072) - new - TEMPLATE)
        check_positions(found + new, context, f"{self.name} with {new} new tokens", "--max-length or --max-new-tokens")
        if data_dir is None:
            self.load()
        return found

    def run(
        self,
        session: Session,
        *,
        data_dir: str | Path | None = None,
        limit: float | None = None,
        max_tokens: int | None = None,
        max_new_tokens: int | None = None,
        use_chat: bool | None = None,
    ) -> list[Row]:
        """Mean score 0 to 100 with its standard error, and that of each group. Predictions are kept beside the results.

        Args:
            limit: first examples only, or below 1 a share of them. max_tokens: of a prompt; its middle is cut out beyond.
        """
        asked: dict[str, Any] = {"max_tokens": max_tokens, "max_new_tokens": max_new_tokens, "use_chat": use_chat}
        max_tokens = self.check(max_positions(session.model.config), session.tokenizer, data_dir=data_dir, **asked)
        new = min(self.new_tokens, max_new_tokens or self.new_tokens)
        chat = bool(getattr(session.tokenizer, "chat_template", None)) if use_chat is None else use_chat
        chosen = questions.first_of(self.questions(data_dir), limit)
        digest = hashlib.sha256("\0".join(q.prompt for q in chosen).encode()).hexdigest()[:16]
        settings: dict[str, Any] = {"examples": len(chosen), "max_tokens": max_tokens, "max_new_tokens": new, "chat": chat}
        row = session.row(self.name, self.version, self.metric, **settings, contexts_sha256=digest)
        return questions.measure(session, row, chosen, self.score, max_tokens=max_tokens, new_tokens=new, use_chat=chat)
