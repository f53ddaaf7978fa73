"""Tasks: the folder is their registry, texts are read as published, finished rows are found again."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hf_pqcache import Codebook
from hf_pqcache.cli import main
from hf_pqcache.config import PQConfig
from hf_pqcache.demo import MODEL, TEXT
from hf_pqcache.eval import tasks
from hf_pqcache.eval.pipeline import Pipeline
from hf_pqcache.eval.session.caches import CacheSpec
from hf_pqcache.eval.session.models import load_model
from hf_pqcache.eval.session.results import Results
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.session.setup import Calibration, prepare
from hf_pqcache.eval.session.texts import text_of

WIKI = [" = Title = \n", " \n", " A line , of words . \n", " \n", " Another one . \n"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small text in both plain forms: WikiText's, and PTB's (lower case, <unk>, N, a sentence a line)."""
    folder = tmp_path_factory.mktemp("data")
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    for name, part in (("train", lines[:150]), ("valid", lines[150:200]), ("test", lines[200:300])):
        (folder / f"wiki.{name}.raw").write_text("".join(f" {line} \n" for line in part), encoding="utf-8")
        words = (
            "N" if word.isdigit() else "<unk>" if len(word) > 12 else word.lower() for line in part for word in line.split()
        )
        (folder / f"ptb.{name}.txt").write_text(" " + " ".join(words).replace(" . ", " \n "), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(MODEL, dtype="float32", device="cpu")


def session_in(folder: Path, loaded: tuple[Any, Any], cache: CacheSpec | None = None, **more: Any) -> Session:
    options = {"results": Results(folder / "results.jsonl"), "progress": False, **more}
    return Session(*loaded, model_name="tiny", cache=cache or CacheSpec("dynamic"), **options)


def test_every_task_has_a_name_and_a_version() -> None:
    expected = {"wikitext-2-raw-v1", "wikitext-103-v1", "wikitext-103-raw-v1", "ptb_text_only", "speed", "memory", "recall"}
    assert expected <= set(tasks.registry())
    assert all(name == task.name and task.version for name, task in tasks.registry().items())
    with pytest.raises(ValueError, match="use one of"):
        tasks.get("wikitext-3")


def test_plain_and_parquet_files_are_the_same_text(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    task = tasks.get("wikitext-2-raw-v1")
    (tmp_path / "a" / "wikitext-2-raw").mkdir(parents=True)
    (tmp_path / "b" / "wikitext-2-raw-v1").mkdir(parents=True)
    (tmp_path / "a" / "wikitext-2-raw" / "wiki.test.raw").write_text("".join(WIKI))
    rows = [" = Title = \n", "", " A line , of words . \n", "", " Another one . \n"]  # as the Hub has them
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "b" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet")
    assert task.text("test", tmp_path / "a") == task.text("test", tmp_path / "b") == "\n\n".join(rows)
    with pytest.raises(FileNotFoundError, match=r"holds no wiki\.valid\.raw"):
        task.text("validation", tmp_path)


def test_ptb_is_one_line_of_sentences(tmp_path: Path) -> None:
    (tmp_path / "ptb.test.txt").write_text(" no it was n't black monday \n but while N <unk> \n")
    assert tasks.get("ptb_text_only").text("test", tmp_path) == "no it was n't black monday but while N <unk>"


def test_calibration_takes_no_test_split_unless_asked(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text("".join(WIKI))
    with pytest.raises(FileNotFoundError, match="neither the training nor the validation split"):
        text_of("wikitext-2-raw-v1", tmp_path, is_calibration=True)
    assert text_of("wikitext-2-raw-v1/test", tmp_path, is_calibration=True)[1] == "wikitext-2-raw-v1/test"
    (tmp_path / "wiki.valid.raw").write_text("valid\n")
    assert text_of("wikitext-2-raw-v1", tmp_path, is_calibration=True) == ("valid\n", "wikitext-2-raw-v1/validation")
    (tmp_path / "wiki.train.raw").write_text("train\n")
    assert text_of("wikitext-2-raw-v1", tmp_path, is_calibration=True)[1] == "wikitext-2-raw-v1/train"
    assert text_of("demo", is_calibration=True)[0] != text_of("demo")[0]


def test_exact_row_equals_an_independent_computation(tmp_path: Path, data_dir: Path, loaded: tuple[Any, Any]) -> None:
    row = tasks.get("wikitext-2-raw-v1").run(session_in(tmp_path, loaded), data_dir=data_dir, window=100, limit=5)
    model, tokenizer = loaded
    lines = (data_dir / "wiki.test.raw").read_text(encoding="utf-8").splitlines(keepends=True)
    ids = tokenizer("\n\n".join(line if line.strip() else "" for line in lines), return_tensors="pt")["input_ids"][0]
    losses = []
    for begin in range(0, 500, 100):
        part = ids[None, begin : begin + 100]
        with torch.no_grad():
            losses.append(model(part, labels=part).loss.item())
    assert row.value == pytest.approx(math.exp(sum(losses) / 5), rel=1e-4)


def test_a_finished_row_is_not_measured_again(
    tmp_path: Path, data_dir: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, options = tasks.get("ptb_text_only"), {"data_dir": data_dir, "window": 64, "limit": 2}
    first = task.run(session_in(tmp_path, loaded), **options)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("hf_pqcache.eval.tasks._text.perplexity", fail)
        assert task.run(session_in(tmp_path, loaded), **options) == first
        with pytest.raises(AssertionError, match="measured again"):
            task.run(session_in(tmp_path, loaded, force=True), **options)
        with pytest.raises(AssertionError, match="measured again"):
            task.run(session_in(tmp_path, loaded), **{**options, "window": 65})
    assert first.provenance["versions"]["transformers"]


def test_modes_that_say_nothing_about_a_cache_are_refused(tmp_path: Path, data_dir: Path, loaded: tuple[Any, Any]) -> None:
    for cache, mode in (("fp8", "exact"), ("dynamic", "stream"), ("static", "distort")):
        with pytest.raises(ValueError, match="says nothing about"):
            tasks.get("ptb_text_only").run(session_in(tmp_path, loaded, CacheSpec(cache)), data_dir=data_dir, mode=mode)


def test_pipeline_stages_stand_alone_and_resume(tmp_path: Path, data_dir: Path, loaded: tuple[Any, Any]) -> None:
    session = session_in(tmp_path, loaded)
    config = PQConfig(num_subspaces=16, num_bits=4, page_size=16, extended_residual=32)
    learning = Calibration("ptb_text_only", tokens=500, window=250, data_dir=data_dir, normalise=False)
    run = Pipeline(session, config, learning, "ptb_text_only", tmp_path, window=128, limit=1, with_breakdown=True)
    with pytest.raises(FileNotFoundError, match="sampling stage first"):
        run.run(["training"])
    with pytest.raises(FileNotFoundError, match="run sampling and training first"):
        run.run(["evaluation"])
    with pytest.raises(ValueError, match="unknown stages"):
        run.run(["tuning"])
    assert run.run(["sampling"]) == run.run(["training"]) == []
    book = Codebook.from_pretrained(tmp_path / "codebook")
    assert book.keys.shape == book.values.shape == (16, 16, 4)  # MILLION's: a set for each subspace, for all layers and heads
    written = (tmp_path / "samples.safetensors").stat().st_mtime_ns
    rows = run.run(["evaluation", "baseline", "sampling"])
    assert (tmp_path / "samples.safetensors").stat().st_mtime_ns == written
    exact, stream, distort = (row.value for row in rows if row.metric == "perplexity")
    assert exact < stream < distort
    assert {row.settings.get("calibrated_on") for row in rows if row.codebook} == {"ptb_text_only/train"}
    assert [row.settings.get("normalised") for row in rows if row.metric == "perplexity"] == [None, False, False]
    assert {row.metric for row in rows if row.task == "breakdown"} >= {"embedding", "append", "attention", "mlp"}


def command(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(x) for x in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def test_millions_command_line_runs(tmp_path: Path, data_dir: Path) -> None:
    flags = (
        "--dataset wikitext-2-raw-v1 -M 32 --nbits 4 -m --half --paged --page_size 16 --extended_residual 32 --max_pages 200"
    )
    more = (
        f"--data_dir {data_dir} --calibration-tokens 400 --window 128 --limit 1 -o {tmp_path} --json {tmp_path / 'rows.json'}"
    )
    stages = "-p baseline sampling training evaluation"
    for _ in range(2):  # the second time everything is there
        command(
            "run", "-f", "tiny", "--model", str(MODEL), *flags.split(), "--breakdown", *more.split(), *stages.split(), "--quiet"
        )
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["settings"]["mode"] for row in rows if row["metric"] == "perplexity"] == ["exact", "stream", "distort"]
    assert all(row["settings"]["dtype"] == "float16" for row in rows)
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)


def test_a_config_without_a_model_asks_for_one() -> None:
    for arguments, message in (
        (["-f", "small"], "--model"),
        ([], "which model"),
        (["-f", "small", "--model", str(MODEL)], "head_dim"),
    ):
        failed = CliRunner().invoke(main, ["eval", "speed", *arguments])
        assert failed.exit_code != 0
        assert message in failed.output


def test_eval_commands_yield_rows(tmp_path: Path, data_dir: Path) -> None:
    results = tmp_path / "results.jsonl"
    common = ["--model", str(MODEL), "--results", str(results), "--quiet", "--device", "cpu"]
    command("eval", "speed", *common, "--cache", "dynamic", "--lengths", "64", "--new_tokens", "4", "--repeats", "1")
    command("eval", "memory", *common, "--cache", "static", "--lengths", "64,128")
    command("eval", "recall", *common, "--cache", "dynamic", "--lengths", "96", "--depths", "0.5", "--count", "1")
    compressed = ["--cache", "pq", "--nbits", "4", "--data-dir", str(data_dir)]
    command("eval", "ptb", *common, *compressed, "--window", "64", "--limit", "1")
    found = {(row.task, row.metric, row.cache) for row in Results(results).rows}
    assert found == {
        ("speed", "ttft", "dynamic"),
        ("speed", "tpot", "dynamic"),
        ("speed", "throughput", "dynamic"),
        ("memory", "kv_bytes", "static"),
        ("memory", "codebook_bytes", "static"),
        ("memory", "reserved_bytes", "static"),
        ("recall", "recall", "dynamic"),
        ("ptb_text_only", "perplexity", "pq"),
    }
    kv = [row.value for row in Results(results).rows if row.metric == "kv_bytes"]
    assert kv[1] / kv[0] == pytest.approx(132 / 68, rel=1e-3)


def test_compare_puts_caches_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hqq", None)  # a missing library is a line, not the end; and a failure
    options = "--caches dynamic,hqq:4,pq --nbits 4 --tokens 256 --limit 1 --recall-count 1 --new-tokens 2"
    files = ["--markdown", str(tmp_path / "table.md"), "--json", str(tmp_path / "table.json")]
    more = ["--quiet", "--results", str(tmp_path / "r.jsonl")]
    told = command("compare", "--model", str(MODEL), *options.split(), *files, *more, code=1)
    assert "Error: 1 of 3 caches were not measured: hqq 4 bits" in told
    dynamic, missing, ours = json.loads((tmp_path / "table.json").read_text())["table"]
    assert (dynamic["change"], dynamic["bits"]) == (0, 16)
    assert (dynamic["slowdown"], ours["slowdown"]) == (1, ours["tpot_ms"] / dynamic["tpot_ms"])
    assert "pip install hqq" in missing["note"]
    assert ours["cache"] == "pq M=32 n=4"
    assert ours["kv_bytes"] < dynamic["kv_bytes"]
    assert ours["perplexity"] != dynamic["perplexity"]
    assert (tmp_path / "table.md").read_text().count("\n") == 5
    assert "calibrating" not in told
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []  # no codebook is made


def test_compare_draws_loss_against_true_bits_of_several_texts(tmp_path: Path) -> None:
    """Two texts, one measure; what is there already is neither measured again nor left out of the picture."""
    (tmp_path / "own.txt").write_text(TEXT.read_text()[:3000])
    files = {name: tmp_path / name for name in ("bits.png", "table.md", "table.json")}
    options = ["--caches", "dynamic,kivi:2:g32,int4-token:own", "--measure", "perplexity", "--tokens", "256", "--limit", "1"]
    options += ["--text", "demo", "--text", str(tmp_path / "own.txt"), "--results", str(tmp_path / "r.jsonl"), "--quiet"]
    output = ["--plot", files["bits.png"], "--markdown", files["table.md"], "--json", files["table.json"]]
    command("compare", "--model", str(MODEL), *options, *map(str, output))
    assert files["bits.png"].read_bytes().startswith(b"\x89PNG")
    assert "| cache | perplexity | change | own.txt | change | recall |" in files["table.md"].read_text()
    document = json.loads(files["table.json"].read_text())
    exact, kivi, own = document["table"]
    assert (exact["true_bits"], kivi["true_bits"], own["true_bits"]) == (16, 3, 4.5)
    assert (kivi["recall"], kivi["kv_bytes"], own["cache"]) == (None, None, "int4-token, own window")
    assert list(kivi["texts"]) == ["demo/test", "own.txt"]
    assert kivi["texts"]["demo/test"] == [kivi["perplexity"], kivi["change"]]
    assert {row["metric"] for row in document["rows"]} == {"perplexity"}
    before = (tmp_path / "r.jsonl").read_text()
    command("compare", "--model", str(MODEL), *options, *map(str, output))
    assert (tmp_path / "r.jsonl").read_text() == before
    command("compare", "--model", str(MODEL), *options, "--outliers", "30")
    planted = Results(tmp_path / "r.jsonl").rows[len(before.splitlines()) :]
    assert {row.settings["outliers"] for row in planted} == {30}
    assert planted[0].value == pytest.approx(exact["perplexity"], rel=1e-3)  # bfloat16
    assert planted[-1].cache == "int4-token"
    assert planted[-1].value > 1.05 * planted[1].value
    for wrong, why in (
        (["--measure", "speed", "--plot", "x.png"], "add perplexity to --measure"),
        (["--measure", "taste"], "taste: use some of perplexity, recall, memory, speed"),
    ):
        assert why in command("compare", "--model", str(MODEL), *wrong, code=2)


def test_bad_input_ends_with_a_message(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["eval", "speed", "--model", str(MODEL), "--cache", "zip"])
    assert result.exit_code == 1
    assert "use one of" in result.output


def test_a_cache_has_the_shipped_codebook_unless_another_is_asked_for(tmp_path: Path, capsys: Any) -> None:
    def cache(name: str = "pq", **options: Any) -> CacheSpec:
        setup = prepare(str(MODEL), [name], device="cpu", **options)
        return setup.ready(setup.open(), setup.specs[0]).cache

    for name, label in (("pq", "pq 4 bits"), ("pq:2", "pq 2 bits")):
        assert cache(name).codebook is None
        assert cache(name).label == label
    assert "calibrating" not in capsys.readouterr().err
    asked = cache("pq:3", calibration="demo", overrides={"calibration_tokens": 400})
    assert "calibrating on the embedded articles, 400 of its" in capsys.readouterr().err
    assert asked.codebook is not None
    assert (asked.label, asked.codebook.codes("value", 64)) == ("pq 3 bits", PQConfig(bits=3).codes("value", 64))
    asked.codebook.save_pretrained(tmp_path / "book")
    given = cache("pq", codebook=str(tmp_path / "book"))  # whose codes it takes
    assert given.codebook == asked.codebook
    assert given.config.codes("value", 64) == PQConfig(bits=3).codes("value", 64)
    assert "calibrating" not in capsys.readouterr().err


def test_a_codebook_is_learnt_once_for_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = prepare(str(MODEL), ["pq"], device="cpu", progress=False, calibration="demo", overrides={"calibration_tokens": 300})
    session, learnt = setup.open(), []
    monkeypatch.setattr(Calibration, "codebook", lambda self, session, config: learnt.append(config) or random_book())
    for recent in (32, 64):
        for bits in (4, 3):
            spec = CacheSpec("pq", PQConfig(bits=bits, extended_residual=recent).to_dict())
            assert setup.ready(session, spec).cache.codebook == random_book()
    assert [config.bits for config in learnt] == [4, 3]


def random_book() -> Codebook:
    generator = torch.Generator().manual_seed(0)
    return Codebook(*(torch.randn(1, 256, 2, generator=generator).half() for _ in range(2)))
