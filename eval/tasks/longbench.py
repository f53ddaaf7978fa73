"""The tasks of LongBench (Bai et al. 2023): 21, and the 13 of LongBench-E with their scores by length."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_pqcache.eval.measure import longbench, shares
from hf_pqcache.eval.measure.longbench_scores import first_line, score
from hf_pqcache.eval.measure.questions import first_of, stderr
from hf_pqcache.eval.session import hub_data
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.models.positions import check_positions, max_positions

NAMES = (
    *("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh", "hotpotqa", "2wikimqa", "musique", "dureader"),
    *("gov_report", "qmsum", "multi_news", "vcsum", "trec", "triviaqa", "samsum", "lsht"),
    *("passage_count", "passage_retrieval_en", "passage_retrieval_zh", "lcc", "repobench-p"),
)
NAMES_E = (
    *("qasper_e", "multifieldqa_en_e", "hotpotqa_e", "2wikimqa_e", "gov_report_e", "multi_news_e", "trec_e"),
    *("triviaqa_e", "samsum_e", "passage_count_e", "passage_retrieval_en_e", "lcc_e", "repobench-p_e"),
)
#: Groups of length of LongBench-E: from so many words (inclusive) to so many.
LENGTHS_E = {"0-4k": (0, 4000), "4-8k": (4000, 8000), "8k+": (8000, 1 << 60)}


@dataclass(frozen=True)
class LongBenchTask:
    """One data set. `version` is that of this file; the harness's own is one of a row's settings."""

    dataset: str
    version: str = "1"

    @property
    def name(self) -> str:
        return f"longbench/{self.dataset}"

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
        """Score 0 to 100 over the examples and its standard error; of an _e set also the scores by length.

        Every prediction is journalled beside the results; a run that was killed goes on where it stopped. Several
        processes (`accelerate launch`) share the examples.

        Args:
            limit: first examples only; below 1 a share of them.
            max_tokens: of a prompt, its middle is cut out beyond; None means what the model's context leaves.
            max_new_tokens: upper bound to the official length of an answer; None means none.
            use_chat: wrap prompts in the model's chat template where the official runs do; None means if it has one.
        """
        described = longbench.spec(self.dataset)
        new_tokens = min(described.max_new_tokens, max_new_tokens or described.max_new_tokens)
        asked: dict[str, Any] = {"max_tokens": max_tokens, "max_new_tokens": max_new_tokens, "use_chat": use_chat}
        max_tokens = self.check(max_positions(session.model.config), session.tokenizer, data_dir=data_dir, **asked)
        chat = bool(getattr(session.tokenizer, "chat_template", None)) if use_chat is None else use_chat
        data = first_of(longbench.examples(self.dataset, data_dir), limit)
        digest = hashlib.sha256("\0".join(x["context"] for x in data).encode()).hexdigest()[:16]
        settings: dict[str, Any] = {"examples": len(data), "contexts_sha256": digest}
        settings |= {"max_tokens": max_tokens, "max_new_tokens": new_tokens, "chat": chat}
        metric = described.metric.removesuffix("_score")
        row = session.row(self.name, self.version, metric, **settings, harness_version=described.version)
        groups = LENGTHS_E if self.dataset.endswith("_e") else {}
        rows = [row, *(replace(row, settings={**row.settings, "length": name}) for name in groups)]

        parts: list[list[float]] = []

        def run() -> list[float]:
            texts = self._predict(session, data, row.key, max_tokens, new_tokens, chat)
            scores = [self._score(described.metric, example, texts[i]) for i, example in enumerate(data)]
            ranges = [(0, 1 << 60), *groups.values()]
            for a, b in ranges:
                parts.append([100 * s for s, x in zip(scores, data, strict=True) if a <= int(x["length"]) < b])
            return [sum(part) / len(part) if part else float("nan") for part in parts]

        return session.measure(rows, run, errors=lambda: [stderr(part) for part in parts])

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
        """Tokens of a prompt, as `run` takes them for the same options and a model that holds `context` tokens.

        Raises ImportError without the harness, FileNotFoundError if data_dir lacks the examples, OSError without it and without
        the Hub, ValueError for a prompt
        that the model cannot hold and for use_chat without a template.
        """
        described = longbench.spec(self.dataset)
        new_tokens = min(described.max_new_tokens, max_new_tokens or described.max_new_tokens)
        if data_dir is not None:
            longbench.examples_file(self.dataset, data_dir)
        else:
            hub_data.load(described.path, described.config, split="test")
        if use_chat and not getattr(tokenizer, "chat_template", None):
            raise ValueError("the model's tokenizer has no chat template: leave --chat out")
        found = max_tokens or self.room(context or 2048)
        check_positions(found + new_tokens, context, f"{self.name} with {new_tokens} new tokens", "the prompt's length")
        return found

    def room(self, context: int) -> int:
        """Tokens of a prompt that leave room for the answer and a chat template in a context of so many."""
        return max(2, context - longbench.spec(self.dataset).max_new_tokens - 64)

    def _score(self, metric: str, example: dict[str, Any], prediction: str) -> float:
        return score(metric, first_line(self.dataset, prediction), example["answers"], example.get("all_classes"))

    def _predict(
        self, session: Session, data: list[dict[str, Any]], key: str, max_tokens: int, new_tokens: int, chat: bool
    ) -> dict[int, str]:
        """Predictions of all examples, this process's share of them made here."""

        def predict(i: int) -> str:
            text = longbench.prompt(self.dataset, data[i])
            ids = longbench.prompt_ids(session.tokenizer, text, self.dataset, max_tokens, chat)
            cache = session.cache.make(session.model, ids.shape[1] + new_tokens)
            return longbench.answer(session.model, session.tokenizer, ids, self.dataset, new_tokens, cache)

        return shares.texts(session, key, len(data), predict, name=self.name, unit="example")


tasks = tuple(LongBenchTask(name) for name in (*NAMES, *NAMES_E))
