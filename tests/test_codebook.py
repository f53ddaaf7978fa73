"""A codebook survives a round trip, and every broken file is refused with words that say what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from hf_pqcache.codebook import hub
from hf_pqcache.codebook.codebook import CONFIG_FILE, TENSOR_FILE, Codebook, LayerCodebook, to_float16


def make(layers: tuple[int, ...] = (0, 2), heads: int = 2, bits: int = 4, **kw: Any) -> Codebook:
    generator = torch.Generator().manual_seed(0)

    def side(width: int) -> torch.Tensor:
        return torch.randn(heads, 8, 1 << bits, width, generator=generator).half()

    return Codebook(
        layers={i: LayerCodebook(side(2), side(2)) for i in layers},
        num_bits=bits,
        num_subspaces=8,
        metadata={"model": "user/model", "tokens": 10},
        **kw,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path)
    return tmp_path


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    book = make((0, 3, 11))
    book.save_pretrained(tmp_path / "new" / "folder")
    again = Codebook.from_pretrained(tmp_path / "new" / "folder")
    assert again.fingerprint == book.fingerprint
    assert (again.num_bits, again.num_subspaces, again.metadata) == (book.num_bits, book.num_subspaces, book.metadata)
    assert list(again.layers) == [0, 3, 11]
    assert all(torch.equal(again.layers[i].keys, book.layers[i].keys) for i in book.layers)
    assert book.nbytes == 3 * 2 * 2 * 8 * 16 * 2 * 2
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [CONFIG_FILE, TENSOR_FILE]


def test_layers_may_differ_in_heads_and_head_dim(tmp_path: Path) -> None:
    layers = {
        0: LayerCodebook(torch.randn(2, 8, 16, 2).half(), torch.randn(2, 8, 16, 4).half()),
        1: LayerCodebook(torch.randn(1, 16, 16, 2).half(), torch.randn(1, 16, 16, 2).half()),
    }
    book = Codebook(layers, num_bits=4)
    book.save_pretrained(tmp_path)
    assert Codebook.from_pretrained(tmp_path).fingerprint == book.fingerprint
    assert book.layers[0].head_dims == (16, 32)


def test_fingerprint_sees_every_number() -> None:
    book, other = make(), make()
    assert book.fingerprint == other.fingerprint == book.to("cpu").fingerprint
    other.layers[2].values[1, 7, 15, 1] += 1
    assert make().fingerprint != Codebook(other.layers, num_bits=4, num_subspaces=8).fingerprint


def test_codebooks_and_layers_can_be_compared_and_hashed(tmp_path: Path) -> None:
    """Equal are those that code alike, whatever is told of how they were made and wherever they lie."""
    book = make()
    book.save_pretrained(tmp_path)
    again = replace(Codebook.from_pretrained(tmp_path), metadata={"source": "elsewhere"})
    assert book == again == again.to("cpu")
    assert len({book, again, make(bits=5), make((0, 1)), make(settings={"page_size": 32})}) == 4
    assert book not in (make(bits=5), make((0, 1)), make(settings={"page_size": 32}), None, "a codebook")
    layer, other = book.layers[0], book.layers[2]
    assert layer == again.layers[0]
    assert layer not in (other, LayerCodebook(layer.keys, other.values), LayerCodebook(layer.keys[:1], layer.values[:1]), None)
    assert len({layer, other, again.layers[0]}) == 2


def test_overflow_of_float16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"7e\+04 does not fit float16"):
        to_float16(torch.tensor([1.0, 70000.0]), "keys")


@pytest.mark.parametrize(
    ("keys", "bits", "message"),
    [
        (torch.randn(2, 8, 16, 2), 4, "dtype torch.float32, expected torch.float16"),
        (torch.randn(2, 8, 16).half(), 4, "expected"),
        (torch.randn(2, 8, 16, 2).half(), 5, "ask for 8 of 32"),
        (torch.randn(3, 8, 16, 2).half(), 4, "heads"),
        (torch.full((2, 8, 16, 2), float("nan")).half(), 4, "NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(keys: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codebook({0: LayerCodebook(keys, torch.randn(2, 8, 16, 2).half())}, num_bits=bits, num_subspaces=8)
    with pytest.raises(ValueError, match="at least one layer"):
        Codebook({}, num_bits=4)


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
    make().check_model(llama())
    with pytest.raises(ValueError, match=r"layers \[2\], the model has 2.*user/model.*calibrate"):
        make().check_model(llama(num_hidden_layers=2))
    with pytest.raises(ValueError, match="expected 4 KV heads, got 2"):
        make().check_model(llama(num_key_value_heads=4))
    with pytest.raises(ValueError, match="expected head_dim 32, got 16"):
        make().check_model(llama(head_dim=32))


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
            (len(h := b'{"layers.0.keys":{"dtype":"F16","shape":[99999999,99999999],"data_offsets":[0,8]}}')).to_bytes(
                8, "little"
            )
            + h
            + b"\0" * 8,
        ),
        "damaged or cut short",
    ),
    "missing tensor": (tensors(lambda t: t.pop("layers.2.keys")), r"lacks \['layers.2.keys'\]"),
    "unknown tensor": (tensors(lambda t: t.update(extra=torch.zeros(1))), r"holds \['extra'\]"),
    "wrong dtype": (tensors(lambda t: t.update({"layers.0.keys": t["layers.0.keys"].float()})), "dtype torch.float32"),
    "nan": (tensors(lambda t: t["layers.0.values"].fill_(float("nan"))), "layers.0.values contains NaN"),
    "wrong shape": (tensors(lambda t: t.update({"layers.0.keys": t["layers.0.keys"][:, :4].clone()})), "num_subspaces"),
    "other numbers": (tensors(lambda t: t["layers.0.values"].mul_(2)), "fingerprint"),
    "no json": (write(CONFIG_FILE, b"\x00\xff\xfe"), "not valid JSON"),
    "half json": (write(CONFIG_FILE, b'{"format": '), "not valid JSON"),
    "deep json": (write(CONFIG_FILE, b"[" * 200_000), "not valid JSON"),
    "huge json": (write(CONFIG_FILE, b" " * (1 << 20) + b"{}"), "bytes"),
    "list": (write(CONFIG_FILE, b"[1]"), "must hold a JSON object, got list"),
    "other format": (edit(lambda d: d.update(format="x")), "is no codebook description"),
    "newer schema": (edit(lambda d: d.update(schema_version=2)), "update hf_pqcache"),
    "missing key": (edit(lambda d: d.pop("metadata")), r"lacks \['metadata'\]"),
    "bits as text": (edit(lambda d: d.update(num_bits="4")), "num_bits='4' must be an integer"),
    "bits out of range": (edit(lambda d: d.update(num_bits=40)), "out of range"),
    "other bits": (edit(lambda d: d.update(num_bits=5)), "num_bits=5"),
    "layers no list": (edit(lambda d: d.update(layers={"0": 1})), "must be a list"),
    "layer twice": (edit(lambda d: d.update(layers=[0, 0])), "different integers"),
    "layer negative": (edit(lambda d: d.update(layers=[-1, 0])), "different integers"),
    "layer true": (edit(lambda d: d.update(layers=[True, 0])), "different integers"),
    "layers absurd": (edit(lambda d: d.update(layers=list(range(10_001)))), "1 to 10000"),
    "metadata list": (edit(lambda d: d.update(metadata=[])), "metadata must be an object"),
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
    book = Codebook(make().layers, num_bits=4, num_subspaces=8, metadata={"x": float("nan")})
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
