"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): 503 questions of four choices, by difficulty and length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hf_pqcache.eval.measure.questions import Question
from hf_pqcache.eval.session import hub_data
from hf_pqcache.eval.tasks._questions import QuestionTask

PATH = "THUDM/LongBench-v2"


def ask(example: dict[str, Any]) -> Question:
    """The paper's zero-shot prompt."""
    choices = "\n".join(f"({letter}) {example[f'choice_{letter}'].strip()}" for letter in "ABCD")
    prompt = (
        f"Please read the following text and answer the question below.\n\n<text>\n{example['context'].strip()}\n</text>\n\n"
        f"What is the correct answer to this question: {example['question'].strip()}\nChoices:\n{choices}\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".'
    )
    return Question(prompt, (str(example["answer"]).strip(),), f"{example['difficulty']}, {example['length']}")


def score(prediction: str, question: Question) -> float:
    """1 if the letter that the answer names is the right one."""
    found = re.search(r"correct answer is:?\s*\(?([A-D])\b", prediction.replace("*", ""))
    return float(found is not None and found[1] == question.answers[0])


def load() -> Sequence[dict[str, Any]]:
    rows: Sequence[dict[str, Any]] = hub_data.load(PATH, split="train")
    return rows


task = QuestionTask("longbench-v2", "1", ("longbench-v2.jsonl", "data.json"), load, ask, score, "accuracy", 128)
