"""Ours in DynamicCache's place: each name and call of it and of its layers is there, and answers are the same.

What each member of Cache means on ours is test_cache_interface.py's matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import build, tokens
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.cache.layer import PagedLayer
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
OURS: dict[str, Callable[[Any], Any]] = {
    "PagedKVCache": lambda config: PagedKVCache(config, page_size=16),
    "PagedPQCache": lambda config: PagedPQCache(config, page_size=16, extended_residual=64),
}
PAIRS = [(PagedKVCache, DynamicCache), (PagedPQCache, DynamicCache), (PagedLayer, DynamicLayer)]
#: What Python gives to every class, the last one to those that were copied, and what only a class body needs.
IGNORED = {*dir(type("Plain", (), {})), "__slotnames__", "__abstractmethods__", "_abc_impl", "__annotations__", "__init__"}


def interface(theirs: type) -> list[str]:
    """Names of a class and its bases that others may use: public ones, and operators like len."""
    return [name for name in dir(theirs) if name not in IGNORED and (not name.startswith("_") or name.endswith("__"))]


def takes_all(ours: Any, theirs: Any) -> bool:
    """Whether `ours` can be called in every way in which `theirs` can."""
    mine, yours = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    kinds = {p.kind for p in mine.values()}
    if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
        return True
    for name, parameter in yours.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if parameter.kind not in kinds:
                return False
        elif name not in mine or (parameter.default is not parameter.empty and mine[name].default is parameter.empty):
            return False
    return True


@pytest.mark.parametrize(
    ("ours", "theirs"), [(PagedKVCache, DynamicCache), (PagedPQCache, DynamicCache), (PagedLayer, DynamicLayer)]
)
def test_every_name_of_theirs_is_ours_too(ours: type, theirs: type) -> None:
    assert [name for name in interface(theirs) if not hasattr(ours, name)] == []


@pytest.mark.parametrize(
    ("ours", "theirs"), [(PagedKVCache, DynamicCache), (PagedPQCache, DynamicCache), (PagedLayer, DynamicLayer)]
)
def test_every_method_can_be_called_as_theirs(ours: type, theirs: type) -> None:
    methods = [name for name in interface(theirs) if inspect.isfunction(getattr(theirs, name))]
    assert [name for name in methods if hasattr(ours, name) and not takes_all(getattr(ours, name), getattr(theirs, name))] == []


#: Question -> how a cache answers it.
QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "length": lambda cache: cache.get_seq_length(),
    "length of the last layer": lambda cache: cache.get_seq_length(len(cache) - 1),
    "length of a layer that is not there": lambda cache: cache.get_seq_length(99),
    "query offset": lambda cache: cache.get_query_offset(),
    "mask of a step": lambda cache: [cache.get_mask_sizes(1, i) for i in attention_layers(cache)],
    "mask of several tokens": lambda cache: [cache.get_mask_sizes(7, i) for i in attention_layers(cache)],
    "room": lambda cache: [cache.get_max_length(), *(cache.get_max_length(i) for i in range(len(cache)))],
    "layers": lambda cache: len(cache),
    "kinds": lambda cache: (cache.is_sliding, cache.is_linear, getattr(cache, "is_dummy", None)),
    "is initialized": lambda cache: cache.is_initialized,
    "is croppable": lambda cache: cache.is_croppable,
    "records past": lambda cache: [cache.is_recording_past(i) for i in range(len(cache))],
    "is compileable": lambda cache: cache.is_compileable,
    "early initialization": lambda cache: [layer.supports_early_init for layer in cache.layers],
    "tensors": lambda cache: [part for layer in cache for part in layer],
}


def attention_layers(cache: Any) -> list[int]:
    return [i for i, layer in enumerate(cache.layers) if isinstance(layer, CacheLayerMixin)]


def answers(cache: Any) -> dict[str, Any]:
    """What a cache says to each question, errors by their class."""
    found = {}
    for question, ask in QUESTIONS.items():
        try:
            found[question] = ask(cache)
        except Exception as error:
            found[question] = type(error).__name__
    return found


def assert_same_answers(ours: Any, theirs: Any, but: tuple[str, ...] = ()) -> None:
    mine, yours = answers(ours), answers(theirs)
    for question in [q for q in QUESTIONS if q not in but]:
        if isinstance(yours[question], list) and any(isinstance(part, torch.Tensor) for part in yours[question]):
            torch.testing.assert_close(mine[question], yours[question], rtol=1e-4, atol=1e-5)
        else:
            assert mine[question] == yours[question], question


@torch.no_grad()
@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma3n", "qwen3_next", "falcon_h1", "deepseek_v3"])
def test_answers_are_those_of_dynamic_cache(name: str, make: Callable[[Any], Any]) -> None:
    model = build(name)
    caches = [make(model.config), DynamicCache(config=model.config)]
    assert_same_answers(*caches)
    for count in (20, 1, 5, 1):
        for cache in caches:
            model(tokens(2, count), **cache_kwargs(cache))
        assert_same_answers(*caches)
    caches[0].reset()  # and keeps its memory, as StaticCache does
    assert_same_answers(caches[0], DynamicCache(config=model.config), but=("is initialized", "tensors"))


@pytest.mark.parametrize("call", ["reset", "crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"])
def test_a_layer_does_not_change_alone(call: str) -> None:
    model = build("llama")
    cache = PagedKVCache(model.config, page_size=16)
    with torch.no_grad():
        model(tokens(2, 20), **cache_kwargs(cache))
    method = getattr(cache.layers[0], call)
    with pytest.raises(NotImplementedError, match="on the cache"):
        method() if call == "reset" else method(torch.tensor([1, 0]))
    assert cache.get_seq_length() == 20
