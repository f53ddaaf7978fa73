"""A model spread over devices: each layer's pages, counters and page table live where its layer does, and stay in step.

There is no second device here, so tensors of the lower layer are told to say `cpu:1`. What torch computes with them is
computed on the CPU; what the cache keeps for them must be kept apart. tests/gpu/test_devices_gpu.py has real ones.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SMALL, build, codebook_of, padded, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
HERE, THERE = torch.device("cpu"), torch.device("cpu", 1)


class Elsewhere(Tensor):
    """A tensor that says it is on `cpu:1`, as does all that is made of it."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return THERE


@pytest.fixture
def spread() -> Any:
    """A model whose second layer works with tensors of another device."""
    model = copy.deepcopy(build("llama"))
    attention = model.model.layers[1].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(lambda module, args, out: out.as_subclass(Elsewhere))
    attention.o_proj.register_forward_hook(lambda module, args, out: out.as_subclass(Tensor))
    return model


def make(kind: str, model: Any, **options: Any) -> Any:
    if kind == "offloaded":
        options["offload"] = True
    if kind == "exact":
        return PagedKVCache(model.config, page_size=16, max_pages=64, **options)
    return PagedPQCache(model.config, codebook_of("llama"), SMALL, **options)


def generate(model: Any, cache: Any, **options: Any) -> tuple[Tensor, Tensor]:
    settings = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**padded(2, 50)[0], **cache_kwargs(cache), **(settings | options))
    return out.sequences, torch.stack(out.logits)


def assert_in_step(cache: Any) -> None:
    """Two states, each with its own layer; what all layers share is the same in both."""
    storage = cache.storage
    assert set(storage.layers.states) == {HERE, THERE}
    here, there = storage.layers.states[HERE], storage.layers.states[THERE]
    assert (set(here.views), set(there.views)) == ({0}, {1})
    for layer, state in ((0, here), (1, there)):
        view = storage.layers.views[layer]
        assert storage.layers.state(layer) is state
        assert state.views[layer] is view
        assert view.page_table.data_ptr() == state.page_table[layer].data_ptr()
        assert view.left_pad is state.left_pad
        assert view.seq_lens.data_ptr() == state.seq_lens[layer].data_ptr()
        assert view.window_keys.device == view.window_values.device == state.device
    assert here.layer_ptrs.data_ptr() != there.layer_ptrs.data_ptr()
    assert here.page_table.shape == there.page_table.shape
    assert torch.equal(here.left_pad, there.left_pad)
    assert torch.equal(here.seq_lens[0], there.seq_lens[1])


@pytest.mark.parametrize("kind", ["coded", "exact", "offloaded"])
def test_two_devices_equal_one(kind: str, spread: Any) -> None:
    expected = generate(build("llama"), make(kind, spread))
    cache = make(kind, spread)
    got = generate(spread, cache)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)
    assert_in_step(cache)
    stats = cache.stats()
    assert stats["pages_used"] > 0
    assert set(stats["engines"]) == {0, 1}
    assert stats["calls"]["attend/torch"] == 2 * 23, "calls of both devices"


@pytest.mark.parametrize("kind", ["coded", "exact"])
def test_rows_move_on_every_device(kind: str, spread: Any) -> None:
    cache = make(kind, spread)
    expected = generate(build("llama"), make(kind, spread), num_beams=3, num_return_sequences=2)
    assert torch.equal(generate(spread, cache, num_beams=3, num_return_sequences=2)[0], expected[0])
    assert_in_step(cache)
    twin = copy.deepcopy(cache)
    assert_in_step(twin)
    twin.crop(-20)
    twin.batch_select_indices(torch.tensor([3, 0, 1]))
    assert_in_step(twin)
    assert_in_step(cache)
    twin.reset()
    assert_in_step(twin)
    assert (twin.stats()["pages_used"], twin.storage.layers.states[THERE].seq_lens.any()) == (0, False)


def test_an_exhausted_pool_leaves_every_device_as_it_was(spread: Any) -> None:
    cache = make("coded", spread, max_pages=4)
    with torch.no_grad():
        spread(tokens(2, 40), **cache_kwargs(cache))
        used = cache.stats()["pages_used"]
        with pytest.raises(PagesExhaustedError):
            spread(tokens(2, 60), **cache_kwargs(cache))
        assert (cache.get_seq_length(), cache.stats()["pages_used"]) == (40, used)
        assert_in_step(cache)
        spread(tokens(2, 1), **cache_kwargs(cache))
    assert_in_step(cache)
    assert cache.get_seq_length() == 41


def test_a_states_memory_is_taken_over_on_its_own_device(spread: Any) -> None:
    """A next cache of the same shape gets the addresses that captured graphs hold, each on its device."""
    cache = make("coded", spread)
    generate(spread, cache, max_new_tokens=2)
    addresses = {device: state.layer_ptrs.data_ptr() for device, state in cache.storage.layers.states.items()}
    del cache
    again = make("coded", spread)
    generate(spread, again, max_new_tokens=2)
    assert {device: state.layer_ptrs.data_ptr() for device, state in again.storage.layers.states.items()} == addresses


def test_sequences_check_the_device_of_their_tokens(spread: Any) -> None:
    cache = make("exact", spread)
    cache.allocate_sequence("a")
    keys = torch.randn(2, 20, 16)
    cache.append_tokens("a", 0, keys, keys)
    cache.append_tokens("a", 1, keys.as_subclass(Elsewhere), keys.as_subclass(Elsewhere))
    assert_in_step(cache)
    with pytest.raises(ValueError, match=r"on cpu:1, got .* on cpu"):
        cache.append_tokens("a", 1, keys, keys)


def test_accelerates_hooks_are_passed(tmp_path: Path) -> None:
    """A device_map puts hooks around every module, which move what they are given; here weights come from disk."""
    build("llama").save_pretrained(tmp_path / "model")
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = {name: "disk" if name == "model.layers.1" else "cpu" for name in names}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    assert next(model.model.layers[1].parameters()).device.type == "meta"
    for kind in ("coded", "exact"):
        cache = make(kind, model, compile=True)  # generate must find by itself that hooks cannot be compiled
        got, expected = generate(model, cache), generate(build("llama"), make(kind, model))
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-5)
        assert set(cache.storage.layers.states) == {HERE}
