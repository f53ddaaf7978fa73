"""A codebook survives a round trip, and every broken file is refused with words that say what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from hf_pqcache import PagedPQCache, disable_batching, enable_batching
from hf_pqcache.codebook import hub, shipped
from hf_pqcache.codebook.codebook import CONFIG_FILE, TENSOR_FILE, Codebook, to_float16
from hf_pqcache.config import PQConfig


def make(width: int = 2, bits: int = 4, sets: int = 1, seed: int = 0, **kw: Any) -> Codebook:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(sets, 1 << bits, width, generator=generator).half() for _ in range(2))
    return Codebook(keys, values, **{"metadata": {"model": "user/model", "tokens": 10}, **kw})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path)
    return tmp_path


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    book = make(gains=(1.02, 1.5), settings={"page_size": 32})
    book.save_pretrained(tmp_path / "new" / "folder")
    again = Codebook.from_pretrained(tmp_path / "new" / "folder")
    assert again.fingerprint == book.fingerprint
    assert (again.gains, again.metadata, again.settings) == (book.gains, book.metadata, book.settings)
    assert torch.equal(again.keys, book.keys)
    assert torch.equal(again.values, book.values)
    assert book.nbytes == 2 * 16 * 2 * 2
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [CONFIG_FILE, TENSOR_FILE]


def test_sides_may_differ_and_one_codebook_serves_every_head_dim(tmp_path: Path) -> None:
    book = Codebook(torch.randn(1, 256, 2).half(), torch.randn(1, 64, 4).half())
    book.save_pretrained(tmp_path)
    assert Codebook.from_pretrained(tmp_path).fingerprint == book.fingerprint
    assert [book.codes("key", d) for d in (16, 80, 128)] == [(8, 8), (40, 8), (64, 8)]
    assert book.codes("value", 128) == (32, 6)
    config = book.config(128, 64)
    assert (config.codes("key", 128), config.codes("value", 64)) == ((64, 8), (16, 6))
    with pytest.raises(ValueError, match="4 numbers fits no values of 18"):
        book.codes("value", 18)


def test_million_has_a_set_for_each_subspace_and_no_cache_takes_it(tmp_path: Path) -> None:
    book = make(sets=8)
    assert make().is_normalised
    assert not book.is_normalised
    assert book.codes("key", 16) == (8, 4)
    with pytest.raises(ValueError, match="fits no keys of 32"):
        book.codes("key", 32)
    with pytest.raises(ValueError, match=r"MILLION.*caches take normalised ones"):
        PagedPQCache(llama(), book)


def test_fingerprint_sees_every_number() -> None:
    book, other = make(), make()
    assert book.fingerprint == other.fingerprint == book.to("cpu").fingerprint
    values = other.values.clone()
    values[0, 7, 1] += 1
    assert make().fingerprint != Codebook(other.keys, values).fingerprint
    assert make().fingerprint != make(gains=(1.0, 1.01)).fingerprint


def test_codebooks_can_be_compared_and_hashed(tmp_path: Path) -> None:
    """Equal are those that code alike, whatever is told of how they were made and wherever they lie."""
    book = make()
    book.save_pretrained(tmp_path)
    again = replace(Codebook.from_pretrained(tmp_path), metadata={"source": "elsewhere"})
    assert book == again == again.to("cpu")
    others = (make(bits=5), make(seed=1), make(settings={"page_size": 32}))
    assert len({book, again, *others}) == 4
    assert book not in (*others, None, "a codebook")


def test_overflow_of_float16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"7e\+04 does not fit float16"):
        to_float16(torch.tensor([1.0, 70000.0]), "keys")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (torch.randn(1, 16, 2), "keys has dtype torch.float32, expected torch.float16"),
        (torch.randn(16, 2).half(), r"keys has shape \(16, 2\), expected"),
        (torch.randn(1, 15, 2).half(), "keys has 15 centroids; use one of"),
        (torch.randn(1, 512, 2).half(), "keys has 512 centroids; use one of"),
        (torch.zeros(1, 16, 0).half(), "expected"),
        (torch.full((1, 16, 2), float("nan")).half(), "NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(keys: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codebook(keys, torch.randn(1, 16, 2).half())


@pytest.mark.parametrize("gains", [(1.0,), (1.0, 300.0), (1.0, float("nan")), ("1", "1")])
def test_gains_that_mean_nothing_are_refused(gains: Any) -> None:
    with pytest.raises(ValueError, match="gains="):
        make(gains=gains)


def llama(**kw: Any) -> LlamaConfig:
    sizes = {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "head_dim": 16,
    }
    return LlamaConfig(**{**sizes, **kw})


def test_check_model_says_what_differs() -> None:
    for config in (llama(), llama(num_hidden_layers=2), llama(num_key_value_heads=4), llama(head_dim=32)):
        make().check_model(config)  # one set serves all layers and heads
    with pytest.raises(ValueError, match=r"layer 0: .* of 3 numbers fits no keys of 16; .*user/model.*none at all"):
        make(width=3).check_model(llama())


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = json.loads((folder / CONFIG_FILE).read_text())
        change(data)
        (folder / CONFIG_FILE).write_text(json.dumps(data))

    return apply


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = load_file(folder / TENSOR_FILE)
        change(data)
        save_file(data, folder / TENSOR_FILE)

    return apply


def truncate(folder: Path) -> None:
    content = (folder / TENSOR_FILE).read_bytes()
    (folder / TENSOR_FILE).write_bytes(content[:-100])


BROKEN = {
    "truncated": (truncate, "damaged or cut short"),
    "empty tensors": (write(TENSOR_FILE, b""), "damaged or cut short"),
    "pickle": (write(TENSOR_FILE, b"\x80\x04\x95" + b"\0" * 64), "damaged or cut short"),
    "absurd header": (write(TENSOR_FILE, b"\xff" * 7 + b"\x7f" + b"{}"), "damaged or cut short"),
    "absurd shape": (
        write(
            TENSOR_FILE,
            (len(h := b'{"keys":{"dtype":"F16","shape":[99999999,99999999],"data_offsets":[0,8]}}')).to_bytes(8, "little")
            + h
            + b"\0" * 8,
        ),
        "damaged or cut short",
    ),
    "missing tensor": (tensors(lambda t: t.pop("keys")), r"holds \['values'\]"),
    "unknown tensor": (tensors(lambda t: t.update(extra=torch.zeros(1))), r"holds \['extra'"),
    "of an older version": (tensors(lambda t: t.update({"layers.0.keys": t.pop("keys")})), r"holds \['layers.0.keys'"),
    "wrong dtype": (tensors(lambda t: t.update(keys=t["keys"].float())), "dtype torch.float32"),
    "nan": (tensors(lambda t: t["values"].fill_(float("nan"))), "values contains NaN"),
    "wrong shape": (tensors(lambda t: t.update(keys=t["keys"][:, :7].clone())), "7 centroids"),
    "other numbers": (tensors(lambda t: t["values"].mul_(2)), "fingerprint"),
    "no json": (write(CONFIG_FILE, b"\x00\xff\xfe"), "not valid JSON"),
    "half json": (write(CONFIG_FILE, b'{"format": '), "not valid JSON"),
    "deep json": (write(CONFIG_FILE, b"[" * 200_000), "not valid JSON"),
    "huge json": (write(CONFIG_FILE, b" " * (1 << 20) + b"{}"), "bytes"),
    "list": (write(CONFIG_FILE, b"[1]"), "must hold a JSON object, got list"),
    "other format": (edit(lambda d: d.update(format="x")), "is no codebook description"),
    "older schema": (edit(lambda d: d.update(schema_version=1)), "leave it out, caches need no codebook any more"),
    "newer schema": (edit(lambda d: d.update(schema_version=3)), "update hf_pqcache"),
    "missing key": (edit(lambda d: d.pop("metadata")), r"lacks \['metadata'\]"),
    "metadata list": (edit(lambda d: d.update(metadata=[])), "metadata must be an object"),
    "settings of its own": (edit(lambda d: d.update(settings={"bits": 3})), r"must not repeat \['bits'\]"),
    "unknown settings": (edit(lambda d: d.update(settings={"learn_tokens": 3})), "unknown cache settings"),
    "gains as text": (edit(lambda d: d.update(gains="1")), "gains a list"),
    "one gain": (edit(lambda d: d.update(gains=[1.0])), "gains="),
    "other gains": (edit(lambda d: d.update(gains=[1.0, 1.5])), "fingerprint"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(folder: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(ValueError, match=message):
        Codebook.from_pretrained(folder)


def test_missing_files_are_named(folder: Path) -> None:
    (folder / TENSOR_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=TENSOR_FILE):
        Codebook.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="no Hub repository id"):
        Codebook.from_pretrained(folder / "nowhere")


def test_metadata_that_is_no_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    book = make(metadata={"x": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        book.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_hub_gets_and_gives_exactly_the_two_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def upload(path: str, repo_id: str, **kw: Any) -> str:
        seen["files"] = {p.name: p.read_text() for p in Path(path).iterdir() if p.suffix != ".safetensors"}
        return "address"

    def download(repo_id: str, max_bytes: dict[str, int], **kw: Any) -> hub.Snapshot:
        seen["wanted"] = (repo_id, set(max_bytes), kw["revision"])
        return hub.Snapshot(folder, "0123abc")

    monkeypatch.setattr(hub, "upload", upload)
    monkeypatch.setattr(hub, "download", download)
    assert make().push_to_hub("user/codebook") == "address"
    assert set(seen["files"]) == {CONFIG_FILE, "README.md"}
    assert "base_model: user/model" in seen["files"]["README.md"]
    assert Codebook.from_pretrained("user/codebook", revision="v1").fingerprint == make().fingerprint
    assert seen["wanted"] == ("user/codebook", {TENSOR_FILE, CONFIG_FILE}, "v1")


@pytest.mark.parametrize("take", ["cache", "batching"])
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"bits": 4}, "bits=4 asks for keys of"),
        ({"num_bits": 7}, "num_bits=7 asks for keys of"),
        ({"num_subspaces": 16}, "num_subspaces=16 asks for keys of"),
        ({"value_bits": 4}, "value_bits=4 asks for values of"),
        ({"value_subspaces": 16}, "value_subspaces=16 asks for values of"),
    ],
)
def test_a_codebook_is_not_taken_for_what_it_is_not(take: str, asked: dict[str, int], told: str) -> None:
    """The codebook would win in silence."""
    model = tiny_models.build("llama")
    head_dim = model.config.head_dim
    book = shipped.codebook(PQConfig(bits=2), head_dim, head_dim)
    use = partial(PagedPQCache, model.config, book) if take == "cache" else partial(enable_batching, model, codebook=book)
    with pytest.raises(ValueError, match=told):
        use(**asked)
    own = book.codes("value", head_dim)
    try:
        use(bits=2)
        use(value_bits=own.num_bits, value_subspaces=own.num_subspaces)
    finally:
        disable_batching(model)
