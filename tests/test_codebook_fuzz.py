"""Whatever the two files of a codebook hold: loading ends in a usable codebook or in a short error that names the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from hf_pqcache import PagedPQCache
from hf_pqcache.codebook.codebook import CONFIG_FILE, TENSOR_FILE, Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.errors import CacheOutOfMemoryError, PagesExhaustedError

pytestmark = pytest.mark.usefixtures("one_thread")
PHASES = [Phase.explicit, Phase.generate]
QUICK = settings(max_examples=150, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck), database=None)
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 16}


def _book() -> Codebook:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 16, 2, generator=generator).half() for _ in range(2))
    return Codebook(keys, values, (1.0, 1.25), metadata={"model": "user/model"}, settings={"page_size": 32})


BOOK = _book()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The two files as they should be."""
    folder = tmp_path_factory.mktemp("whole")
    BOOK.save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, TENSOR_FILE)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to be filled by each example, in a place where nothing else may appear."""
    folder = tmp_path_factory.mktemp("fuzz") / "book"
    folder.mkdir()
    yield folder
    assert [path.name for path in folder.parent.iterdir()] == ["book"], "loading has written somewhere"


def load(folder: Path, files: dict[str, bytes]) -> Codebook | None:
    """The codebook in these files; None if they were refused as they should be."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    refusal: ValueError | None = None
    try:
        book = Codebook.from_pretrained(folder)
    except ValueError as error:
        refusal = error
    if refusal is not None:
        assert type(refusal) is ValueError
        assert 20 < len(str(refusal)) < 1000, "an error is read by people"
        return None
    assert book.fingerprint == json.loads(files[CONFIG_FILE])["fingerprint"]
    assert book.keys.isfinite().all()
    assert book.values.isfinite().all()
    return book


def use(book: Codebook) -> None:
    """What loads either serves a model or is refused for it with the reason."""
    refusal = None
    try:
        cache = PagedPQCache(LlamaConfig(**SIZES), book, PQConfig(**book.settings))
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert "use one of this model, or none at all" in refusal
        return
    k = torch.randn(2, 70, 16)
    cache.allocate_sequence("a")
    with suppress(PagesExhaustedError, CacheOutOfMemoryError):
        cache.append_tokens("a", 0, k, k)
        assert cache.get_kv("a", 0)[0].shape == k.shape


# -- bytes ------------------------------------------------------------------------------------------------------------
@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """One to three of the accidents that files have."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["cut", "flip", "insert", "remove", "repeat"])):
            case "cut":
                content = content[:at]
            case "flip" if at < len(content):
                content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
            case "insert":
                content = content[:at] + draw(st.binary(max_size=9)) + content[at:]
            case "remove":
                content = content[:at] + content[at + draw(st.integers(1, 9)) :]
            case "repeat":
                content = content[:at] + content[max(0, at - 20) :]
    return content


@QUICK
@given(data=st.data(), name=st.sampled_from([CONFIG_FILE, TENSOR_FILE]))
def test_damaged_bytes(data: st.DataObject, name: str, folder: Path, whole: dict[str, bytes]) -> None:
    # The header of the tensors is small beside their numbers, and where most can go wrong.
    near = whole[name] if name == CONFIG_FILE else whole[name][:400]
    files = {**whole, name: data.draw(damage(near)) + whole[name][len(near) :]}
    book = load(folder, files)
    if files[TENSOR_FILE] != whole[TENSOR_FILE] and book is not None:
        assert book.fingerprint == BOOK.fingerprint, "other numbers under the same fingerprint"


@QUICK
@given(at=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_numbers_is_always_noticed(at: float, bit: int, folder: Path, whole: dict[str, bytes]) -> None:
    content = bytearray(whole[TENSOR_FILE])
    first = 8 + struct.unpack("<Q", content[:8])[0]
    content[min(len(content) - 1, first + int(at * (len(content) - first)))] ^= 1 << bit
    assert load(folder, {**whole, TENSOR_FILE: bytes(content)}) is None


# -- JSON -------------------------------------------------------------------------------------------------------------
NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 4, 8, 16, 2**31, 2**63, 2**64, 10**30, 10**400, 1e308, float("nan"), float("inf"), -0.0]),
    st.integers(),
    st.floats(),
)
NAMES = st.one_of(st.sampled_from(["", "../../etc/passwd", "/", "\0", "__class__", "x" * 2_000, "\ud800", "{0}"]), st.text())
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, NAMES),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=8,
)
KEYS = ["format", "schema_version", "fingerprint", "gains", "metadata", "settings"]
SETTINGS = ["page_size", "max_pages", "sink_tokens", "extended_residual", "num_bits", "unknown"]


@QUICK
@given(changes=st.dictionaries(st.one_of(st.sampled_from(KEYS), NAMES), JSON, min_size=1, max_size=2))
def test_hostile_values(changes: dict[str, Any], folder: Path, whole: dict[str, bytes]) -> None:
    description = {**json.loads(whole[CONFIG_FILE]), **changes}
    book = load(folder, {**whole, CONFIG_FILE: json.dumps(description).encode()})
    if book is not None:
        assert not {"format", "schema_version", "gains", "fingerprint"} & {
            key for key in changes if changes[key] != json.loads(whole[CONFIG_FILE]).get(key)
        }
        use(book)


@QUICK
@given(settings=st.dictionaries(st.sampled_from(SETTINGS), st.one_of(NUMBERS, JSON), min_size=1, max_size=3))
@example(settings={"max_pages": 2**40})
@example(settings={"max_pages": 2**31 - 1, "page_size": 16})
@example(settings={"sink_tokens": 2**40})
@example(settings={"extended_residual": 2**62})
def test_hostile_settings(settings: dict[str, Any], folder: Path, whole: dict[str, bytes]) -> None:
    """Published settings shape a cache; none may take a machine down."""
    description = {**json.loads(whole[CONFIG_FILE]), "settings": settings}
    book = load(folder, {**whole, CONFIG_FILE: json.dumps(description).encode()})
    if book is not None:
        use(book)


@pytest.mark.parametrize("depth", [100, 900, 5_000, 100_000])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("key", ["metadata", "settings", "gains", "fingerprint", "unknown"])
def test_deep_nesting(depth: int, brackets: tuple[str, str], key: str, folder: Path, whole: dict[str, bytes]) -> None:
    description = json.dumps({**json.loads(whole[CONFIG_FILE]), key: "HERE"})
    deep = brackets[0] * depth + "1" + brackets[1] * depth
    book = load(folder, {**whole, CONFIG_FILE: description.replace('"HERE"', deep).encode()})
    if book is not None:
        assert key in ("metadata", "unknown")
        book.save_pretrained(folder)


# -- tensors ----------------------------------------------------------------------------------------------------------
TENSOR_NAMES = ["keys", "values", "../../keys", "layers.0.keys", "\0"]
DTYPES = ["F16", "F16", "F16", "F32", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "NONE"]
DIMENSIONS = st.sampled_from([0, 1, 1, 1, 2, 2, 8, 16, 16, 99_999_999, 2**63, -1])


@st.composite
def tensor_file(draw: st.DrawFn) -> bytes:
    """A safetensors file of any names, shapes and offsets, true or not, and any numbers."""
    header, end = {}, 0
    for name in draw(st.lists(st.sampled_from(TENSOR_NAMES), min_size=1, max_size=6, unique=True)):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.one_of(st.just([1, 16, 2]), st.lists(DIMENSIONS, max_size=5)))
        size = 2 * 16 * 2 if shape == [1, 16, 2] and dtype == "F16" else draw(st.integers(0, 64))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    length = draw(st.one_of(st.just(len(text)), st.sampled_from([0, 1, len(text) + 5, 2**40, 2**64 - 1])))
    fill = draw(st.sampled_from([b"\0", b"\xff", b"\x7c", b"\x3c"]))  # zeros, NaN, infinity, about 1
    return struct.pack("<Q", length) + text + fill * max(0, end + draw(st.sampled_from([0, 0, 0, 8, -8])))


@QUICK
@given(content=tensor_file())
def test_hostile_tensor_files(content: bytes, folder: Path, whole: dict[str, bytes]) -> None:
    assert load(folder, {**whole, TENSOR_FILE: content}) is None


# -- the wrong model, the wrong name ----------------------------------------------------------------------------------
@QUICK
@given(
    head_dim=st.integers(4, 30).map(lambda half: 2 * half),
    width=st.integers(1, 9),
    heads=st.sampled_from([1, 2, 4]),
    layers=st.integers(1, 4),
)
def test_a_codebook_of_another_model(head_dim: int, width: int, heads: int, layers: int) -> None:
    """It serves whatever its subspaces cut, in any number of layers and heads."""
    sizes = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": heads}
    config = LlamaConfig(**sizes, hidden_size=64, head_dim=head_dim)
    side = torch.randn(1, 16, width).half()
    book = Codebook(side, side, metadata={"model": "user/model"})
    if head_dim % width == 0:
        for asked in ({}, {"num_bits": 4}, {"num_subspaces": head_dim // width} if head_dim // width >= 8 else {}):
            assert PagedPQCache(config, book, **asked).stats()["compressed_layers"] == list(range(layers))
    else:
        with pytest.raises(ValueError, match=r"user/model.*use one of this model, or none at all"):
            PagedPQCache(config, book)


@QUICK
@given(name=NAMES)
@example(name="../" * 50 + "etc")
@example(name="a/../b")
@example(name="..")
@example(name="user/..")
@example(name="user/name\n")
def test_hostile_names_of_a_folder(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A name is a folder that exists or the id of a repository; nothing else reaches the Hub."""
    assume(not name.startswith("~"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        Codebook.from_pretrained(name, cache_dir=tmp_path_factory.mktemp("cache"))
    assert str(caught.value)
