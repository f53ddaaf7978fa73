"""A figure or codebook of one model is never taken for another's, however much their folders are alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import done, llama, pqcache, save
from click.testing import Result

from hf_pqcache import Codebook, PQConfig, calibrate
from hf_pqcache.demo import TEXT
from hf_pqcache.eval.report.html import render
from hf_pqcache.eval.session.results import Results, Row
from hf_pqcache.eval.session.session import Session
from hf_pqcache.eval.tasks import get
from hf_pqcache.models.identity import folder_fingerprint, weights_fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = ("--device", "cpu", "--calibration-tokens", 300)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    words = TEXT.read_text(encoding="utf-8").split()
    for name, part in (("train", words[:900]), ("valid", words[900:1200]), ("test", words[1200:1600])):
        (folder / f"ptb.{name}.txt").write_text(" ".join(part), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models of one shape in folders of one name."""
    root = tmp_path_factory.mktemp("models")
    return save(llama(0), root / "A" / "ckpt"), save(llama(1), root / "B" / "ckpt")


def perplexities(path: Path) -> list[float]:
    return [row.value for row in Results(path).rows if row.metric == "perplexity"]


def evaluated(model: str, results: Path, data_dir: Path, *more: object) -> Result:
    options = ("--data-dir", data_dir, "--window", 64, "--limit", 1)
    return done("eval", "ptb", "--model", model, "--results", results, *options, *FAST[:2], *more)


def test_a_row_of_a_namesake_is_not_taken(twins: tuple[str, str], data_dir: Path, tmp_path: Path) -> None:
    alone = []
    for i, model in enumerate(twins):
        evaluated(model, tmp_path / "both.jsonl", data_dir, "--cache", "dynamic")
        evaluated(model, tmp_path / f"{i}.jsonl", data_dir, "--cache", "dynamic")
        alone += perplexities(tmp_path / f"{i}.jsonl")
    assert perplexities(tmp_path / "both.jsonl") == alone
    assert alone[0] != alone[1]
    for model in twins:  # both are found again
        evaluated(model, tmp_path / "both.jsonl", data_dir, "--cache", "dynamic")
    assert len((tmp_path / "both.jsonl").read_text().splitlines()) == 2


def test_a_run_of_a_namesake_is_a_run_of_its_own(twins: tuple[str, str], data_dir: Path, tmp_path: Path) -> None:
    common = ("--dataset", "ptb_text_only", "--data-dir", data_dir, "--window", 64, "--limit", 1, "--nbits", 4, *FAST)
    common += ("--page-size", 16, "--extended-residual", 16)
    for model in twins:
        done("run", "--model", model, *common, "-o", tmp_path / "shared")
    for model in twins:
        done("run", "--model", model, *common, "-o", tmp_path / Path(model).parent.name)
    alone = [value for name in "AB" for value in perplexities(tmp_path / name / "results.jsonl")]
    assert perplexities(tmp_path / "shared" / "results.jsonl") == alone
    assert len(set(alone)) == 6
    # The folder now has B's codebook: A's evaluation refuses it.
    refused = pqcache("run", "--model", twins[0], *common, "-o", tmp_path / "shared", "-p", "evaluation", "--force")
    assert refused.exit_code == 1
    assert "other weights" in refused.output


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_calibrate_makes_a_codebook_of_the_model_it_is_given(
    twins: tuple[str, str], tmp_path: Path, force: tuple[str, ...]
) -> None:
    for model in twins:
        out = tmp_path / Path(model).parent.name
        done("calibrate", "--model", model, "--nbits", 4, *FAST, "--results", tmp_path / "rows.jsonl", "-o", out, *force)
    a, b = (Codebook.from_pretrained(tmp_path / name) for name in "AB")
    assert a.fingerprint != b.fingerprint
    assert a.metadata["model_fingerprint"] != b.metadata["model_fingerprint"]
    assert a.metadata["model"] == b.metadata["model"] == "ckpt"


def test_a_model_of_the_hub_is_its_commit(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commits in the Hub's local cache, read without a network: main is the second one."""
    commits = ["1" * 40, "2" * 40]
    repository = tmp_path / "hub" / "models--user--tiny"
    for seed, commit in enumerate(commits):
        save(llama(seed), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[1])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what asks all the same waits for its answer
    monkeypatch.setattr("hf_pqcache.codebook.hub.is_reachable", lambda: False)
    monkeypatch.chdir(tmp_path)
    for revision in ((), ("--revision", commits[0]), ("--revision", commits[1]), ("--revision", "main")):
        evaluated("user/tiny", tmp_path / "rows.jsonl", data_dir, "--cache", "dynamic", *revision)
    rows = Results(tmp_path / "rows.jsonl").rows
    assert [row.model_fingerprint for row in rows] == [f"commit:{commits[1]}", f"commit:{commits[0]}"]
    assert rows[0].value != rows[1].value
    assert {row.model for row in rows} == {"user/tiny"}


def test_weights_changed_in_place_are_other_weights(data_dir: Path, tmp_path: Path) -> None:
    model = llama(2)
    folder = save(model, tmp_path / "ckpt")
    seen = {folder_fingerprint(folder)}
    evaluated(folder, tmp_path / "rows.jsonl", data_dir, "--cache", "dynamic")
    with torch.no_grad():
        model.lm_head.weight[5, 3] += 1.0  # one number of one matrix
    save(model, tmp_path / "ckpt")
    evaluated(folder, tmp_path / "rows.jsonl", data_dir, "--cache", "dynamic")
    assert len(perplexities(tmp_path / "rows.jsonl")) == 2
    seen.add(folder_fingerprint(folder))
    config = json.loads((tmp_path / "ckpt" / "config.json").read_text())
    (tmp_path / "ckpt" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    seen.add(folder_fingerprint(folder))
    assert len(seen) == 3


def test_a_copy_elsewhere_is_the_same_model(twins: tuple[str, str], data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(twins[0], tmp_path / "elsewhere" / "ckpt")
    (tmp_path / "elsewhere" / "ckpt" / "optimizer.pt").write_bytes(b"not a part of the model")
    for model in (twins[0], str(tmp_path / "elsewhere" / "ckpt")):
        evaluated(model, tmp_path / "rows.jsonl", data_dir, "--cache", "dynamic")
    assert len(Results(tmp_path / "rows.jsonl")) == 1


def test_a_model_trained_in_memory_is_seen(data_dir: Path) -> None:
    from transformers import AutoTokenizer

    from hf_pqcache import demo

    model, tokenizer = llama(3), AutoTokenizer.from_pretrained(demo.MODEL)
    session = Session(model.eval(), tokenizer, "mine", progress=False)

    def measured() -> Row:
        row: Row = get("ptb_text_only").run(session, data_dir=data_dir, window=64, limit=1)
        return row

    first = measured()
    assert measured() is first
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3.0)
    second = measured()
    assert second.value != first.value
    assert len(session.results) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_has_one_fingerprint_in_all_dtypes(dtype: torch.dtype) -> None:
    model = llama(4).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # within float16's normal numbers, as weights are
            parameter.copy_(torch.where(parameter.abs() < 1e-3, torch.full_like(parameter, 1e-3), parameter))
    expected = weights_fingerprint(model)
    assert weights_fingerprint(model.to(dtype)) == expected


def test_another_models_codebook_is_used_only_aloud(twins: tuple[str, str], data_dir: Path, tmp_path: Path) -> None:
    done("calibrate", "--model", twins[0], "--nbits", 4, *FAST, "-o", tmp_path / "cb")
    for model in twins:
        found = evaluated(model, tmp_path / "rows.jsonl", data_dir, "--cache", "pq", "--codebook", tmp_path / "cb")
        assert ("other weights" in found.output) == (model == twins[1])
    own, other = Results(tmp_path / "rows.jsonl").rows
    assert "codebook_of" not in own.settings
    assert other.settings["codebook_of"].startswith("ckpt (")


def test_a_codebook_made_in_python_knows_its_model(twins: tuple[str, str], data_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model, tokenizer = llama(0), AutoTokenizer.from_pretrained(twins[0])
    text = TEXT.read_text(encoding="utf-8")[:3000]
    calibrate(model, tokenizer, text, PQConfig(num_bits=4), num_tokens=300, progress=False).save_pretrained(tmp_path / "cb")
    for model_name in twins:
        found = evaluated(model_name, tmp_path / "rows.jsonl", data_dir, "--cache", "pq", "--codebook", tmp_path / "cb")
        assert ("other weights" in found.output) == (model_name == twins[1])


@pytest.mark.parametrize(("made_in", "used_in"), [("float32", "float16"), ("float16", "float32"), ("float32", "bfloat16")])
def test_the_dtype_that_a_model_is_loaded_in_makes_it_no_other_model(
    made_in: str, used_in: str, twins: tuple[str, str], data_dir: Path, tmp_path: Path
) -> None:
    """A float32 checkpoint, the codebook made in Python in one dtype and used in another."""
    from transformers import AutoTokenizer

    text, tokenizer = TEXT.read_text(encoding="utf-8")[:3000], AutoTokenizer.from_pretrained(twins[0])
    model = llama(0).to(getattr(torch, made_in))
    calibrate(model, tokenizer, text, PQConfig(num_bits=4), num_tokens=300, progress=False).save_pretrained(tmp_path / "cb")
    line = (tmp_path / "rows.jsonl", data_dir, "--cache", "pq", "--codebook", tmp_path / "cb", "--dtype", used_in)
    for model_name in twins:
        assert ("other weights" in evaluated(model_name, *line).output) == (model_name == twins[1])


def test_namesakes_have_names_of_their_own_in_a_report() -> None:
    def row(fingerprint: str, value: float, **more: Any) -> Row:
        return Row("wiki", "perplexity", value, model="ckpt", model_fingerprint=fingerprint, settings={"window": 64}, **more)

    bits: dict[str, Any] = {"cache": "pq", "cache_config": {"num_subspaces": 8, "num_bits": 8}, "true_bits": 4.0}
    rows = [
        row("files:aaaaaa1", 40.0),
        row("files:aaaaaa1", 41.0, **bits),
        row("files:bbbbbb1", 50.0),
        row("files:bbbbbb1", 51.0, **bits),
    ]
    page = render(rows, "t")
    assert "ckpt #aaaaaa" in page
    assert "ckpt #bbbbbb" in page
    assert "+2.50 %" in page  # each against its own exact cache
    assert "+2.00 %" in page
    assert "ckpt #" not in render(rows[:2], "t")
