"""LongBench: official prompts and truncation; a kill and a resume, or two processes, change no row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_pqcache.cli.commands import _ray
from hf_pqcache.demo import MODEL, TEXT
from hf_pqcache.eval import tasks
from hf_pqcache.eval.measure import longbench
from hf_pqcache.eval.measure.journal import Journal
from hf_pqcache.eval.measure.longbench_scores import METRICS
from hf_pqcache.eval.session.caches import CacheSpec
from hf_pqcache.eval.session.models import load_model
from hf_pqcache.eval.session.results import Results, Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.tasks.longbench import NAMES, NAMES_E

ROOT = Path(__file__).parents[1]
pytest.importorskip("lm_eval", reason="LongBench's prompts come from lm-evaluation-harness")
OPTIONS: dict[str, Any] = {"max_tokens": 60, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(MODEL, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longbench")
    texts = [part for part in TEXT.read_text(encoding="utf-8").split("<|endoftext|>") if part.strip()]
    for task in ("qasper", "qasper_e", "samsum", "trec"):
        examples = [
            {
                "input": f"Question {i}?",
                "context": texts[i],
                "answers": [texts[i + 1].split()[0], "the"],
                "all_classes": ["Food", "Date"] if task == "trec" else None,
                "length": 3000 * i,
            }
            for i in range(5)
        ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in examples))
    return folder


def run(folder: Path, loaded: tuple[Any, Any], task: str, data_dir: Path, **more: Any) -> list[Row]:
    session = Session(
        *loaded, model_name="tiny", cache=CacheSpec("dynamic"), results=Results(folder / "r.jsonl"), progress=False
    )
    for name in ("force",):
        setattr(session, name, more.pop(name, False))
    return tasks.get(f"longbench/{task}").run(session, data_dir=data_dir, **{**OPTIONS, **more})


def test_all_tasks_are_described_by_the_harness() -> None:
    assert (len(NAMES), len(NAMES_E)) == (21, 13)
    example = {"input": "QUESTION", "context": "CONTEXT", "answers": []}
    without_question = ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
    for name in (*NAMES, *NAMES_E):
        spec, text = longbench.spec(name), longbench.prompt(name, example)
        assert spec.metric in METRICS
        assert 32 <= spec.max_new_tokens <= 512
        assert "CONTEXT" in text
        assert ("QUESTION" in text) == (name.removesuffix("_e") not in without_question)
        assert "{" not in text
    assert longbench.spec("gov_report").max_new_tokens == 512
    assert longbench.prompt("lcc", example).endswith("Next line of code:")
    with pytest.raises(ValueError, match=r"has no nothing\.yaml"):
        longbench.spec("nothing")


def test_the_middle_of_a_long_prompt_is_cut_out(loaded: tuple[Any, Any]) -> None:
    tokenizer, text = loaded[1], TEXT.read_text(encoding="utf-8")[:1000]
    ids = tokenizer(text)["input_ids"]
    whole = longbench.prompt_ids(tokenizer, text, "qasper", len(ids), use_chat=False)
    assert whole.tolist() == [ids]
    cut = longbench.prompt_ids(tokenizer, text, "qasper", 100, use_chat=False)[0].tolist()
    ends = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:50], ids[-50:]))
    assert tokenizer.decode(cut) == "".join(ends)


def test_only_tasks_of_questions_get_a_chat_template(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = loaded[1]
    template = "{% for m in messages %}USER {{ m.content }} END{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template, raising=False)
    for task, is_wrapped in (("qasper", True), ("gov_report_e", True), ("trec", False), ("lcc_e", False), ("samsum", False)):
        text = tokenizer.decode(longbench.prompt_ids(tokenizer, "Hello", task, 50, use_chat=True)[0])
        assert ("USER Hello END" in text) == is_wrapped
    assert "USER" not in tokenizer.decode(longbench.prompt_ids(tokenizer, "Hello", "qasper", 50, use_chat=False)[0])


@pytest.mark.parametrize("task", ["qasper", "samsum", "trec"])
def test_an_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, loaded: tuple[Any, Any], data_dir: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "whole", loaded, task, data_dir)
    original, calls = longbench.answer, []

    def answer(*args: Any) -> str:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(longbench, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", loaded, task, data_dir)
    resumed = run(tmp_path / "broken", loaded, task, data_dir)
    assert len(calls) == 4 + 2  # three were there, the fourth failed
    assert [(row.key, row.value) for row in resumed] == [(row.key, row.value) for row in expected]
    run(tmp_path / "broken", loaded, task, data_dir)
    assert len(calls) == 6
    run(tmp_path / "broken", loaded, task, data_dir, force=True)
    assert len(calls) == 11


def test_other_data_is_another_measurement(tmp_path: Path, loaded: tuple[Any, Any], data_dir: Path) -> None:
    two, three = (run(tmp_path, loaded, "qasper", data_dir, limit=n)[0] for n in (2, 3))
    assert two.key != three.key


def test_longbench_e_is_also_scored_by_length(tmp_path: Path, loaded: tuple[Any, Any], data_dir: Path) -> None:
    rows = run(tmp_path, loaded, "qasper_e", data_dir)
    assert [row.settings.get("length") for row in rows] == [None, "0-4k", "4-8k", "8k+"]
    whole, *groups = (row.value for row in rows)  # 0, 3000 | 6000 | 9000, 12000 words
    assert whole == pytest.approx((2 * groups[0] + groups[1] + 2 * groups[2]) / 5)


def test_a_share_of_the_examples_and_the_standard_error(tmp_path: Path, loaded: tuple[Any, Any], data_dir: Path) -> None:
    whole, *_ = run(tmp_path, loaded, "qasper_e", data_dir)
    some, *_ = run(tmp_path, loaded, "qasper_e", data_dir, limit=0.5)
    one, *_ = run(tmp_path, loaded, "qasper_e", data_dir, limit=1)
    assert [row.settings["examples"] for row in (whole, some, one)] == [5, 3, 1]
    assert whole.provenance["stderr"] >= 0
    assert "stderr" not in one.provenance


def test_answers_are_greedy_and_samsum_ends_at_a_line_end(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer("The pass key for garden is 48213.\n")["input_ids"]])
    caches = [CacheSpec("dynamic").make(model, 100) for _ in range(3)]
    long = longbench.answer(model, tokenizer, ids, "qasper", 40, caches[0])
    assert long == longbench.answer(model, tokenizer, ids, "qasper", 40, caches[1])
    short = longbench.answer(model, tokenizer, ids, "samsum", 40, caches[2])
    assert short.strip()
    assert "\n" not in short.rstrip("\n")


def test_a_journal_is_read_by_any_number_of_processes(tmp_path: Path) -> None:
    for rank in range(3):
        Journal(tmp_path, rank, 3).add(rank, f"text {rank}")
    with open(tmp_path / "1.jsonl", "ab") as file:
        file.write(b'{"index": 7, "pre')  # torn
    journal = Journal(tmp_path, 1, 2)
    assert journal.predictions == {0: "text 0", 1: "text 1", 2: "text 2"}
    journal.add(3, "text 3")
    assert Journal(tmp_path).predictions[3] == "text 3"
    Journal(tmp_path, 0, 2, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["1.jsonl"]


@pytest.mark.slow
def test_kill_and_two_processes_give_the_rows_of_one(tmp_path: Path, data_dir: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options = "-m hf_pqcache eval longbench --tasks qasper,trec --cache dynamic --max-length 60 --max-new-tokens 4 --quiet"
    launch = (
        "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    )

    def start(name: str, *launch: str) -> subprocess.Popen[str]:
        paths = ["--model", str(MODEL), "--data-dir", str(data_dir), "--results", str(tmp_path / f"{name}.jsonl")]
        command = [sys.executable, *launch, *options.split(), *paths, "--device", "cpu"]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def finish(name: str, *launch: str) -> tuple[list[tuple[str, float]], list[dict[int, str]]]:
        """Keys and values of the rows, and the predictions of each task."""
        process = start(name, *launch)
        errors = process.communicate()[1]
        assert process.returncode == 0, errors[-2000:]
        folders = sorted((tmp_path / f"{name}.predictions").iterdir())
        rows = [(row.key, row.value) for row in Results(tmp_path / f"{name}.jsonl").rows]
        return rows, [dict(sorted(Journal(folder).predictions.items())) for folder in folders]

    expected = finish("one")
    assert (len(expected[0]), [len(task) for task in expected[1]]) == (2, [5, 5])
    process = start("killed")
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed.predictions/*/0.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(Results(tmp_path / "killed.jsonl").rows) < 2
    assert finish("killed") == expected
    assert finish("two", *launch.split()) == expected
    assert len(list(tmp_path.glob("two.predictions/*/*.jsonl"))) == 4  # both processes worked on both tasks


def test_the_option_for_ray_is_not_passed_on() -> None:
    line = ["eval", "longbench", "--ray", "2", "--tasks", "qasper"]
    assert _ray.without_option(line, "--ray") == ["eval", "longbench", "--tasks", "qasper"]
    assert _ray.without_option(["--ray=2", "--rays", "2", "a"], "--ray") == ["--rays", "2", "a"]


@pytest.mark.slow
def test_workers_of_ray_give_the_rows_of_one_process_though_one_is_killed(tmp_path: Path, data_dir: Path) -> None:
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    options = "-m hf_pqcache eval longbench --tasks qasper,trec --cache dynamic --max-length 60 --max-new-tokens 4 --quiet"

    def start(name: str, *more: str) -> subprocess.Popen[str]:
        paths = ["--model", str(MODEL), "--data-dir", str(data_dir), "--results", str(tmp_path / f"{name}.jsonl")]
        command = [sys.executable, *options.split(), *paths, "--device", "cpu", *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def rows(name: str, process: subprocess.Popen[str]) -> list[tuple[str, float]]:
        told = process.communicate(timeout=300)
        assert process.returncode == 0, told
        assert "qasper" in told[0]
        return [(row.key, row.value) for row in Results(tmp_path / f"{name}.jsonl").rows]

    expected = rows("one", start("one"))
    process = start("two", "--ray", "2")
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob("two.predictions/*/1.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = [x for x in psutil.process_iter(["cmdline"]) if any("ray::Worker" in word for word in x.info["cmdline"] or ())]
    workers[-1].kill()
    assert rows("two", process) == expected
    assert len(list(tmp_path.glob("two.predictions/*/*.jsonl"))) == 4
