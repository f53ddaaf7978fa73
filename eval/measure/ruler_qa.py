"""RULER's question answering (Hsieh et al. 2024, section 3): SQuAD and HotpotQA among documents of other questions.

The data are plain files (`squad.json`, `hotpotqa.json`, as RULER downloads them) or the Hub's. Knows no cache.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hf_pqcache.eval.measure.ruler import Example, Make
from hf_pqcache.eval.session import hub_data

#: Task -> (plain file, data set on the Hub, its configuration).
SOURCES: dict[str, tuple[str, str, str | None]] = {
    # About one document.
    "qa_1": ("squad.json", "rajpurkar/squad_v2", None),
    # About two, told apart from eight that are alike.
    "qa_2": ("hotpotqa.json", "hotpotqa/hotpot_qa", "distractor"),
}
NEW_TOKENS = 32
_ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


@dataclass(frozen=True)
class Corpus:
    """documents: all different ones. questions: (question, answers, its documents)."""

    documents: list[str]
    questions: list[tuple[str, tuple[str, ...], tuple[int, ...]]]


def file_of(task: str, data_dir: str | Path) -> Path:
    """Where a folder has the task's data. Raises FileNotFoundError if it has none."""
    name = SOURCES[task][0]
    for folder in (Path(data_dir), Path(data_dir, "ruler"), Path(data_dir, "data")):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{data_dir} holds no {name}, neither in itself nor in ruler/ or data/")


@cache
def corpus(task: str, data_dir: Path | None = None) -> Corpus:
    """The questions of a task with their documents.

    Raises FileNotFoundError if data_dir lacks them, OSError without the Hub, ValueError for a file of another form.
    """
    read = _squad if task == "qa_1" else _hotpot
    if data_dir is None:
        _, path, config = SOURCES[task]
        return _collect(read([dict(row) for row in hub_data.load(path, config, split="validation")]))
    path_here = file_of(task, data_dir)
    try:
        document = json.loads(path_here.read_text(encoding="utf-8"))
        rows = _flat(document["data"]) if isinstance(document, dict) else document
        return _collect(read(list(rows)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path_here} does not hold the questions of {task}: {error!r}") from error


def make(found: Corpus) -> Make:
    """Examples of a corpus: a question, its documents and so many others, in any order."""

    def example(rng: random.Random, units: int, text: str) -> Example:
        question, answers, own = rng.choice(found.questions)
        count = min(len(own) + units - 1, len(found.documents))
        chosen = [*own, *[i for i in rng.sample(range(len(found.documents)), count) if i not in own][: count - len(own)]]
        rng.shuffle(chosen)
        documents = "\n\n".join(f"Document {n}:\n{found.documents[i]}" for n, i in enumerate(chosen, 1))
        return Example(
            f"{_ASK}\n\nThe following are given documents.\n\n{documents}\n\n{_ASK}\n\nQuestion: {question} Answer:", answers
        )

    return example


def score(prediction: str, answers: tuple[str, ...]) -> float:
    """Whether one of the answers appears, letters of any case: RULER's string_match_part."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))


Asked = tuple[str, tuple[str, ...], list[str]]


def _flat(articles: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """SQuAD's own file as rows like the Hub's."""
    for paragraph in (p for article in articles for p in article["paragraphs"]):
        for asked in paragraph["qas"]:
            texts = [answer["text"] for answer in asked["answers"]]
            yield {"context": paragraph["context"], "question": asked["question"], "answers": {"text": texts}}


def _squad(rows: list[dict[str, Any]]) -> Iterator[Asked]:
    for row in rows:
        if row["answers"]["text"]:  # others cannot be answered
            yield row["question"], tuple(dict.fromkeys(row["answers"]["text"])), [row["context"]]


def _hotpot(rows: list[dict[str, Any]]) -> Iterator[Asked]:
    for row in rows:
        held = row["context"]
        pairs = zip(held["title"], held["sentences"], strict=True) if isinstance(held, dict) else held
        yield row["question"], (row["answer"],), [f"{title}\n{''.join(sentences)}" for title, sentences in pairs]


def _collect(asked: Iterator[Asked]) -> Corpus:
    places: dict[str, int] = {}
    questions = [
        (question, answers, tuple(dict.fromkeys(places.setdefault(text, len(places)) for text in texts)))
        for question, answers, texts in asked
    ]
    if not questions:
        raise ValueError("no question with an answer")
    return Corpus(list(places), questions)
