"""A forward pass that stops half-way, wherever it does: the cache is as before it, and the same pass again gives the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import SMALL, build, codebook_of, tokens

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
NAME, LAYERS = "llama_deep", 5


def make(kind: str) -> Any:
    config = build(NAME).config
    if kind == "exact":
        return PagedKVCache(config, page_size=16)
    return PagedPQCache(config, codebook_of(NAME), SMALL)


def forward(cache: Any, count: int, seed: int, batch: int = 1) -> torch.Tensor:
    with torch.no_grad():
        return build(NAME)(tokens(batch, count, seed), **cache_kwargs(cache)).logits


def before_layer(layer: int) -> Callable[[], Callable[[], None]]:
    """Stops before attention of a layer."""

    def plant() -> Callable[[], None]:
        def stop(*args: Any) -> None:
            raise KeyboardInterrupt

        return build(NAME).model.layers[layer].register_forward_pre_hook(stop).remove

    return plant


def within_update(layer: int) -> Callable[[], Callable[[], None]]:
    """Stops between a layer's projections and its attention, as Ctrl-C may: when the cache has had the tokens."""

    def plant() -> Callable[[], None]:
        attention = build(NAME).model.layers[layer].self_attn
        original = PagedPQCache.update

        def update(self: Any, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            out = super(PagedPQCache, self).update(keys, values, layer_idx, *args, **kwargs)
            if layer_idx == layer:
                raise KeyboardInterrupt
            return out

        def update_exact(self: Any, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            out = super(PagedKVCache, self).update(keys, values, layer_idx, *args, **kwargs)
            if layer_idx == layer:
                raise KeyboardInterrupt
            return out

        assert attention is not None
        assert original is PagedKVCache.update
        PagedPQCache.update, PagedKVCache.update = update, update_exact  # type: ignore[method-assign]

        def remove() -> None:
            del PagedPQCache.update, PagedKVCache.update

        return remove

    return plant


STOPS = {f"before layer {i}": before_layer(i) for i in (1, 2, LAYERS - 1)}
STOPS |= {f"within layer {i}": within_update(i) for i in (0, 2, LAYERS - 1)}


@pytest.mark.parametrize("kind", ["codes", "exact"])
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("held", [0, 60], ids=["first pass", "later pass"])
@pytest.mark.parametrize("count", [1, 50])
def test_a_pass_that_stops_is_taken_back(kind: str, stop: str, held: int, count: int) -> None:
    cache, twin = make(kind), make(kind)
    for one in (cache, twin):
        if held:
            forward(one, held, 1)
    expected = forward(twin, count, 2)
    remove = STOPS[stop]()
    try:
        with pytest.raises(KeyboardInterrupt):
            forward(cache, count, 2)
    finally:
        remove()
    if "within" not in stop or int(stop[-1]) != LAYERS - 1:
        assert cache.get_seq_length() == held
    else:  # all layers have the tokens; what is left of the pass does not touch the cache
        cache.crop(held - cache.get_seq_length())
    is_close = kind == "exact" or held == 0 or count == 1
    got = forward(cache, count, 2)
    if is_close:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    else:  # exact tokens of the first layers may have been crowded out of their windows
        assert (got - expected).norm() < 0.2 * expected.norm()
    assert cache.get_seq_length() == held + count
    assert cache.stats()["pages_used"] == twin.stats()["pages_used"]


@pytest.mark.parametrize("kind", ["codes", "exact"])
def test_generate_after_an_interrupted_prompt(kind: str) -> None:
    cache, ids = make(kind), tokens(2, 50)
    remove = before_layer(1)()
    try:
        with pytest.raises(KeyboardInterrupt):
            forward(cache, 50, 1, batch=2)
    finally:
        remove()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    got = build(NAME).generate(ids, **cache_kwargs(cache), **options)
    assert torch.equal(got, build(NAME).generate(ids, **cache_kwargs(make(kind)), **options))


def test_a_model_with_fewer_layers_than_its_config_says_is_told() -> None:
    """Its cache cannot tell a finished pass from an interrupted one, and must not answer for both."""
    model = copy.deepcopy(build(NAME))
    model.model.layers = model.model.layers[:3]
    cache = make("exact")
    with torch.no_grad():
        model(tokens(1, 50), **cache_kwargs(cache))
        with pytest.raises(RuntimeError, match=r"layers \[3, 4\] have never had a token.*reset\(\).*num_hidden_layers"):
            model(tokens(1, 1), **cache_kwargs(cache))
    model.config = copy.deepcopy(model.config)
    model.config.num_hidden_layers = 3
    cache = PagedKVCache(model.config, page_size=16)
    with torch.no_grad():
        model(tokens(1, 50), **cache_kwargs(cache))
        model(tokens(1, 1), **cache_kwargs(cache))
    assert cache.get_seq_length() == 51
