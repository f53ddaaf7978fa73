"""Samples are the same however few layers are taken at a time, in memory or on disk; nothing is kept unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import done, llama, save
from safetensors import safe_open

from hf_pqcache import PQConfig, calibrate
from hf_pqcache.codebook.calibrate import learn
from hf_pqcache.codebook.samples import KeptSamples, LiveSamples, keep

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = PQConfig(num_bits=4, num_subspaces=8)
IDS = torch.randint(3, 4096, (900,), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"num_tokens": 500, "window": 100, "progress": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(num_hidden_layers=4)


@pytest.mark.parametrize("normalise", [False, True])
def test_little_memory_makes_the_same_codebook(model: Any, normalise: bool) -> None:
    options: dict[str, Any] = {**OPTIONS, "normalise": normalise}
    books = [calibrate(model, None, IDS, CONFIG, **options, max_sample_bytes=n) for n in (None, 1, 70_000)]
    assert len({book.fingerprint for book in books}) == 1


def test_no_more_samples_are_in_memory_than_allowed(model: Any) -> None:
    per_layer = 2 * 500 * 2 * 16
    samples = LiveSamples(model, None, IDS, CONFIG, **OPTIONS, max_bytes=2 * per_layer)
    assert [len(group) for group in samples._groups()] == [2, 2]
    assert [len(group) for group in LiveSamples(model, None, IDS, CONFIG, **OPTIONS, max_bytes=1)._groups()] == [1] * 4
    model.train()
    first = next(samples.layers())
    assert model.training
    model.eval()
    assert first[1].shape == first[2].shape == (1, 500, 16)


def test_kept_samples_are_the_live_ones(model: Any, tmp_path: Path) -> None:
    live = LiveSamples(model, None, IDS, CONFIG, **OPTIONS, max_bytes=1)
    kept = keep(live, tmp_path / "samples.safetensors", {"source": "here"})
    assert kept.metadata == {**live.metadata, "source": "here"}
    assert (kept.shapes, kept.tokens) == (live.shapes, live.tokens)
    for (i, *ours), (j, *theirs) in zip(live.layers(), kept.layers(), strict=True):
        assert i == j
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert learn(kept, CONFIG, progress=False).fingerprint == learn(live, CONFIG, progress=False).fingerprint
    with safe_open(tmp_path / "samples.safetensors", framework="pt") as file:  # any reader of the format can
        assert len(list(file.keys())) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["samples.safetensors"]


def test_a_torn_file_never_has_the_name(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveSamples(model, None, IDS, CONFIG, **OPTIONS)
    monkeypatch.setattr(live, "layers", lambda: iter([(0, None, None)]))
    with pytest.raises(AttributeError):
        keep(live, tmp_path / "samples.safetensors")
    assert not list(tmp_path.iterdir())
    (tmp_path / "other.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="no sampled keys"):
        KeptSamples(tmp_path / "other.safetensors")


def test_run_keeps_no_samples_unless_asked(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model")
    for name in ("train", "test"):
        (tmp_path / f"ptb.{name}.txt").write_text("the cat sat on the mat and saw the other cat " * 40)
    common = (
        "--model",
        folder,
        "--dataset",
        "ptb_text_only",
        "--data-dir",
        tmp_path,
        "--nbits",
        4,
        "--window",
        64,
        "--limit",
        1,
    )
    common += ("--calibration-tokens", 300, "--quiet", "--device", "cpu")
    done("run", *common, "-o", tmp_path / "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"codebook", "results.jsonl"}
    made = (tmp_path / "a" / "codebook" / "codebook.safetensors").stat().st_mtime_ns
    done("run", *common, "-o", tmp_path / "a")  # what is there is not made again
    assert (tmp_path / "a" / "codebook" / "codebook.safetensors").stat().st_mtime_ns == made
    done("run", *common, "-o", tmp_path / "b", "--keep-samples")
    done("run", *common, "-o", tmp_path / "c", "-p", "sampling")
    books = [(tmp_path / x / "codebook" / "codebook.safetensors").read_bytes() for x in "ab"]
    assert books[0] == books[1]
    sizes = [(tmp_path / x / "samples.safetensors").stat().st_size for x in "bc"]
    assert sizes[0] == sizes[1] > 252 * 2 * 2 * 2 * 16
