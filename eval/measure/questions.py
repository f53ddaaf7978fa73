"""Examples with a prompt each -> predictions under a cache, journalled, and their mean score; knows no benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from hf_pqcache.eval.measure import shares
from hf_pqcache.eval.session.results import Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.models.names import cache_kwargs

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """prompt: ends where the answer begins. answers: what `score` wants of them. group: to tell scores apart by; or ""."""

    prompt: str
    answers: tuple[str, ...]
    group: str = ""


def first_of(examples: Sequence[T], limit: float | None) -> list[T]:
    """The first `limit` of them; of a number below 1 that share, one at least."""
    if limit is None:
        return list(examples)
    return list(examples[: max(1, math.ceil(limit * len(examples)))] if limit < 1 else examples[: int(limit)])


def token_ids(tokenizer: Any, text: str, max_tokens: int | None, use_chat: bool) -> torch.Tensor:
    """Token ids int64 (1, n) of a prompt, its middle cut out beyond `max_tokens`, then in the model's chat template."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    if max_tokens is not None and len(ids) > max_tokens:
        half = max_tokens // 2
        ids = ids[:half] + ids[len(ids) - (max_tokens - half) :]
        text = tokenizer.decode(ids, skip_special_tokens=True)
    if use_chat:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([ids])


@torch.inference_mode()
def predict(
    session: Session,
    name: str,
    key: str,
    questions: Sequence[Question],
    max_tokens: int | None,
    new_tokens: int,
    use_chat: bool,
) -> dict[int, str]:
    """Greedy answers of all questions, this process's share of them made here; kept beside the results, if these are."""
    model, tokenizer = session.model, session.tokenizer

    def answer(i: int) -> str:
        ids = token_ids(tokenizer, questions[i].prompt, max_tokens, use_chat).to(model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0,
            **cache_kwargs(session.cache.make(model, ids.shape[1] + new_tokens)),
        )
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    return shares.texts(session, key, len(questions), answer, name=name, unit="example")


def measure(
    session: Session,
    row: Row,
    questions: Sequence[Question],
    score: Callable[[str, Question], float],
    *,
    max_tokens: int | None,
    new_tokens: int,
    use_chat: bool = False,
) -> list[Row]:
    """`row` with the mean score, 0 to 100, and its standard error; where questions have groups, also a row for each."""
    groups = list(dict.fromkeys(q.group for q in questions if q.group))
    rows = [row, *(replace(row, settings={**row.settings, "group": group}) for group in groups)]
    scores: list[list[float]] = []

    def run() -> list[float]:
        texts = predict(session, row.task, row.key, questions, max_tokens, new_tokens, use_chat)
        all_scores = [100 * score(texts[i], question) for i, question in enumerate(questions)]
        scores.append(all_scores)
        for group in groups:
            scores.append([s for s, q in zip(all_scores, questions, strict=True) if q.group == group])
        return [math.fsum(part) / len(part) for part in scores]

    return session.measure(rows, run, errors=lambda: [stderr(part) for part in scores])


def stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))
