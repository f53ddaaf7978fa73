"""InfiniteBench (Zhang et al. 2024, arXiv 2402.13718): retrieval, books, dialogue, code and numbers over 100K tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hf_pqcache.eval.measure.longbench_scores import qa_f1, qa_f1_zh, rouge
from hf_pqcache.eval.measure.questions import Question
from hf_pqcache.eval.session import hub_data
from hf_pqcache.eval.tasks._questions import QuestionTask

PATH = "xinrongzhang2022/InfiniteBench"
Score = Callable[[str, Question], float]


def _contains(prediction: str, question: Question) -> float:
    return float(any(answer in prediction for answer in question.answers))


def _first_number(prediction: str, question: Question) -> float:
    found = re.search(r"-?\d+(\.\d+)?", prediction.replace(",", ""))
    return float(found is not None and any(float(found[0]) == float(answer) for answer in question.answers))


def _first_values(prediction: str, question: Question) -> float:
    """Share of the values that come in their order before the first wrong one."""
    found = re.findall(r"-?\d+", prediction)
    right = 0
    for value, answer in zip(found, question.answers, strict=False):
        if int(value) != int(answer):
            break
        right += 1
    return right / len(question.answers)


def _letter(prediction: str, question: Question) -> float:
    """Answers hold the letter first. A letter that stands alone decides, or else the text of the right option."""
    found = re.search(r"\b([A-D])\b", prediction)
    if found is not None:
        return float(found[1] == question.answers[0])
    return float(any(answer.lower() in prediction.lower() for answer in question.answers[1:]))


def _best(measure: Callable[[str, str], float], prediction: str, question: Question) -> float:
    return max(measure(prediction, answer) for answer in question.answers)


_CHOICES = (
    "Read the following and answer the question.\n\n{context}\n\nQuestion: {input}\n{options}\n\n"
    "The letter of the correct answer is"
)
#: Task -> (prompt, score, its name, tokens of an answer).
KINDS: dict[str, tuple[str, Score, str, int]] = {
    "passkey": ("{context}\n\n{input}\n\nThe pass key is", _contains, "accuracy", 6),
    "number_string": ("{context}\n\n{input}\n\nThe sequence of digits is", _contains, "accuracy", 12),
    "kv_retrieval": ("{context}\n\n{input}", _contains, "accuracy", 50),
    "longbook_qa_eng": (
        "Read the book below and answer a question.\n\n{context}\n\nQuestion: {input}\n\nBe very concise. Answer:",
        partial(_best, qa_f1),
        "qa_f1",
        40,
    ),
    "longbook_qa_chn": (
        "阅读以下书籍然后回答问题。\n\n{context}\n\n问题：{input}\n请尽量简短地回答。\n答案：",
        partial(_best, qa_f1_zh),
        "qa_f1_zh",
        40,
    ),
    "longbook_choice_eng": (_CHOICES, _letter, "accuracy", 40),
    "longbook_sum_eng": ("Summarize the following book.\n\n{context}\n\nSummary:", partial(_best, rouge), "rouge", 1200),
    "longdialogue_qa_eng": (
        "Below is a dialogue script where one occurrence of a character's name is replaced by $$MASK$$, and you should "
        "identify who that is.\n\n{context}\n\nThe name that was replaced with $$MASK$$ is",
        _contains,
        "accuracy",
        40,
    ),
    "code_debug": (_CHOICES, _letter, "accuracy", 5),
    "code_run": (
        "In the following code there is a function.\n\n{context}\n\n{input}\n\nRespond with the value only. The value is",
        _first_number,
        "accuracy",
        5,
    ),
    "math_calc": (
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: {context}\nValues:",
        _first_values,
        "accuracy",
        30_000,
    ),
    "math_find": ("{prefix}\n\n{context}\n\n{input}", _first_number, "accuracy", 3),
}


def ask(kind: str, example: dict[str, Any]) -> Question:
    answers = example["answer"] if isinstance(example["answer"], list) else [example["answer"]]
    options = list(example.get("options") or [])
    letters = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=False)]
    if options and KINDS[kind][1] is _letter:
        right = str(answers[0])
        answers = ["ABCD"[options.index(right)] if right in options else right, right]
    parts = {"context": example["context"], "input": example["input"], "options": "\n".join(letters)}
    number = re.search(r"The .+ of", str(example["input"]))
    parts["prefix"] = f"What is {number[0].lower()} the following list?" if number else "Look at the following list."
    return Question(KINDS[kind][0].format(**parts), tuple(map(str, answers)))


def load(kind: str) -> Sequence[dict[str, Any]]:
    from datasets import Features, List, Value

    text = Value("string")
    features = Features({"id": Value("int64"), "context": text, "input": text, "answer": List(text), "options": List(text)})
    rows: Any = hub_data.load(PATH, split=kind, features=features)
    return rows  # type: ignore[no-any-return]


tasks = tuple(
    QuestionTask(
        f"infinitebench/{kind}", "1", (f"{kind}.jsonl",), partial(load, kind), partial(ask, kind), score, metric, tokens
    )
    for kind, (_, score, metric, tokens) in KINDS.items()
)
