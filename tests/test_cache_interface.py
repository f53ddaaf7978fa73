"""All that transformers' Cache and its layers offer, found by introspection, is exercised on ours or refused with a reason.

A member that a later release of transformers brings fails `test_nothing_is_left_out` until somebody has thought of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SMALL, build, codebook_of, tokens
from transformers import Cache, DynamicCache, cache_utils
from transformers.cache_utils import CacheLayerMixin

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 50


def make(name: str = "llama", rows: int = 2, count: int = COUNT, **options: Any) -> PagedPQCache:
    model = build(name)
    cache = PagedPQCache(model.config, codebook_of(name), SMALL, **options)
    if count:
        with torch.no_grad():
            model(tokens(rows, count), **cache_kwargs(cache))
    return cache


def exact(rows: int = 2, count: int = COUNT) -> DynamicCache:
    cache = DynamicCache(config=build("llama").config)
    with torch.no_grad():
        build("llama")(tokens(rows, count), **cache_kwargs(cache))
    return cache


def step(cache: Any, rows: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return build("llama")(tokens(rows, 1, seed=7), **cache_kwargs(cache)).logits


# -- what is exercised: member -> check ------------------------------------------------------------------------------------
def update() -> None:
    cache, keys = make(count=0), torch.randn(2, 2, 5, 16)
    got_keys, got_values = cache.update(keys, keys + 1, 0)
    torch.testing.assert_close(got_keys + 0, keys)
    torch.testing.assert_close(got_values + 0, keys + 1)
    assert cache.layers[0].get_seq_length() == 5
    assert cache.get_seq_length() == 0, "positions that all layers hold"
    cache.update(keys, keys + 1, 1)
    assert cache.get_seq_length() == 5


def early_initialization() -> None:
    cache = make(count=0)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    ids, model = tokens(2, 9), build("llama")
    with torch.no_grad():
        got = model(ids, **cache_kwargs(cache)).logits
        torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def get_mask_sizes() -> None:
    assert make().get_mask_sizes(3, 0) == exact().get_mask_sizes(3, 0) == (COUNT + 3, 0)
    compiled = make(compile=True)
    assert compiled.get_mask_sizes(1, 0) == (compiled.get_max_length(), 0), "a mask that grows would be a graph each"
    assert compiled.get_mask_sizes(3, 0) == (COUNT + 3, 0)


def get_max_length() -> None:
    assert make().get_max_length() == make().get_max_length(0) == make().get_max_length(99) == -1
    positions = 512  # of the model: what tables have room for at first
    assert make(compile=True).get_max_length() == positions + SMALL.window_slots + SMALL.sink_tokens


def get_seq_length() -> None:
    assert make().get_seq_length() == make().get_seq_length(1) == COUNT
    assert make().get_seq_length(99) == make(count=0).get_seq_length() == 0


def reset() -> None:
    cache = make()
    cache.reset()
    assert (cache.get_seq_length(), cache.stats()["pages_used"]) == (0, 0)


def reorder_cache() -> None:
    cache, plain = make(), make()
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(cache.layers[0].keys, plain.layers[0].keys.flip(0), rtol=0, atol=0)


def batch_repeat_interleave() -> None:
    cache, plain = make(), make()
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(cache.layers[1].values, plain.layers[1].values.repeat_interleave(2, 0), rtol=0, atol=0)
    assert cache.batch_size == 4


def batch_select_indices() -> None:
    cache, plain = make(), make()
    cache.batch_select_indices(torch.tensor([1]))
    torch.testing.assert_close(cache.layers[1].values, plain.layers[1].values[1:], rtol=0, atol=0)
    for indices in ([1], (1,), [-1], [1, 0, 1], [False, True], torch.tensor([False, True]), slice(1), np.array([1])):
        cache, theirs = PagedKVCache(build("llama").config, page_size=16), exact()
        with torch.no_grad():
            build("llama")(tokens(2, COUNT), **cache_kwargs(cache))
        for one in (cache, theirs):
            one.batch_select_indices(indices)
        torch.testing.assert_close(cache.layers[1].values, theirs.layers[1].values)
        assert cache.batch_size == len(theirs.layers[1].values)


def crop() -> None:
    cache = make()
    cache.crop(-5)
    assert cache.get_seq_length() == COUNT - 5
    cache.crop(0)
    assert cache.get_seq_length() == COUNT - 5


def recording() -> None:
    """Layers that drop old tokens record them so that a crop can bring them back; ours keep all."""
    cache = make("gemma3")
    cache.activate_past_recording()
    assert cache.layers[0].record_past
    if hasattr(cache, "is_recording_past"):
        assert cache.is_recording_past(0)
        assert not cache.is_recording_past(1)


def linear_states() -> None:
    """A hybrid model's linear layers are transformers' own, and reached through the cache as ever."""
    cache = make("qwen3_next")
    assert cache.has_previous_state(0)
    states = cache.layers[0]
    for kind in ("conv", "recurrent"):
        state = torch.ones_like(getattr(states, f"{kind}_states")[0])
        getattr(cache, f"update_{kind}_state")(state, 0)
        torch.testing.assert_close(getattr(states, f"{kind}_states")[0], state)
        if hasattr(cache, f"get_{kind}_state"):
            torch.testing.assert_close(getattr(cache, f"get_{kind}_state")(0), state)
            with pytest.raises(ValueError, match="linear"):
                getattr(cache, f"get_{kind}_state")(1)
    with pytest.raises(ValueError, match="does not support calling it"):
        cache.has_previous_state(1)


def kinds() -> None:
    assert make("gemma3").is_sliding == [True, False]
    assert make("qwen3_next").is_linear == [True, False]
    if hasattr(Cache, "is_dummy"):
        assert make("gemma4").is_dummy == [False, False, True, True]


def whole_tensors() -> None:
    """`layer.keys` and `.values` are decoded copies of all that the layer holds."""
    cache, plain = make(), exact()
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        for name in ("keys", "values"):
            got, want = getattr(ours, name), getattr(theirs, name)
            assert got.shape == want.shape
            torch.testing.assert_close(got[:, :, :4], want[:, :, :4], rtol=1e-4, atol=1e-4)  # sinks
            torch.testing.assert_close(got[:, :, -16:], want[:, :, -16:], rtol=1e-4, atol=1e-4)  # window
            assert not torch.allclose(got[:, :, 4:20], want[:, :, 4:20])
    assert make(count=0).layers[0].keys is None


def layer_types() -> None:
    layer = make().layers[0]
    assert (layer.dtype, layer.device, layer.batch_size) == (torch.float32, torch.device("cpu"), 2)
    assert not layer.is_sliding
    assert layer.supports_early_init


def containers() -> None:
    cache = make()
    assert cache.layer_class_to_replicate is None
    assert len(cache) == len(cache.layers) == 2
    assert "PagedPQCache(layers=[" in repr(cache)
    assert not cache.offloading


def properties() -> None:
    cache = make()
    assert cache.is_initialized
    assert not make(count=0).is_initialized
    assert cache.batch_size == 2
    assert make(count=0).batch_size == -1
    assert cache.is_croppable
    assert not cache.is_compileable
    assert make(compile=True).is_compileable


def query_offset() -> None:
    assert make().get_query_offset() == COUNT


CHECKS: dict[str, Callable[[], None]] = {
    "update": update,
    "early_initialization": early_initialization,
    "lazy_initialization": early_initialization,
    "get_mask_sizes": get_mask_sizes,
    "get_max_length": get_max_length,
    "get_seq_length": get_seq_length,
    "get_query_offset": query_offset,
    "reset": reset,
    "reorder_cache": reorder_cache,
    "batch_repeat_interleave": batch_repeat_interleave,
    "batch_select_indices": batch_select_indices,
    "crop": crop,
    "activate_past_recording": recording,
    "is_recording_past": recording,
    "record_past": recording,
    "has_previous_state": linear_states,
    "get_conv_state": linear_states,
    "get_recurrent_state": linear_states,
    "update_conv_state": linear_states,
    "update_recurrent_state": linear_states,
    "is_linear": kinds,
    "is_dummy": kinds,
    "is_sliding": kinds,
    "keys": whole_tensors,
    "values": whole_tensors,
    "dtype": layer_types,
    "device": layer_types,
    "supports_early_init": layer_types,
    "layers": containers,
    "layer_class_to_replicate": containers,
    "offloading": containers,
    "__len__": containers,
    "__repr__": containers,
    "batch_size": properties,
    "is_initialized": properties,
    "is_croppable": properties,
    "is_compileable": properties,
}

#: What ours refuses, and why: member -> (call, error, reason). helpers/refusals.py has the list for users.
REFUSED: dict[str, tuple[Callable[[PagedPQCache], Any], type[Exception], str]] = {
    "offload": (
        lambda cache: cache.offload(0, only_non_sliding=False),
        NotImplementedError,
        "moving a layer's whole pool at every step would cost more than the codes save",
    ),
    "prefetch": (lambda cache: cache.layers[0].prefetch(), NotImplementedError, "see offload"),
    "update_indexer": (
        lambda cache: cache.update_indexer(torch.zeros(1, 1, 1), 0),
        ValueError,
        "sparse attention with an index of its own (DeepSeek V3.2) keeps transformers' layer",
    ),
    "keys.setter": (
        lambda cache: setattr(cache.layers[0], "keys", torch.zeros(1)),
        AttributeError,
        "tokens are stored as codes when they are new; they cannot be exchanged afterwards",
    ),
    "pickle": (lambda cache: cache.__reduce_ex__(4), TypeError, "it is memory of one process; codebooks are what to save"),
}

#: Members that 5.17 still has under a deprecated name.
DEPRECATED = {"get_max_cache_shape", "max_cache_len", "max_batch_size"}

#: Members of transformers' other layers that say how these store their tokens: nothing that a cache's user calls.
STORAGE_OF_OTHERS = {
    "cumulative_length", "sliding_window", "cumulative_length_int", "max_cache_len", "max_batch_size", "num_heads",
    "k_head_dim", "v_head_dim", "conv_states", "recurrent_states", "conv_kernel_size", "conv_kernel_sizes", "number_of_states",
    "is_conv_states_initialized", "is_recurrent_states_initialized", "indexer_keys", "indexer_position_ids",
    "is_indexer_initialized", "indexer_cumulative_length", "indexer_dtype", "indexer_device",
    "residual_length", "nbits", "axis_key", "axis_value", "q_group_size", "quantizer", "qtype", "optimizer", "only_non_sliding",
    "prefetch_stream", "fp8_dtype", "fp8_max", "lazy_initialization_indexer",
}  # fmt: skip


def public(cls: type) -> set[str]:
    """Names of a class, those that its `__init__` and its methods give to `self` included."""
    names = {name for name in dir(cls) if not name.startswith("_")}
    for base in cls.__mro__:
        if base.__module__ == cache_utils.__name__:
            source = inspect.getsource(base)
            names |= {name for name in _assigned(source) if not name.startswith("_")}
    return names


def _assigned(source: str) -> set[str]:
    import re

    return set(re.findall(r"self\.(\w+)(?:\s*:[^=\n]+)?\s*=[^=]", source))


def members() -> dict[str, str]:
    """Every public member of Cache and of the layers -> a class that has it."""
    classes = [c for c in vars(cache_utils).values() if inspect.isclass(c) and c.__module__ == cache_utils.__name__]
    layers = [
        c for c in classes if issubclass(c, CacheLayerMixin) or (hasattr(c, "update_conv_state") and not issubclass(c, Cache))
    ]
    return {name: cls.__name__ for cls in [*layers, Cache] for name in public(cls)}


def test_nothing_is_left_out() -> None:
    known = {*CHECKS, *REFUSED, *DEPRECATED, *STORAGE_OF_OTHERS}
    unknown = {name: owner for name, owner in members().items() if name not in known}
    assert not unknown, f"transformers offers {unknown}: exercise them in CHECKS or give a reason in REFUSED"


@pytest.mark.parametrize("name", CHECKS)
def test_exercised(name: str) -> None:
    CHECKS[name]()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_clear_error(name: str) -> None:
    call, error, reason = REFUSED[name]
    cache = make()
    with pytest.raises(error) as caught:
        call(cache)
    assert len(str(caught.value)) > 30
    assert reason
    assert cache.get_seq_length() == COUNT
    step(cache)  # still usable


def test_ours_adds_no_public_name_that_transformers_may_take() -> None:
    """A later member of the same name and another meaning would be called on us."""
    mine = PagedPQCache.__mro__[: PagedPQCache.__mro__.index(Cache)]
    ours = {name for cls in mine for name in vars(cls) if not name.startswith("_")} - set(dir(Cache))
    assert "stats" in ours
    assert not ours & set(members())
