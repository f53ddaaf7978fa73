"""A published repository is whole, tells nothing of this machine, loads back, and generates through its own recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_pqcache import Codebook, PagedPQCache, demo
from hf_pqcache.cli import main
from hf_pqcache.config import OPERATING_POINTS
from hf_pqcache.eval.publish import RECIPE, evaluations, model_config, publish
from hf_pqcache.eval.session.model_config import load_model_config
from hf_pqcache.eval.session.results import Results, Row
from hf_pqcache.models.names import cache_kwargs

REPO = "user/book"
FILES = {
    "README.md",
    "codebook.json",
    "codebook.safetensors",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
    "model_config.yaml",
}
SETTINGS = {"page_size": 16, "extended_residual": 16, "sink_tokens": 4}
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own


def book() -> Codebook:
    """For any model, centroids at random."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 16, 2, generator=generator).half() for _ in range(2))
    metadata = {"model": "user/tiny", "tokens": 100, "seed": 0, "window": 64, "source": "wikitext-2-raw-v1/train"}
    return Codebook(keys, values, metadata=metadata, settings=SETTINGS)


def row(value: float, codebook: str | None, **kw: Any) -> Row:
    config = {"num_subspaces": 32, "num_bits": 4, **SETTINGS}
    values = {"model": "tiny", "cache": "pq", "cache_config": config, "true_bits": 2.5, "settings": {"window": 64}}
    return Row(
        **{"task": "wikitext-2-raw-v1/test", "metric": "perplexity", **values, "value": value, "codebook": codebook, **kw}
    )


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """(folder of a codebook, file of its results)."""
    book().save_pretrained(tmp_path / "codebook")
    results = Results(tmp_path / "rows.jsonl")
    results.add(row(20.0, None, cache="dynamic", cache_config={}, true_bits=16.0, settings={"window": 64, "mode": "exact"}))
    results.add(row(20.5, book().fingerprint))
    results.add(row(29.0, "f" * 64, cache_config={"num_subspaces": 16, "num_bits": 4, **SETTINGS}))
    for depth, found in ((0.0, 1.0), (1.0, 0.5)):
        results.add(row(found, book().fingerprint, task="recall", metric="recall", settings={"tokens": 64, "depth": depth}))
    for tokens in (64, 128):
        results.add(row(3.0, book().fingerprint, task="speed", metric="tpot", unit="ms", settings={"tokens": tokens}))
    results.add(row(1.0, None, model="another"))
    return tmp_path / "codebook", tmp_path / "rows.jsonl"


def test_a_dry_run_writes_everything_and_asks_nobody(made: tuple[Path, Path], tmp_path: Path, fake_hub: Any) -> None:
    address, files = publish(made[0], REPO, [made[1]], license="mit", dry_run=tmp_path / "out")
    assert fake_hub.requests == []
    assert address == str(tmp_path / "out")
    plots = {name for name in files if name.startswith("plots/")}
    assert set(files) == FILES | {"results.jsonl"} | plots
    assert len(plots) == 3
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("mit", "user/tiny", ["Salesforce/wikitext"])
    assert all(f"]({name})" in card.content for name in plots)
    assert "| pq M=32 n=4 |" in card.content
    assert "| keys | a code of 4 bits for 2 numbers, 2 bits a number without scales |" in card.content
    assert "20.50" in card.content
    assert "another" not in card.content
    measured = {result.metric_type: result for result in card.data.eval_results}
    assert set(measured) == {"perplexity", "recall"}  # times and bytes are no evaluation
    assert measured["perplexity"].metric_value == 20.5
    assert measured["perplexity"].dataset_type == "Salesforce/wikitext"
    assert (measured["perplexity"].dataset_config, measured["perplexity"].dataset_split) == ("wikitext-2-raw-v1", "test")
    assert measured["recall"].metric_value == 0.75
    rows = Results(tmp_path / "out" / "results.jsonl").rows
    assert {r.model for r in rows} == {"tiny"}
    for file in files:
        assert str(tmp_path).encode() not in (tmp_path / "out" / file).read_bytes(), f"{file} tells where it was made"
    config = load_model_config(tmp_path / "out" / "model_config.yaml")
    assert (config.codebook, config.model, config.page_size) == (REPO, "user/tiny", 16)


def test_a_codebook_that_no_cache_takes_is_not_published(tmp_path: Path) -> None:
    Codebook(*(torch.randn(32, 16, 2).half() for _ in range(2))).save_pretrained(tmp_path / "million")
    with pytest.raises(ValueError, match=r"MILLION.*no cache takes it.*pqcache calibrate"):
        publish(tmp_path / "million", REPO, license="mit", dry_run=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("own", "is_told"), [(0.01, False), (0.02, True), (0.03, True)])
def test_it_is_told_that_nobody_needs_a_codebook_which_does_not_win(tmp_path: Path, own: float, is_told: bool) -> None:
    facts = {"held_out": "demo/test", "held_out_loss": own, "held_out_loss_shipped": 0.02}
    replace(book(), metadata=facts).save_pretrained(tmp_path / "codebook")
    line = ["publish", str(tmp_path / "codebook"), "--repo", REPO, "--license", "mit", "--dry-run", str(tmp_path / "out")]
    done = CliRunner().invoke(main, line)
    assert done.exit_code == 0, done.output
    assert ("nobody needs it" in done.output) == is_told


@pytest.mark.parametrize("point", OPERATING_POINTS)
def test_the_model_config_names_the_operating_point(point: int) -> None:
    keys, values = (torch.randn(1, 1 << n, width).half() for width, n in OPERATING_POINTS[point])
    made = model_config(Codebook(keys, values, settings={"page_size": 32}), REPO)
    assert (made.bits, made.codebook, made.page_size) == (point, REPO, 32)


def test_figures_of_other_settings_are_never_mixed_in() -> None:
    others = {"num_subspaces": 32, "num_bits": 4, **SETTINGS, "page_size": 64}
    fitting, other = row(20.5, book().fingerprint), row(20.1, book().fingerprint, cache_config=others)
    assert [e["metric_value"] for e in evaluations(book(), [fitting, other])] == [20.5]
    third = row(20.3, book().fingerprint, cache_config={**others, "page_size": 128})
    apart = evaluations(book(), [other, third])
    assert [e["metric_value"] for e in apart] == [20.1, 20.3]
    assert len({e["metric_name"] for e in apart}) == 2


def test_results_of_another_codebook_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    Results(tmp_path / "other.jsonl").add(row(29.0, "f" * 64))
    with pytest.raises(ValueError, match="no row of the results was measured with this codebook"):
        publish(made[0], REPO, [tmp_path / "other.jsonl"], license="mit", dry_run=tmp_path / "out")


@pytest.mark.parametrize("name", ["book", "user/book/more", "us er/book", "user/--book"])
def test_a_wrong_repository_is_refused_before_anything_happens(made: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"user/name|[Rr]epo id"):
        publish(made[0], name, license="mit", dry_run=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_publishes_in_one_commit(made: tuple[Path, Path], tmp_path: Path, fake_hub: Any) -> None:
    line = ["publish", str(made[0]), "--repo", REPO, "--results", str(made[1]), "--license", "mit", "--private"]
    done = CliRunner().invoke(main, [*line, "-f", "tiny", "--json", str(tmp_path / "done.json")])
    assert done.exit_code == 0, done.output
    stored = fake_hub.repositories[REPO]
    assert stored.is_private
    assert fake_hub.count(f"POST /api/models/{REPO}/commit") == 1
    told = json.loads((tmp_path / "done.json").read_text())
    assert told["address"].endswith(stored.branches["main"])
    assert set(told["files"]) < set(stored.commits[stored.branches["main"]])
    cache = PagedPQCache.from_pretrained(REPO, load_tiny().config, cache_dir=tmp_path / "cache", max_pages=8)
    assert cache._settings.page_size == 64  # the model config's, as asked for
    assert cache._settings.max_pages == 8


@pytest.mark.parametrize(("status", "message"), [(401, "401"), (403, "403"), (500, "500")])
def test_command_reports_a_refusal_and_fails(made: tuple[Path, Path], fake_hub: Any, status: int, message: str) -> None:
    fake_hub.fail("POST /api/repos/create", status, times=99)
    done = CliRunner().invoke(main, ["publish", str(made[0]), "--repo", REPO, "--license", "mit"])
    assert done.exit_code == 1
    assert message in done.output
    assert "hf_This" not in done.output
    assert "Traceback" not in done.output


def test_command_says_that_there_is_no_connection(
    made: tuple[Path, Path], fake_hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    done = CliRunner().invoke(main, ["publish", str(made[0]), "--repo", REPO, "--license", "mit"])
    assert done.exit_code == 1
    assert "cannot be reached" in done.output


def load_tiny() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32).eval()


@pytest.mark.cache
def test_recipe_generates_from_a_folder_as_the_cache_does(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    out = tmp_path / "out"
    publish(made[0], REPO, license="mit", dry_run=out)
    model, tokenizer = load_tiny(), AutoTokenizer.from_pretrained(demo.MODEL)
    inputs = tokenizer(demo.TEXT.read_text()[:600], return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **options, **cache_kwargs(PagedPQCache(model.config, book(), **SETTINGS)))
    recipe = {"custom_generate": str(out), "codebook": str(out), "trust_remote_code": True}
    assert torch.equal(model.generate(**inputs, **options, **recipe), expected)
    given = PagedPQCache(model.config, book(), **SETTINGS)
    model.generate(**inputs, **options, **recipe, **cache_kwargs(given))
    assert given.get_seq_length() > inputs["input_ids"].shape[1]
    exact = model.generate(**inputs, **options)
    assert not torch.equal(exact, expected)  # random centroids: the recipe's cache was really used


@pytest.mark.cache
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_recipe_takes_a_cache_under_either_name_and_then_loads_no_codebook(tmp_path: Path, name: str) -> None:
    recipe: dict[str, Any] = {}
    exec(RECIPE.format(repo_id=str(tmp_path / "nothing here")), recipe)
    model = load_tiny()
    given = PagedPQCache(model.config, book(), **SETTINGS)
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    recipe["generate"](model, inputs=torch.arange(5, 45)[None], **{name: given}, **options)
    assert given.get_seq_length() == 41


@pytest.mark.slow
def test_recipe_generates_from_the_hub(made: tuple[Path, Path], tmp_path: Path, fake_hub: Any) -> None:
    """In a process of its own, whose huggingface_hub knows no other Hub than the stand-in; pinned by commit."""
    publish(made[0], REPO, license="mit")
    commit = fake_hub.repositories[REPO].branches["main"]
    fake_hub.repositories[REPO].commit({"custom_generate/generate.py": b"raise RuntimeError('not the pinned one')"})
    script = f"""
import torch
from transformers import AutoModelForCausalLM
from hf_pqcache import demo
model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
ids = torch.arange(5, 205)[None]
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0,
                     custom_generate="{REPO}", revision="{commit}", trust_remote_code=True)
print(out.shape[1])
"""
    environment = {**os.environ, "HF_ENDPOINT": fake_hub.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("204")
    assert fake_hub.count(f"GET /{REPO}/resolve/{commit}/custom_generate/generate.py") == 1
    assert "hf_This" not in done.stdout + done.stderr
