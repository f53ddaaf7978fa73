"""Metrics: LongBench's published scores come out, by function and by evaluate module, without a network."""

from __future__ import annotations

import json
import math
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import evaluate
import pytest

from hf_pqcache.eval.measure import longbench_scores
from hf_pqcache.eval.measure.longbench_scores import METRICS, first_line, score
from hf_pqcache.eval.metrics import FOLDER

ARCHIVE = Path(__file__).parents[1].parent / "shared" / "data" / "longbench-predictions.tar.xz"
TASKS = {
    "qa_f1": ["narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"],
    "qa_f1_zh": ["multifieldqa_zh"],
    "rouge": ["gov_report", "qmsum", "multi_news", "samsum"],
    "rouge_zh": ["dureader", "vcsum"],
    "classification": ["trec", "lsht"],
    "count": ["passage_count"],
    "retrieval": ["passage_retrieval_en"],
    "retrieval_zh": ["passage_retrieval_zh"],
    "code_sim": ["lcc", "repobench-p"],
}
LONG = ("gov_report", "qmsum", "multi_news", "vcsum")
Predictions = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def published() -> Predictions:
    """model -> file's stem -> its examples, or of result.json the scores."""
    if not ARCHIVE.is_file():
        pytest.skip(f"{ARCHIVE} is not here: published predictions are not part of the repository")
    found: Predictions = {}
    with tarfile.open(ARCHIVE) as archive:
        for member in archive.getmembers():
            if member.isfile() and (file := archive.extractfile(member)) is not None:
                text, path = file.read().decode(), Path(member.name)
                examples = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
                found.setdefault(path.parent.name, {})[path.stem] = examples
    return found


def check(models: Iterable[dict[str, Any]], wanted: list[tuple[str, str]]) -> int:
    checked = 0
    for model in models:
        for metric, task in wanted:
            examples = model[task]
            scores = [score(f"{metric}_score", first_line(task, x["pred"]), x["answers"], x["all_classes"]) for x in examples]
            assert 100 * sum(scores) / len(scores) == pytest.approx(model["result"][task], abs=0.01), task
            checked += 1
    return checked


def test_published_scores_of_short_answers(published: Predictions) -> None:
    pytest.importorskip("jieba")
    assert check(published.values(), [(m, t) for m, group in TASKS.items() for t in group if t not in LONG]) == 17 * 4


@pytest.mark.slow
def test_published_scores_of_summaries(published: Predictions) -> None:
    pytest.importorskip("jieba")
    wanted = [(m, t) for m, group in TASKS.items() for t in group if t in LONG]
    assert check([published["llama3-8b-instruct"]], wanted) == 4  # the other three take a minute and agree as well


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "expected"),
    [
        ("qa_f1_score", "The cat, sat!", "a cat", 2 / 3),
        ("qa_f1_score", "", "a cat", 0.0),
        ("rouge_score", "w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 2 * 0.5 * 0.8 / 1.3),  # Lin 2004, section 3.2
        ("rouge_score", "...", "w1", 0.0),
        ("count_score", "7 or 8", "8", 0.5),
        ("retrieval_score", "Paragraph 3", "Paragraph 3", 1.0),
        ("retrieval_zh_score", "段落3，段落4", "段落4", 0.5),
        ("code_sim_score", "\n# note\nreturn x\n", "return y", 0.88),
        ("code_sim_score", "# only a comment", "return y", 0.0),
    ],
)
def test_scores_by_hand(metric: str, prediction: str, answer: str, expected: float) -> None:
    assert score(metric, prediction, [answer]) == pytest.approx(expected, abs=1e-6)


def test_a_class_named_within_the_right_one_does_not_count() -> None:
    classes = ["Order", "Order, rank", "Food"]
    assert score("classification_score", "Order, rank", ["Order, rank"], classes) == 1
    assert score("classification_score", "Order, rank or Food", ["Order, rank"], classes) == 0.5
    assert score("classification_score", "Food", ["Order, rank"], classes) == 0


def test_only_some_tasks_end_with_the_first_line() -> None:
    assert first_line("trec", "\nDate\nQuestion: x") == first_line("trec_e", "Date\nx") == "Date"
    assert first_line("qasper", "\nDate\nx") == "\nDate\nx"


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    longbench_scores._jieba.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match="pip install jieba"):
        score("qa_f1_zh_score", "x", ["y"])
    with pytest.raises(ValueError, match="use one of"):
        score("bleu", "x", ["y"])


def test_evaluate_loads_every_metric_by_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path))

    def load(name: str, config: str | None = None) -> Any:
        return evaluate.load(str(FOLDER / f"{name}.py"), config, cache_dir=str(tmp_path))

    answers = {"predictions": ["the cat", "dog"], "references": [["cat", "bird"], ["cow"]]}
    assert load("longbench", "qa_f1").compute(**answers) == {"qa_f1": 50.0}
    named = {"predictions": ["Food"], "references": [["Food"]], "all_classes": ["Food", "Date"]}
    assert load("longbench", "classification").compute(**named) == {"classification": 100.0}
    losses = {"predictions": [2.0, 4.0], "references": [1, 2]}
    assert load("token_perplexity").compute(**losses)["perplexity"] == pytest.approx(math.exp(2))
    keys = {"predictions": [" 12345.", "1234"], "references": ["12345", "12345"]}
    assert load("passkey_recall").compute(**keys) == {"recall": 0.5}
    assert {f"{name}_score" for name in TASKS} == set(METRICS)
