"""RULER, LongBench v2, InfiniteBench: prompts are of the length asked for and hold their answers; scores are the papers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_pqcache import demo
from hf_pqcache.eval import tasks
from hf_pqcache.eval.measure import questions, ruler
from hf_pqcache.eval.measure.questions import Question
from hf_pqcache.eval.session.models import load_model
from hf_pqcache.eval.session.results import Results
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.tasks import infinitebench, longbench_v2

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = demo.TEXT.read_text(encoding="utf-8")
LONG = {"cwe": 4096}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(demo.MODEL, dtype="float32", device="cpu")


@pytest.mark.parametrize("task", ruler.KINDS)
def test_ruler_fills_its_length_and_holds_its_answers(task: str, loaded: tuple[Any, Any]) -> None:
    tokens = LONG.get(task, 600)
    first, second = ruler.examples(task, loaded[1], tokens, 2, 0, TEXT)
    count = len(loaded[1](first.prompt)["input_ids"])
    assert 0.8 * tokens <= count <= tokens
    assert all(answer in first.prompt for answer in first.answers)
    assert first != second
    assert ruler.examples(task, loaded[1], tokens, 1, 0, TEXT) == [first]  # the seed decides
    assert ruler.examples(task, loaded[1], tokens, 1, 1, TEXT) != [first]


def test_rulers_variables_come_in_their_order(loaded: tuple[Any, Any]) -> None:
    for example in ruler.examples("vt", loaded[1], 500, 5, 3, TEXT):
        places = [example.prompt.index(f"VAR {name} = ") for name in example.answers]
        assert places == sorted(places)


def test_rulers_frequent_words_are_the_most_frequent(loaded: tuple[Any, Any]) -> None:
    (example,) = ruler.examples("fwe", loaded[1], 900, 1, 0, TEXT)
    words = example.prompt.split("coded words. ")[1].split("\n")[0].split()
    counts = sorted({word: words.count(word) for word in words if word != "..."}.items(), key=lambda item: -item[1])
    assert {word for word, _ in counts[:3]} == set(example.answers)


@pytest.mark.parametrize(
    ("text", "answers", "expected"), [("A b, C", ("b", "c"), 1.0), ("b", ("b", "c"), 0.5), ("", ("b",), 0.0)]
)
def test_ruler_counts_answers_that_appear(text: str, answers: tuple[str, ...], expected: float) -> None:
    assert ruler.score(text, answers) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The correct answer is (B).", 1), ("**The correct answer is B**", 1), ("The correct answer is (A)", 0), ("B", 0)],
)
def test_longbench_v2_reads_the_letter(text: str, expected: float) -> None:
    assert longbench_v2.score(text, Question("", ("B",))) == expected


@pytest.mark.parametrize(
    ("kind", "answer", "text", "expected"),
    [
        ("passkey", ["123"], " 123.", 1),
        ("passkey", ["123"], " 124.", 0),
        ("longbook_choice_eng", ["two"], " B", 1),
        ("longbook_choice_eng", ["two"], "it is Two", 1),
        ("longbook_choice_eng", ["two"], "A", 0),
        ("code_run", [-7], "-7", 1),
        ("math_find", [3.5], "3.50 is it", 1),
        ("longbook_qa_eng", ["the old owl", "an owl"], "owl", 1),
    ],
)
def test_infinitebench_scores(kind: str, answer: list[Any], text: str, expected: float) -> None:
    example = {"context": "c", "input": "The largest number of it", "answer": answer, "options": ["one", "two"]}
    question = infinitebench.ask(kind, example)
    assert "c" in question.prompt
    assert "{" not in question.prompt
    assert infinitebench.KINDS[kind][1](text, question) == expected


@pytest.mark.parametrize(("limit", "count"), [(None, 5), (2, 2), (0.4, 2), (0.01, 1), (9, 5)])
def test_a_limit_is_a_number_or_a_share(limit: float | None, count: int) -> None:
    assert len(questions.first_of([Question("", ())] * 5, limit)) == count


def test_rows_have_groups_and_standard_errors_and_are_found_again(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = {f"choice_{letter}": letter for letter in "ABCD"}
    common = {**choice, "context": "text " * 300, "question": "?", "answer": "B", "length": "short"}
    lines = [json.dumps({**common, "difficulty": kind}) for kind in ("easy", "easy", "hard")]
    (tmp_path / "longbench-v2.jsonl").write_text("\n".join(lines))
    session = Session(*loaded, model_name="tiny", results=Results(tmp_path / "r.jsonl"), progress=False)
    answers = iter(["The correct answer is (B)", "no", "The correct answer is (B)"])
    monkeypatch.setattr(type(loaded[1]), "decode", lambda self, ids, **more: "x" if len(ids) > 4 else next(answers))
    options = {"data_dir": tmp_path, "max_tokens": 64, "max_new_tokens": 2}
    rows = tasks.get("longbench-v2").run(session, **options)
    assert [(row.settings.get("group"), round(row.value, 2)) for row in rows] == [
        (None, 66.67),
        ("easy, short", 50),
        ("hard, short", 100),
    ]
    assert rows[0].provenance["stderr"] == pytest.approx(33.333, rel=1e-3)
    assert "stderr" not in rows[2].provenance
    assert tasks.get("longbench-v2").run(session, **options) == rows


def test_ruler_runs_at_several_lengths(loaded: tuple[Any, Any]) -> None:
    session = Session(*loaded, model_name="tiny", progress=False)
    rows = tasks.get("ruler/niah_single_1").run(session, lengths=[200, 300], limit=2)
    assert [row.settings["length"] for row in rows] == [200, 300]
    assert all(0 <= row.value <= 100 and "stderr" in row.provenance for row in rows)
