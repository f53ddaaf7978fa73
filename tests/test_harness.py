"""The model `hf-pqcache` of lm-evaluation-harness: with an exact cache it is the harness's own `hf`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("lm_eval", reason="the adapter is for lm-evaluation-harness")
import datasets
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from hf_pqcache.cli import main
from hf_pqcache.config import PQConfig
from hf_pqcache.demo import MODEL, TEXT
from hf_pqcache.eval import tasks
from hf_pqcache.eval.measure.harness import CacheLM
from hf_pqcache.eval.session.caches import CacheSpec
from hf_pqcache.eval.session.models import load_model
from hf_pqcache.eval.session.results import Results
from hf_pqcache.eval.session.session import Session

ROOT = Path(__file__).parents[1]
TASKS = ["toy_choice", "toy_answer", "toy_text"]
DATA = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
FILES = {
    "toy_choice": "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_target: gold\ndoc_to_choice: choices\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "toy_answer": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{choices[gold]}}'\n"
    "generation_kwargs: {until: ['.'], max_gen_toks: 8, do_sample: false}\n"
    "metric_list: [{metric: exact_match, aggregation: mean}]\n",
    "toy_text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]\n",
}


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks over sentences of the embedded articles: which word goes on, go on, and how likely is all of it."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = [text.split() for text in TEXT.read_text(encoding="utf-8").split("<|endoftext|>")][:6]
    lines = []
    for i, words in enumerate(texts):
        others = [" ".join(texts[i - 1][60:63]), words[80], words[90] + " " + words[91]]
        choices = [" " + choice for choice in (" ".join(words[60:62]), *others)]
        lines.append({"text": " ".join(words[: 60 - 4 * i]), "choices": choices, "gold": 0})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, text in FILES.items():
        head = f"task: {name}\n" + DATA.format(data=folder / "data.jsonl") + "metadata: {version: 1.0}\n"
        (folder / f"{name}.yaml").write_text(head + text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(MODEL, dtype="float32", device="cpu")


def evaluate(
    folder: Path, model: Any, arguments: dict[str, Any] | None = None, names: Any = TASKS
) -> dict[str, dict[str, Any]]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(model, arguments, tasks=list(names), task_manager=manager, bootstrap_iters=0)
    return {
        name: {"scores": values, "answers": [sample["filtered_resps"] for sample in found["samples"][name]]}
        for name, values in found["results"].items()
    }


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, dict[str, Any]]:
    """By the harness's own model."""
    return evaluate(folder, "hf", {"pretrained": str(MODEL), "dtype": "float32", "device": "cpu"})


@pytest.mark.cache
@pytest.mark.parametrize(("cache", "batch_size", "chunk"), [("dynamic", 1, 16), ("dynamic", 4, 1), ("static", 3, 16)])
def test_an_exact_cache_changes_nothing(
    folder: Path, expected: dict[str, Any], cache: str, batch_size: int, chunk: int
) -> None:
    arguments = {"pretrained": "tiny", "dtype": "float32", "device": "cpu", "cache": cache}
    found = evaluate(folder, "hf-pqcache", {**arguments, "batch_size": batch_size, "chunk": chunk})
    for name in TASKS:
        for ours, theirs in zip(found[name]["answers"], expected[name]["answers"], strict=True):
            if name == "toy_answer":
                assert ours == theirs
            elif name == "toy_choice":
                assert [x[0] for x in ours] == pytest.approx([x[0] for x in theirs], rel=1e-4)
                assert [x[1] for x in ours] == [x[1] for x in theirs]
            else:
                assert ours == pytest.approx(theirs, rel=1e-4)
        numbers = {key: value for key, value in found[name]["scores"].items() if isinstance(value, float)}
        assert numbers == pytest.approx({key: expected[name]["scores"][key] for key in numbers}, rel=1e-4)


def test_what_is_scored_comes_from_the_cache(folder: Path, loaded: tuple[Any, Any], expected: dict[str, Any]) -> None:
    """With half a bit and one exact token every likelihood moves, though the harness's own forward pass would not see it."""
    config = PQConfig(num_subspaces=8, num_bits=4, page_size=16, extended_residual=1, sink_tokens=0)
    spec = CacheSpec("pq", config.to_dict())
    found = evaluate(folder, CacheLM(loaded[0], spec, tokenizer=loaded[1], batch_size=4), names=["toy_choice"])
    pairs = zip(found["toy_choice"]["answers"], expected["toy_choice"]["answers"], strict=True)
    assert all(ours[i][0] != pytest.approx(theirs[i][0], rel=1e-3) for ours, theirs in pairs for i in range(4))


def test_rows_are_found_again(folder: Path, loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(**options: Any) -> Any:
        session = Session(*loaded, model_name="tiny", results=Results(tmp_path / "r.jsonl"), progress=False)
        return tasks.get("harness").run(session, ["toy_choice"], include_path=folder, **options)

    rows = run(limit=2)
    assert [(row.task, row.metric) for row in rows] == [("harness/toy_choice", "acc"), ("harness/toy_choice", "acc_norm")]
    assert all(0 <= row.value <= 1 and row.provenance["harness_version"] == 1.0 for row in rows)
    monkeypatch.setattr(CacheLM, "_logits", None)  # cannot measure any more
    assert run(limit=2) == rows
    with pytest.raises(TypeError):
        run(limit=1)
    with pytest.raises(ValueError, match="no task 'toy_choices'"):
        tasks.get("harness").run(Session(*loaded, model_name="tiny"), ["toy_choices"], include_path=folder)


def test_what_cannot_be_measured_is_refused(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="give a number"):
        CacheLM("tiny", batch_size="auto")
    with pytest.raises(ValueError, match="CacheSpec"):
        CacheLM(loaded[0], "pq", tokenizer=loaded[1])


def test_eval_harness_command(folder: Path, tmp_path: Path) -> None:
    arguments = ["eval", "harness", "--model", "tiny", "--cache", "dynamic", "--tasks", "toy_answer", "--limit", "2"]
    arguments += ["--include-path", str(folder), "--quiet", "--device", "cpu", "--json", str(tmp_path / "rows.json")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (row["task"], row["metric"]) == ("harness/toy_answer", "exact_match")


@pytest.mark.slow
def test_lm_eval_command(folder: Path, tmp_path: Path) -> None:
    """The harness's own command line, in a process of its own, under a compressed cache."""
    text = tmp_path / "calibration.txt"
    text.write_text(TEXT.read_text()[:4000])
    model = f"pretrained=tiny,cache=pq:2,calibration_tokens=600,calibration={text}"
    arguments = ["lm-eval", "--model", "hf-pqcache", "--model_args", model, "--tasks", "toy_answer", "--limit", "1"]
    arguments += ["--device", "cpu", "--include_path", str(folder), "--output_path", str(tmp_path)]
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_pqcache", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.rglob("results_*.json")
    assert "exact_match,none" in json.loads(written.read_text())["results"]["toy_answer"]


def test_long_answers_samples_and_a_share_of_the_examples(folder: Path, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    session = Session(*loaded, model_name="tiny", cache=CacheSpec("dynamic"), progress=False)
    options: dict[str, Any] = {"include_path": folder, "limit": 0.34, "gen_kwargs": {"max_gen_toks": 2, "until": []}}
    (row,) = tasks.get("harness").run(session, ["toy_answer"], samples=tmp_path / "samples", **options)
    assert row.settings["gen_kwargs"]["max_gen_toks"] == 2
    logged = [json.loads(line) for line in (tmp_path / "samples" / "toy_answer.jsonl").read_text().splitlines()]
    assert len(logged) == 3  # of six, rounded up
    answers = [sample["filtered_resps"][0] for sample in logged]
    assert all(len(loaded[1](text, add_special_tokens=False)["input_ids"]) <= 3 for text in answers)


def test_the_task_that_comes_along_needs_no_network(loaded: tuple[Any, Any]) -> None:
    session = Session(*loaded, model_name="tiny", cache=CacheSpec("dynamic"), progress=False)
    rows = tasks.get("harness").run(session, ["pqcache_articles"], limit=4)
    assert {row.metric for row in rows} == {"acc", "acc_norm"}
    assert all("stderr" in row.provenance for row in rows)


def test_a_press_wants_a_prompt(folder: Path, loaded: tuple[Any, Any]) -> None:
    """A rolling text is predicted from its first token on: nothing would be pruned under a press's name."""
    model, tokenizer = loaded
    spec = replace(CacheSpec.parse("paged-kv", 64), press="knorm:0.5")
    lm = CacheLM(pretrained=model, tokenizer=tokenizer, cache=spec)
    with pytest.raises(ValueError, match="a rolling text has none"):
        evaluate(folder, lm, names=["toy_text"])
