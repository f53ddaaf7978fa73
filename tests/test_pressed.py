"""Prompts pruned on their way into a paged cache compute what the same pruning of a DynamicCache does."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from graphs import Graphs, assert_same, generate
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import SMALL, assistant_of, build, codebook_of, padded, tokens
from torch import Tensor
from transformers import DynamicCache

from hf_pqcache import PagedKVCache, PagedPQCache, pressed
from hf_pqcache.cache.reference import ReferenceCache, ReferenceLayer
from hf_pqcache.compressors.parse import PRESSES, parse
from hf_pqcache.eval.session.outliers import plant_outliers
from hf_pqcache.models.names import NAMES, cache_kwargs

SPECS = [f"{name}:0.5" for name in PRESSES]
PROMPT, STEPS = 90, 28


class Uneven:
    """Keeps random tokens, another number of them in each layer, as pyramids do."""

    def compress(self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Any:
        kept = keys.shape[2] * (2 if module.layer_idx % 2 else 5) // 8
        order = torch.Generator().manual_seed(module.layer_idx)
        best = torch.rand(keys.shape[:3], generator=order).topk(kept, dim=2).indices.sort(dim=2).values[..., None]
        return tuple(x.gather(2, best.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))


def press_of(spec: str) -> Any:
    return Uneven() if spec == "uneven" else parse(spec)


@contextmanager
def assigning(model: Any, press: Any) -> Iterator[None]:
    """What kvpress does: hooks of attention modules assign `keys` and `values` of a prompt's layers."""

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        cache = next(kwargs[name] for name in NAMES if name in kwargs)
        layer, hidden = cache.layers[module.layer_idx], kwargs["hidden_states"]
        if layer.get_seq_length() == hidden.shape[1] > 1:
            layer.keys, layer.values = press.compress(module, hidden, layer.keys, layer.values, output[1], kwargs)
            if isinstance(layer, ReferenceLayer):  # its first pages are of what is kept
                layer.equaliser = None
                layer.note_equaliser()

    modules = [part for name, part in model.named_modules() if name.endswith("self_attn")]
    handles = [part.register_forward_hook(hook, with_kwargs=True) for part in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


LOUD = ", loud keys"


def model_of(name: str) -> Any:
    """A tiny model; with LOUD, one whose keys have channels that an equaliser makes quieter."""
    if not name.endswith(LOUD):
        return build(name)
    model = copy.deepcopy(build(name.removesuffix(LOUD)))
    plant_outliers(model, 30)
    return model


def logits_of(model: Any, cache: Any, ids: Tensor, position: int) -> Tensor:
    places = torch.arange(position, position + ids.shape[1])[None].expand(len(ids), -1)
    with torch.no_grad():
        logits: Tensor = model(ids, position_ids=places, **cache_kwargs(cache)).logits
    return logits


def one_by_one(model: Any, cache: Any, ids: Tensor, first: int, last: int) -> Tensor:
    """The way of a DynamicCache whose layers are not equally long."""
    return torch.cat([logits_of(model, cache, ids[:, at : at + 1], at) for at in range(first, last)], dim=1)


def steps(model: Any, cache: Any, ids: Tensor, together: int = 5) -> Tensor:
    """Logits of every token but the prompt's: one by one, then some together, then one by one."""
    parts, cuts = [], [*range(PROMPT, PROMPT + 10), *range(PROMPT + 9 + together, ids.shape[1] + 1)]
    for begin, end in itertools.pairwise(cuts):
        parts.append(logits_of(model, cache, ids[:, begin:end], begin))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("spec", [*SPECS, "uneven"])
@pytest.mark.parametrize("name", ["llama" + LOUD, "qwen3", "phi3", "gemma3"])
def test_a_pruned_cache_computes_what_a_pruned_dynamic_cache_does(name: str, spec: str) -> None:
    model, book = model_of(name), codebook_of(name.removesuffix(LOUD))
    ids, press = tokens(2, PROMPT + STEPS), press_of(spec)
    exact = DynamicCache(config=model.config)
    if name == "gemma3":  # its sliding layers are left alone
        exact_press, press_of_full = press, [i for i, layer in enumerate(exact.layers) if not layer.is_sliding]
        press = type("", (), {})()
        press.compress = lambda module, h, k, v, *rest: (
            exact_press.compress(module, h, k, v, *rest) if module.layer_idx in press_of_full else (k, v)
        )
    pages = PagedKVCache(model.config, page_size=16)
    coded, reference = (
        PagedPQCache(model.config, book, SMALL),
        ReferenceCache(model.config, book, SMALL),
    )
    found = []
    for cache, inside in ((exact, assigning), (pages, pressed), (reference, assigning), (coded, pressed)):
        with inside(model, press):
            logits_of(model, cache, ids[:, :PROMPT], 0)
            is_ragged = spec == "uneven"  # transformers' caches of unequal layers take one token at a time
            found.append(steps(model, cache, ids, 1 if is_ragged and cache is not pages else 5))
    assert torch.allclose(found[1], found[0], atol=1e-3)
    assert torch.allclose(found[3], found[2], atol=1e-3)
    assert pages.get_seq_length() == coded.get_seq_length() == PROMPT + STEPS
    kept = [int(PROMPT * 0.5)] if spec != "uneven" else [PROMPT * 5 // 8, PROMPT * 2 // 8]
    held = {layer.keys.shape[2] - STEPS for i, layer in enumerate(coded.layers) if i in coded.stats()["compressed_layers"]}
    assert held <= set(kept)
    assert not any(part._forward_hooks or "rotary_emb" in vars(part) for part in model.modules())


@pytest.mark.parametrize("spec", ["knorm:0.75", "uneven"])
@pytest.mark.parametrize("make", [PagedKVCache, PagedPQCache])
def test_assigned_keys_count_as_in_a_dynamic_cache(make: Any, spec: str) -> None:
    model, ids, press = build("llama_deep"), tokens(2, PROMPT + STEPS), press_of(spec)
    exact = DynamicCache(config=model.config)
    settings_ = {"codebook": codebook_of("llama_deep"), "pq_config": SMALL} if make is PagedPQCache else {"page_size": 16}
    ours = make(model.config, **settings_)
    for cache in (exact, ours):
        with assigning(model, press):
            logits_of(model, cache, ids[:, :PROMPT], 0)
    lengths = [exact.get_seq_length(i) for i in range(len(exact.layers))]
    assert [ours.get_seq_length(i) for i in range(len(exact.layers))] == lengths
    assert ours.get_seq_length() == lengths[0]
    for i, layer in enumerate(exact.layers):
        assert ours.layers[i].keys.shape == layer.keys.shape
    together = 1 if spec == "uneven" else 5
    expected, got = steps(model, exact, ids, together), steps(model, ours, ids)
    if make is PagedKVCache:
        assert torch.allclose(got, expected, atol=1e-3)
    for cache in (exact, ours):  # what came after the prompt goes again, layer by layer
        for i, layer in enumerate(cache.layers):
            layer.keys = layer.keys[:, :, : lengths[i]]
            layer.values = layer.values[:, :, : lengths[i]]
    assert [ours.get_seq_length(i) for i in range(len(exact.layers))] == lengths
    again = steps(model, ours, ids)
    if make is PagedKVCache:
        assert torch.allclose(again, steps(model, exact, ids, together), atol=1e-3)


@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("make", [PagedKVCache, PagedPQCache])
def test_what_a_hook_takes_back_in_a_later_pass_was_never_there(make: Any, kept: int) -> None:
    """A press may score a prompt in a pass of its own, and take that pass's tokens back layer by layer."""
    model, ids = build("llama"), tokens(2, PROMPT + 40)
    cuts: list[int] = []

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer = next(kwargs[name] for name in NAMES if name in kwargs).layers[module.layer_idx]
        keys, values = layer.keys, layer.values
        assert keys.shape[2] == PROMPT + 40
        layer.keys, layer.values = keys[:, :, : PROMPT + kept], values[:, :, : PROMPT + kept]
        cuts.append(layer.get_seq_length())

    settings_ = {"codebook": codebook_of("llama"), "pq_config": SMALL} if make is PagedPQCache else {"page_size": 16}
    ours, untouched = make(model.config, **settings_), make(model.config, **settings_)
    for cache in (ours, untouched):
        logits_of(model, cache, ids[:, :PROMPT], 0)
    handles = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        logits_of(model, ours, ids[:, PROMPT:], PROMPT)
    finally:
        for handle in handles:
            handle.remove()
    if kept:
        logits_of(model, untouched, ids[:, PROMPT : PROMPT + kept], PROMPT)
    assert cuts == [PROMPT + kept] * len(ours.layers)
    assert ours.get_seq_length() == PROMPT + kept
    a, b = (logits_of(model, cache, ids[:, PROMPT + kept :], PROMPT + kept) for cache in (ours, untouched))
    assert torch.allclose(a, b, rtol=0, atol=1e-4 if kept else 0)  # a product over more rows is rounded otherwise


@pytest.mark.parametrize("spec", ["snapkv:0.5", "uneven"])
def test_generate_goes_on_behind_the_whole_prompt(spec: str) -> None:
    model, ids, press = build("llama_deep"), tokens(2, PROMPT), press_of(spec)
    exact = DynamicCache(config=model.config)
    with assigning(model, press):
        token = logits_of(model, exact, ids, 0)[:, -1:].argmax(-1)
    expected = ids
    for place in range(PROMPT, PROMPT + 30):
        expected = torch.cat([expected, token], dim=1)
        token = logits_of(model, exact, token, place)[:, -1:].argmax(-1)
    cache = PagedKVCache(model.config, page_size=16)
    with pressed(model, press):
        out = model.generate(ids, **cache_kwargs(cache), max_new_tokens=30, do_sample=False)
    assert out.tolist() == expected.tolist()
    # A second turn: generate itself finds out which tokens are new, and where they stand.
    turn = torch.cat([out, tokens(2, 7, seed=5)], dim=1)
    again = model.generate(turn, **cache_kwargs(cache), max_new_tokens=8, do_sample=False)
    logits = one_by_one(model, exact, turn, PROMPT + 29, turn.shape[1])
    assert again[:, turn.shape[1]].tolist() == logits[:, -1].argmax(-1).tolist()


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams_share_pruned_pages(options: dict[str, int]) -> None:
    model, ids = build("llama"), tokens(1, PROMPT)
    found = []
    for cache in (PagedKVCache(model.config, page_size=16), PagedKVCache(model.config, page_size=512)):
        with pressed(model, "knorm:0.5"):
            found.append(model.generate(ids, **cache_kwargs(cache), max_new_tokens=40, do_sample=False, **options).tolist())
    assert found[0] == found[1]


@given(
    prompt=st.integers(2, 80),
    kept=st.lists(st.integers(0, 80), min_size=2, max_size=2),
    page=st.sampled_from([16, 32]),
    chunks=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    crop=st.integers(0, 20),
)
@example(prompt=20, kept=[20, 0], page=16, chunks=[1, 3, 18], crop=4)  # a layer, or all of them, keep nothing
@example(prompt=20, kept=[0, 0], page=16, chunks=[7, 6, 11], crop=7)
@example(prompt=20, kept=[0, 1], page=16, chunks=[4, 17], crop=0)
@settings(max_examples=20, deadline=None)
def test_any_lengths(prompt: int, kept: list[int], page: int, chunks: list[int], crop: int) -> None:
    class Keeps:
        def compress(self, module: Any, hidden: Any, keys: Tensor, values: Tensor, *rest: Any) -> Any:
            count = min(kept[module.layer_idx], prompt)
            return keys[:, :, prompt - count :], values[:, :, prompt - count :]

    model, ids = build("llama"), tokens(2, prompt + sum(chunks))
    exact, cache = DynamicCache(config=model.config), PagedKVCache(model.config, page_size=page)
    for one, inside in ((exact, assigning), (cache, pressed)):
        with inside(model, Keeps()):
            logits_of(model, one, ids[:, :prompt], 0)
    place = prompt
    for count in chunks:
        if crop and place - crop >= prompt:
            exact.crop(-crop), cache.crop(-crop)
            place -= crop
        assert cache.get_seq_length() == place
        expected = one_by_one(model, exact, ids, place, place + count)
        got = logits_of(model, cache, ids[:, place : place + count], place)
        assert torch.allclose(got, expected, atol=1e-3)
        place += count


@pytest.mark.parametrize("spec", ["snapkv:0.5", "uneven"])
@pytest.mark.usefixtures("one_thread")
def test_compiled_steps_go_on_behind_the_whole_prompt(spec: str) -> None:
    model, graphs = build("llama"), Graphs()
    inputs = {"input_ids": tokens(2, PROMPT), "attention_mask": torch.ones(2, PROMPT, dtype=torch.long)}
    torch._dynamo.reset()

    def turns(cache: Any, **options: Any) -> tuple[Tensor, Tensor]:
        with pressed(model, press_of(spec)):
            first, logits = generate(model, cache, inputs, **options)
            ids = torch.cat([first, tokens(2, 5, seed=3)], dim=1)
            second, more = generate(model, cache, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, **options)
        return second, torch.cat([logits, more])

    settings_ = {"page_size": 16, "max_pages": 64}
    got = turns(PagedKVCache(model.config, **settings_, compile=True), compile_config=graphs.config)
    assert_same(got, turns(PagedKVCache(model.config, **settings_, compile=False)))
    assert graphs.count == 1
    torch._dynamo.reset()


def test_a_copy_a_reset_and_rows_keep_what_was_pruned() -> None:
    model, ids = build("llama"), tokens(2, PROMPT + 8)
    cache = PagedPQCache(model.config, codebook_of("llama"), SMALL)
    with pressed(model, "streaming-llm:0.5"):
        logits_of(model, cache, ids[:, :PROMPT], 0)
    twin, rows = copy.deepcopy(cache), copy.deepcopy(cache)
    rows.reorder_cache(torch.tensor([1, 0]))
    expected = logits_of(model, cache, ids[:, PROMPT:], PROMPT)
    assert torch.allclose(logits_of(model, twin, ids[:, PROMPT:], PROMPT), expected, atol=1e-5)
    assert torch.allclose(logits_of(model, rows, ids[:, PROMPT:].flip(0), PROMPT).flip(0), expected, atol=1e-5)
    cache.reset()
    whole = PagedPQCache(model.config, codebook_of("llama"), SMALL)
    assert cache.get_seq_length() == 0
    for one in (cache, whole):
        logits_of(model, one, ids[:, :PROMPT], 0)
    a, b = (logits_of(model, one, ids[:, PROMPT:], PROMPT) for one in (cache, whole))
    assert torch.allclose(a, b, atol=1e-5)


def refused(press: Any, match: str, error: type[Exception] = ValueError, name: str = "llama", inputs: Any = None) -> None:
    """A refusal in the forward pass leaves the cache empty and usable."""
    model, ids = build(name), tokens(2, PROMPT)
    cache = PagedPQCache(model.config, codebook_of(name), SMALL)
    with pressed(model, press), pytest.raises(error, match=match), torch.no_grad():
        model(**(inputs or {"input_ids": ids}), **cache_kwargs(cache))
    assert cache.get_seq_length() == 0
    assert not any(part._forward_hooks for part in model.modules())
    whole = PagedPQCache(model.config, codebook_of(name), SMALL)
    a, b = (logits_of(model, one, ids, 0)[:, -1] for one in (cache, whole))
    assert torch.equal(a, b)
    assert cache.stats()["bytes"] == whole.stats()["bytes"]


def test_a_padded_batch_is_refused() -> None:
    refused("knorm:0.5", "without padding", inputs=padded(2, PROMPT)[0])
    right = {"input_ids": tokens(2, PROMPT), "attention_mask": torch.ones(2, PROMPT, dtype=torch.long)}
    right["attention_mask"][1, -3:] = 0
    refused("knorm:0.5", "without padding", inputs=right)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda k, v: (k[:, :, :5], v[:, :, :6]), "5 keys and 6 values"),
        (lambda k, v: (k[:, :1, :5], v[:, :1, :5]), "all heads alike"),
    ],
    ids=["sides differ", "a head lost"],
)
def test_keys_and_values_that_no_page_holds_are_refused(change: Any, match: str) -> None:
    press = type("Press", (), {"compress": lambda self, module, h, k, v, *rest: change(k, v)})()
    refused(press, match)


def test_an_error_of_the_press_leaves_the_cache_empty() -> None:
    def fail(self: Any, module: Any, *rest: Any) -> Any:
        if module.layer_idx == 1:
            raise KeyError("nothing")
        return rest[1][:, :, :4], rest[2][:, :, :4]

    refused(type("Press", (), {"compress": fail})(), "nothing", KeyError)


def test_a_layer_that_the_press_never_saw_is_refused() -> None:
    refused("knorm:0.5", "not shown the prompt of layers", RuntimeError, name="falcon")


def test_presses_that_do_more_are_refused() -> None:
    base = type("Base", (), {"compress": lambda self, *a: None, "forward_hook": lambda self: None})
    decoding = type("Decoding", (base,), {"forward_hook": lambda self: None})
    model = build("llama")
    for press, match in (
        (decoding(), "while decoding"),
        (object(), "is no press"),
        ("snapkv", "share"),
        ("x:0.5", "unknown"),
        ("knorm:1", "below 1"),
        ("mlp", "folder"),
    ):
        with pytest.raises(ValueError, match=match), pressed(model, press):
            pass
    masking = type("Masking", (), {"compress": lambda self, m, h, k, v, *r: (setattr(m, "masked_key_indices", 1), (k, v))[1]})()
    try:
        refused(masking, "different numbers")
    finally:
        for part in model.modules():
            vars(part).pop("masked_key_indices", None)


def test_two_presses_at_once_are_refused() -> None:
    model = build("llama")
    with pressed(model, "knorm:0.5"), pytest.raises(ValueError, match="pressed already"), pressed(model, "snapkv:0.5"):
        pass
    with pressed(model, "snapkv:0.5"):
        pass


def test_a_prompt_in_pieces_is_refused() -> None:
    """By generate's own prefill_chunk_size; later turns and guesses may come together."""
    model, ids = build("llama"), tokens(1, PROMPT)

    def turn(cache: Any, inputs: Tensor, **options: Any) -> Any:
        options = {"max_new_tokens": 12, "do_sample": False} | options
        return model.generate(inputs, **cache_kwargs(cache), **options)

    expected, guessed, cache = (PagedKVCache(model.config, page_size=16) for _ in range(3))
    with pressed(model, "knorm:0.5"):
        found = turn(expected, ids)
        with pytest.raises(ValueError, match="leave prefill_chunk_size out"):
            turn(cache, ids, prefill_chunk_size=32)
        assert cache.get_seq_length() == 0
        assert turn(cache, ids, prefill_chunk_size=PROMPT).tolist() == found.tolist()
        assert turn(guessed, ids, prompt_lookup_num_tokens=3).tolist() == found.tolist()
        cache.reset()
        first = turn(cache, ids, max_new_tokens=1)  # the next turn begins where the prompt ended
        assert turn(cache, first, max_new_tokens=11).tolist() == found.tolist()
        turn(cache, torch.cat([found, ids[:, :20]], dim=1))


def test_pruning_while_decoding_and_later_assignments_are_refused() -> None:
    model, ids = build("llama"), tokens(2, PROMPT + 1)
    cache = PagedPQCache(model.config, codebook_of("llama"), SMALL)
    logits_of(model, cache, ids[:, :PROMPT], 0)

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer = cache.layers[module.layer_idx]
        layer.keys = layer.keys[:, :, 1:]

    handle = model.model.layers[0].self_attn.register_forward_hook(hook, with_kwargs=True)
    try:
        with pytest.raises(AttributeError, match="cannot be assigned"):
            logits_of(model, cache, ids[:, PROMPT:], PROMPT)
    finally:
        handle.remove()


def test_a_pruned_prompt_is_not_cut_in_its_middle() -> None:
    model, ids = build("llama"), tokens(2, PROMPT + 4)
    cache = PagedPQCache(model.config, codebook_of("llama"), SMALL)
    with pressed(model, "knorm:0.5"):
        logits_of(model, cache, ids[:, :PROMPT], 0)
    logits_of(model, cache, ids[:, PROMPT:], PROMPT)
    cache.crop(-4)
    with pytest.raises(ValueError, match="each head kept others"):
        cache.crop(-1)
    assert cache.get_seq_length() == PROMPT
    cache.crop(-PROMPT)
    assert cache.get_seq_length() == 0


def test_assisted_decoding_says_why_it_cannot() -> None:
    model, cache = build("llama"), PagedKVCache(build("llama").config, page_size=16)
    with pressed(model, "knorm:0.5"), pytest.raises(ValueError, match="each head kept others"):
        model.generate(
            tokens(1, PROMPT), **cache_kwargs(cache), assistant_model=assistant_of("llama"), max_new_tokens=20, do_sample=False
        )
