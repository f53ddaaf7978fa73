"""RULER, LongBench v2, InfiniteBench: prompts are of the length asked for and hold their answers; scores are the papers'."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import pqcache

from hf_pqcache import demo
from hf_pqcache.eval import tasks
from hf_pqcache.eval.measure import questions, ruler, ruler_qa
from hf_pqcache.eval.measure.questions import Question
from hf_pqcache.eval.session import models
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
        ("math_calc", [1, 4, 8, -2], "[1, 4, 7, -2]", 0.5),
        ("math_calc", [1, 4], "1, 4, 9", 1),
        ("math_calc", [1, 4], "none", 0),
        ("longbook_qa_chn", ["猫头鹰"], "猫头鹰", 1),
        ("longbook_qa_chn", ["猫头鹰"], "水", 0),
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


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"The animal of town {i} is animal number {i}. " + "It is a town like any other. " * 3,
                    "qas": [
                        {"question": f"Which animal has town {i}?", "answers": [{"text": f"animal number {i}"}]},
                        {"question": "What is not said?", "answers": []},
                    ],
                }
            ]
        }
        for i in range(40)
    ]
}
HOTPOT = [
    {
        "question": f"Which town is larger, {i} or {i + 1}?",
        "answer": f"town {i}",
        "context": [[f"Town {n}", [f"Town {n} is large.", " So is its river."]] for n in (i, i + 1)],
    }
    for i in range(40)
]


@pytest.mark.parametrize(("task", "file", "data"), [("qa_1", "squad.json", SQUAD), ("qa_2", "hotpotqa.json", HOTPOT)])
def test_rulers_questions_stand_among_documents_of_others(
    task: str, file: str, data: Any, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    (tmp_path / file).write_text(json.dumps(data))
    make = ruler_qa.make(ruler_qa.corpus(task, tmp_path))
    first, second = ruler.fitted(task, make, loaded[1], 500, 2, 0)
    assert 400 <= len(loaded[1](first.prompt)["input_ids"]) <= 500
    assert first != second
    assert any(answer.lower() in first.prompt.lower() for answer in first.answers)
    documents = [part.split("\n\n")[0] for part in first.prompt.split(":\n")[1:]]
    assert len(documents) == len(set(documents)) > 3
    whole = make(random.Random(0), 10_000, "").prompt  # more documents than there are
    assert whole.count("Document ") == (40 if task == "qa_1" else 41)
    session = Session(*loaded, model_name="tiny", progress=False)
    (row,) = tasks.get(f"ruler/{task}").run(session, lengths=[300], limit=2, data_dir=tmp_path)
    assert (row.metric, row.settings["length"]) == ("string_match_part", 300)
    assert "stderr" in row.provenance


def test_rulers_questions_are_answered_by_any_of_the_answers() -> None:
    assert ruler_qa.score("It is an OWL.", ("owl", "bat")) == 1
    assert ruler_qa.score("nothing", ("owl", "bat")) == 0


@pytest.mark.parametrize("text", ["[]", "{}", '[{"question": 1}]', "no json"])
def test_a_file_of_another_form_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(text)
    with pytest.raises(ValueError, match=r"squad\.json does not hold the questions of qa_1"):
        ruler_qa.corpus("qa_1", tmp_path)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("ruler --tasks qa_1", "rajpurkar/squad_v2"),
        ("ruler --tasks vt,qa_2", "hotpotqa/hotpot_qa"),
        ("longbench-v2", "LongBench-v2"),
        ("infinitebench --tasks math_calc --max-new-tokens 8", "InfiniteBench"),
        ("longbench --tasks qasper", "LongBench"),
    ],
)
def test_without_the_hub_it_is_one_line_before_weights_are_loaded(
    line: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were loaded")

    ruler_qa.corpus.cache_clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_pqcache.codebook.hub.is_reachable", lambda: False)
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    failed = pqcache("eval", *line.split(), "--model", "tiny", "--cache", "dynamic", "--quiet")
    assert failed.exit_code == 1, failed.output
    (told,) = failed.output.strip().splitlines()
    assert named in told
    assert "--data-dir" in told


def test_ruler_runs_at_several_lengths(loaded: tuple[Any, Any]) -> None:
    session = Session(*loaded, model_name="tiny", progress=False)
    rows = tasks.get("ruler/niah_single_1").run(session, lengths=[200, 300], limit=2)
    assert [row.settings["length"] for row in rows] == [200, 300]
    assert all(0 <= row.value <= 100 and "stderr" in row.provenance for row in rows)
