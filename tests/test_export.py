"""A sequence that leaves a cache as bytes goes on in another one as if it had stayed; what is no such sequence is refused."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Graphs
from tiny_models import SMALL, assistant_of, build, padded, tokens
from torch import Tensor
from transformers import LlamaConfig

from hf_pqcache import PagedKVCache, PagedPQCache, pressed
from hf_pqcache.cache import sequence_file
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.models.names import cache_kwargs

pytestmark = [pytest.mark.cache, pytest.mark.usefixtures("one_thread")]
MAKE: dict[str, Callable[..., Any]] = {
    "pages": lambda config, **kw: PagedKVCache(config, page_size=16, **kw),
    "codes": lambda config, **kw: PagedPQCache(config, None, SMALL, **kw),
}
NAMES = ["llama", "gpt2", "gemma3", "gpt_oss", "llama4", "qwen3_next", "falcon_h1", "falcon", "deepseek_v3"]
SETTINGS = {
    "3 bits": {"bits": 3, "page_size": 32, "extended_residual": 1},
    "2 bits": {"bits": 2, "page_size": 16, "sink_tokens": 0},
    "offload": {"page_size": 16, "extended_residual": 16, "offload": True},
    "short tables": {"page_size": 16, "extended_residual": 16, "expected_tokens": 32},
    "all exact": {"extended_residual": 512},
}


def go_on(name: str, cache: Any, ids: Tensor, new: int, **inputs: Any) -> Tensor:
    generated: Tensor = build(name).generate(ids, **inputs, **cache_kwargs(cache), max_new_tokens=new, do_sample=False)
    return generated


def turns(name: str, cache: Any, first: int = 61, rows: int = 1) -> Tensor:
    """A first turn of a conversation, and the tokens with which the second one begins."""
    said = go_on(name, cache, tokens(rows, first), 20)
    return torch.cat([said, tokens(rows, 9, seed=5)], dim=1)


def assert_goes_on(name: str, cache: Any, again: Any, ids: Tensor, new: int = 40) -> None:
    assert torch.equal(go_on(name, again, ids, new), go_on(name, cache, ids, new))
    assert again.export_sequence(0) == cache.export_sequence(0)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_conversation_is_the_uninterrupted_one(name: str, kind: str) -> None:
    cache, again = (MAKE[kind](build(name).config) for _ in range(2))
    ids = turns(name, cache)
    data = cache.export_sequence(0)
    again.import_sequence(data)
    assert again.get_seq_length() == cache.get_seq_length() == ids.shape[1] - 10
    assert again.export_sequence(0) == data == cache.export_sequence(0)
    assert_goes_on(name, cache, again, ids)


@pytest.mark.parametrize("name", SETTINGS)
def test_with_any_settings(name: str) -> None:
    cache, again = (PagedPQCache(build("llama").config, **SETTINGS[name]) for _ in range(2))
    ids = turns("llama", cache, first=120)
    again.import_sequence(cache.export_sequence(0))
    assert_goes_on("llama", cache, again, ids)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 36, 37, 52, 53])
def test_at_every_border(length: int) -> None:
    cache, again = (MAKE["codes"](build("llama").config) for _ in range(2))
    ids = tokens(1, length + 1)
    with torch.no_grad():
        build("llama")(ids[:, :-1], **cache_kwargs(cache))
    again.import_sequence(cache.export_sequence(0))
    assert_goes_on("llama", cache, again, ids)


@pytest.mark.parametrize("name", ["llama", "gemma3", "llama4", "falcon_h1"])
def test_a_row_leaves_its_batch_and_its_padding_behind(name: str) -> None:
    inputs, starts = padded(3, 70)
    batch = MAKE["codes"](build(name).config)
    said = go_on(name, batch, inputs["input_ids"], 20, attention_mask=inputs["attention_mask"])
    data = [batch.export_sequence(row) for row in range(3)]
    for row in (0, 2):
        alone, again = (MAKE["codes"](build(name).config) for _ in range(2))
        own = go_on(name, alone, inputs["input_ids"][row : row + 1, starts[row] :], 20)
        assert torch.equal(own[0], said[row, starts[row] :])
        again.import_sequence(data[row])
        assert again.get_seq_length() == alone.get_seq_length()
        ids = torch.cat([own, tokens(1, 9, seed=5)], dim=1)
        assert torch.equal(go_on(name, again, ids, 30), go_on(name, alone, ids, 30))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_that_a_press_has_pruned(name: str, kind: str) -> None:
    """Positions go on behind the whole prompt, in the next cache, too."""
    cache, again = (MAKE[kind](build(name).config) for _ in range(2))
    with pressed(build(name), "knorm:0.4"):
        said = go_on(name, cache, tokens(1, 90), 8)
    assert cache.stats()["removed"]
    data = cache.export_sequence(0)
    again.import_sequence(data)
    assert again.get_seq_length() == cache.get_seq_length() == 97
    assert again.stats()["removed"] == cache.stats()["removed"]
    assert_goes_on(name, cache, again, torch.cat([said, tokens(1, 9, seed=5)], dim=1))
    if name == "llama":
        refused(data, "a press has pruned", MAKE[kind](build(name).config), seq_id="a")


def test_tokens_that_are_taken_back_come_from_the_same_place() -> None:
    """The window still has some tokens exactly that are in pages as well, and where it has not, pages restore them."""
    cache = MAKE["codes"](build("llama").config)
    ids = turns("llama", cache)
    for count in (3, 20, 11):
        again = MAKE["codes"](build("llama").config)
        again.import_sequence(cache.export_sequence(0))
        for x in (cache, again):
            x.crop(-count)
        assert again.export_sequence(0) == cache.export_sequence(0)
    assert_goes_on("llama", cache, again, ids[:, : cache.get_seq_length() + 1])


def test_after_assisted_decoding() -> None:
    cache, again = (MAKE["codes"](build("llama").config) for _ in range(2))
    said = go_on("llama", cache, tokens(1, 61), 20, assistant_model=assistant_of("llama"))
    again.import_sequence(cache.export_sequence(0))
    assert_goes_on("llama", cache, again, torch.cat([said, tokens(1, 9)], dim=1))


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon_h1"])
def test_in_a_cache_that_was_used(name: str) -> None:
    cache, again = (MAKE["codes"](build(name).config) for _ in range(2))
    ids = turns(name, cache)
    turns(name, again, rows=2)
    again.reset()
    again.import_sequence(cache.export_sequence(0))
    assert_goes_on(name, cache, again, ids)


# -- sequences side by side ------------------------------------------------------------------------------------------------
CONFIG = LlamaConfig(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16, vocab_size=8
)


def kv(count: int, seed: int, loud: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, count, 16, generator=generator) for _ in range(2))
    keys[..., 3] *= loud
    return keys, values


def fill(cache: Any, seq: Any, count: int, seed: int, loud: float = 1.0) -> None:
    for layer in range(2):
        cache.append_tokens(seq, layer, *kv(count, seed + layer, loud))


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", MAKE)
def test_sequences_side_by_side(kind: str, offload: bool) -> None:
    here, there = (MAKE[kind](CONFIG, offload=offload) for _ in range(2))
    here.allocate_sequence("prefix")
    fill(here, "prefix", 75, 0, loud=9.0)
    there.import_sequence(here.export_sequence("prefix"), "system prompt")
    for seq, count in (("a", 5), ("b", 50)):
        here.fork_sequence("prefix", seq)
        fill(here, seq, count, count)
        there.import_sequence(here.export_sequence(seq), seq)
        here.free_sequence(seq)
    fill(there, "a", 40, 7)
    there.free_sequence("system prompt")
    here.fork_sequence("prefix", "a")
    for count, seed in ((5, 5), (40, 7)):
        fill(here, "a", count, seed)
    assert there.sequence_ids == ["a", "b"]
    assert there.export_sequence("a") == here.export_sequence("a")
    for layer in range(2):
        for got, want in zip(there.get_kv("a", layer), here.get_kv("a", layer), strict=True):
            assert torch.equal(got, want)


def test_other_equalisers_are_refused_and_nothing_has_changed() -> None:
    here, there = (MAKE["codes"](CONFIG) for _ in range(2))
    for cache, loud in ((here, 9.0), (there, 1.0)):
        cache.allocate_sequence("a")
        fill(cache, "a", 75, 0, loud)
    before = there.stats(), there.export_sequence("a")
    with pytest.raises(ValueError, match=r"equalised by those of its first sequence.*without tokens"):
        there.import_sequence(here.export_sequence("a"), "b")
    assert (there.stats(), there.export_sequence("a")) == before


def test_between_generate_and_single_sequences() -> None:
    row = MAKE["codes"](build("llama").config)
    ids = turns("llama", row)
    side = MAKE["codes"](build("llama").config)
    side.import_sequence(row.export_sequence(0), "talk")
    again = MAKE["codes"](build("llama").config)
    again.import_sequence(side.export_sequence("talk"))
    assert_goes_on("llama", row, again, ids)
    mixed = MAKE["codes"](build("gemma3").config)
    turns("gemma3", mixed)
    with pytest.raises(ValueError, match="layers that transformers keeps"):
        MAKE["codes"](build("gemma3").config).import_sequence(mixed.export_sequence(0), "talk")


# -- what is refused ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def talk() -> bytes:
    cache = MAKE["codes"](build("llama").config)
    turns("llama", cache)
    return bytes(cache.export_sequence(0))


def refused(data: Any, match: str, cache: Any = None, error: type[Exception] = ValueError, **kw: Any) -> None:
    """The error is one line, and the cache is as before."""
    cache = MAKE["codes"](build("llama").config) if cache is None else cache
    before = cache.stats()["tokens"], cache.stats()["pages_used"], cache.sequence_ids
    with pytest.raises(error, match=match) as raised:
        cache.import_sequence(data, **kw)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert (cache.stats()["tokens"], cache.stats()["pages_used"], cache.sequence_ids) == before


def test_cut_short_and_damaged(talk: bytes) -> None:
    size = int.from_bytes(talk[:8], "little")
    for end in (0, 3, 8, 100, 8 + size, 8 + size + 1, len(talk) // 2, len(talk) - 1):
        refused(talk[:end], "cut short|damaged|digest")
    refused(talk + b"\0", "damaged|digest")
    for at in range(0, len(talk), len(talk) // 60):
        broken = bytearray(talk)
        broken[at] ^= 1 << at % 8
        refused(bytes(broken), "data")
    MAKE["codes"](build("llama").config).import_sequence(talk)


def header(**metadata: str) -> bytes:
    text = json.dumps(
        {"__metadata__": metadata, "x": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    ).encode()
    return len(text).to_bytes(8, "little") + text


def test_hostile(talk: bytes) -> None:
    refused("talk.safetensors", "read_bytes", error=TypeError)
    refused(pickle.dumps({"a": 1}), "cut short|no exported")
    refused((1 << 60).to_bytes(8, "little") + b"{}", "cut short")
    refused((5 << 20).to_bytes(8, "little") + b" " * (5 << 20), "header of")
    refused((1 << 20).to_bytes(8, "little") + b"[" * (1 << 20), "no description")
    refused(header(), "no description")
    refused(header(sequence="[" * 100000), "no description")
    refused(header(sequence="[]"), "expected the format")
    refused(
        header(sequence=json.dumps({"format": sequence_file.SEQUENCE.format, "schema_version": 2})), "schema_version=2.*reads 1"
    )
    known = {"format": sequence_file.SEQUENCE.format, "schema_version": 1}
    refused(header(sequence=json.dumps(known)), "damaged or cut short")  # what it announces is not made


def changed(data: bytes, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> bytes:
    """With a digest that says nothing is wrong."""
    description, parts = sequence_file.unpack(data)
    change(description, parts)
    for name in ("format", "schema_version"):
        description.pop(name, None)
    return sequence_file.pack(description, parts)


def layer(description: dict[str, Any], i: int = 1) -> dict[str, Any]:
    entry: dict[str, Any] = description["layers"][i]["pages"]
    return entry


def more_heads(parts: dict[str, Tensor]) -> None:
    parts |= {name: parts[name].repeat(2, 1, 1) for name in ("0.window_keys", "0.window_values")}


def whole(count: int) -> dict[str, Tensor]:
    return {f"0.{name}": torch.zeros(1, 2, count, 16) for name in ("keys", "values")}


LIES: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Any]] = {
    "a longer sequence": lambda d, t: layer(d).update(length=10**6),
    "a negative length": lambda d, t: layer(d).update(length=-1),
    "a length that is no number": lambda d, t: layer(d).update(length="89"),
    "a length of another layer": lambda d, t: layer(d).update(length=layer(d)["length"] + 16),
    "a window that lost more": lambda d, t: layer(d).update(reused=10**6),
    "more pruned than there was": lambda d, t: (layer(d, 0).update(removed=5), layer(d, 1).update(removed=5)),
    "pruned by a word": lambda d, t: layer(d).update(removed="5"),
    "no telling of positions": lambda d, t: d.update(pruned=[0, 1]),
    "other codes": lambda d, t: layer(d).update(codec={"codes": [[8, 4], [8, 4]], "codebook": "0" * 64}),
    "no codes": lambda d, t: layer(d).update(codec=None),
    "fewer layers": lambda d, t: d["layers"].pop(),
    "no layers": lambda d, t: d.pop("layers"),
    "layers that are none": lambda d, t: d.update(layers=7),
    "no config": lambda d, t: d.update(config=None),
    "no settings": lambda d, t: d.update(settings=[]),
    "a layer of another kind": lambda d, t: d["layers"][0].update(kind="StaticLayer"),
    "one page too few": lambda d, t: t.update({"1.key_pages": t["1.key_pages"][1:]}),
    "pages of another dtype": lambda d, t: t.update({"1.key_pages": t["1.key_pages"].to(torch.int16)}),
    "pages of another size": lambda d, t: t.update({"1.value_pages": t["1.value_pages"][:, 1:]}),
    "no window": lambda d, t: t.pop("0.window_keys"),
    "a window of more heads": lambda d, t: more_heads(t),
    "a window of integers": lambda d, t: t.update({"0.window_keys": t["0.window_keys"].int()}),
    "a window that is none": lambda d, t: t.update({"0.window_keys": torch.zeros(3)}),
    "infinity": lambda d, t: t["0.window_values"][0, 0].fill_(float("inf")),
    "codes of infinite steps": lambda d, t: t["0.key_pages"][:].fill_(0x7C),
    "an equaliser of zeros": lambda d, t: t["0.equaliser"].zero_(),
    "no equaliser": lambda d, t: t.pop("0.equaliser"),
    "a tensor too many": lambda d, t: t.update({"0.key": torch.zeros(1)}),
    "a layer too many": lambda d, t: t.update({"7.key_pages": torch.zeros(1)}),
    "tokens of a layer in pages": lambda d, t: (d["layers"][0].update(seen=3), t.update(whole(3))),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str, talk: bytes) -> None:
    refused(changed(talk, LIES[lie]), ".")


@pytest.mark.parametrize("lie", ["shape", "kind", "number", "nan", "seen"])
def test_lies_of_layers_that_transformers_keeps(lie: str) -> None:
    cache = MAKE["codes"](build("falcon_h1" if lie in ("nan", "number") else "gemma3").config)
    turns("falcon_h1" if lie in ("nan", "number") else "gemma3", cache)

    def change(description: dict[str, Any], parts: dict[str, Tensor]) -> None:
        match lie:
            case "shape":
                parts["0.keys"] = parts["0.keys"][:, :, 1:]
            case "kind":
                parts["0.conv.0"] = torch.zeros(1, 2, 3)
            case "number":
                parts["0.conv.9"] = parts["0.conv.0"]
            case "nan":
                parts["0.recurrent.0"][:] = float("nan")
            case "seen":
                description["layers"][0]["seen"] = 1 << 40

    fresh = MAKE["codes"](cache._model_config)
    refused(changed(cache.export_sequence(0), change), "layer 0", fresh)


def test_of_something_else(talk: bytes) -> None:
    config = copy.deepcopy(build("llama").config)
    config.rope_theta, config.rms_norm_eps = 1234.0, 0.1
    refused(talk, "another model.*rms_norm_eps", PagedPQCache(config, None, SMALL))
    refused(talk, "another model.*model_type", PagedPQCache(build("qwen3").config, None, SMALL))
    refused(talk, "exported by a .PagedPQCache", MAKE["pages"](build("llama").config))
    config = build("llama").config
    refused(talk, "page_size=16.*page_size=32", PagedPQCache(config, None, SMALL, page_size=32))
    refused(talk, "sink_tokens=4", PagedPQCache(config, None, SMALL, sink_tokens=0))
    refused(talk, "was coded as", PagedPQCache(config, None, SMALL, num_bits=5))
    half = copy.deepcopy(config)
    half.dtype = torch.float16
    whole = copy.deepcopy(config)
    whole.dtype = torch.float32
    cache = PagedPQCache(half, None, SMALL)
    cache.allocate_sequence("a")
    refused(cache.export_sequence("a"), "float16.*float32", PagedPQCache(whole, None, SMALL))
    other = PagedPQCache(config, None, SMALL)
    other.allocate_sequence("a")
    for i in range(2):
        other.append_tokens("a", i, *(torch.zeros(2, 3, 16, dtype=torch.float16) for _ in range(2)))
    refused(talk, "float16.*float32", other, seq_id="b")
    other = PagedPQCache(config, None, SMALL)
    other.import_sequence(talk, "a")
    refused(talk, "has tokens", other)
    refused(talk, "already", other, seq_id="a")
    refused(talk, "PQC001", PagedPQCache(config, None, SMALL, max_pages=2), PagesExhaustedError)


def test_of_other_weights() -> None:
    model, cache = build("llama"), MAKE["codes"](build("llama").config)
    turns("llama", cache)
    data = cache.export_sequence(0, model=model)
    refused(data, "pass model=")
    trained = copy.deepcopy(model)
    with torch.no_grad():
        next(trained.parameters()).mul_(-1)
    refused(data, "other weights", model=trained)
    MAKE["codes"](model.config).import_sequence(data, model=model)


def test_new_tokens_on_another_device_than_the_imported_ones(talk: bytes) -> None:
    cache = MAKE["codes"](build("llama").config)
    cache.import_sequence(talk)
    with pytest.raises(ValueError, match=r"lie on cpu and new ones come on meta: .*device="):
        cache.update(*(torch.zeros(1, 2, 1, 16, device="meta") for _ in range(2)), 0)


def test_rows_and_sequences_that_are_not_there() -> None:
    cache = MAKE["codes"](build("llama").config)
    with pytest.raises(ValueError, match=r"no row 0.*holds 0 rows"):
        cache.export_sequence(0)
    turns("llama", cache)
    for row in (1, -1, True, "a"):
        with pytest.raises(ValueError, match="no row"):
            cache.export_sequence(row)
    other = MAKE["codes"](build("llama").config)
    other.allocate_sequence("a")
    with pytest.raises(KeyError, match="no sequence 'b'"):
        other.export_sequence("b")


@pytest.mark.parametrize("kind", MAKE)
def test_between_compiled_steps(kind: str) -> None:
    """Lengths that only the device knows are read, and the next cache goes on in the same graph."""
    torch._dynamo.reset()
    graphs, name = Graphs(), "llama"
    cache, again, eager = (MAKE[kind](build(name).config, compile=compiled) for compiled in (True, True, False))
    compiled = {"compile_config": graphs.config}
    said = go_on(name, cache, tokens(1, 61), 20, **compiled)
    assert torch.equal(said, go_on(name, eager, tokens(1, 61), 20))
    data = cache.export_sequence(0)
    assert data == eager.export_sequence(0)
    again.import_sequence(data)
    ids = torch.cat([said, tokens(1, 9, seed=5)], dim=1)
    count = graphs.count
    assert torch.equal(go_on(name, again, ids, 30, **compiled), go_on(name, eager, ids, 30))
    assert graphs.count == count, "the imported sequence was compiled for once more"
    assert again.export_sequence(0) == eager.export_sequence(0)
