"""Layers that no plan foresees: some hold an image rather than positions, some are made by the model on its way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache as memoize
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_models import COMMON, SMALL, VOCABULARY, build, padded, tokens
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_pqcache import PagedKVCache, PagedPQCache, calibrate
from hf_pqcache.cache.layer import PagedLayer
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
OURS: dict[str, Callable[[Any], Any]] = {
    "pages": lambda config: PagedKVCache(config, page_size=16),
    "codes": lambda config: PagedPQCache(config, None, SMALL.replace(extended_residual=128)),
}
needs_dory = pytest.mark.skipif(not hasattr(tf, "DoryConfig"), reason="this transformers has no looped model")


def wild(model: Any) -> Any:
    """Weights so large that tokens depend on all that attention sees."""
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() == 2):
            parameter.mul_(6.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


@memoize
def mllama(first_cross_layer: int = 1) -> Any:
    """Two layers in five attend to an image of 2 tiles with 5 tokens each."""
    torch.manual_seed(0)
    text = tf.models.mllama.MllamaTextConfig(
        **{**COMMON, "num_hidden_layers": 5}, cross_attention_layers=[first_cross_layer, 3], rope_theta=10000.0
    )
    sizes = {"hidden_size": 16, "attention_heads": 2, "num_hidden_layers": 2, "num_global_layers": 1, "image_size": 28}
    sizes |= {"intermediate_size": 24, "patch_size": 14, "max_num_tiles": 2, "vision_output_dim": 32}
    vision = tf.models.mllama.MllamaVisionConfig(
        **sizes, intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1], [1, 2]]
    )
    config = tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY + 7)
    model = wild(tf.MllamaForConditionalGeneration._from_config(config, attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
                parameter.fill_(1.0)  # closed at first: no image would reach the text
    return model


def image(rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 1, 2, 3, 28, 28, generator=generator),
        "aspect_ratio_ids": torch.full((rows, 1), 2),
        "aspect_ratio_mask": torch.ones(rows, 1, 2, dtype=torch.long),
    }


def cross_mask(rows: int, count: int) -> Tensor:
    return torch.ones(rows, count, 1, 2, dtype=torch.long)


def look(model: Any, cache: Any, ids: Tensor, with_image: int | None = None) -> Tensor:
    inputs = {} if with_image is None else image(len(ids), with_image)
    with torch.no_grad():
        mask = cross_mask(len(ids), cache.get_seq_length() + ids.shape[1]) if with_image is not None else None
        logits: Tensor = model(ids, **inputs, cross_attention_mask=mask, **cache_kwargs(cache, model)).logits
    return logits


def pair(model: Any, kind: str) -> tuple[Any, Any]:
    return OURS[kind](model.config), DynamicCache(config=model.config.get_text_config(decoder=True))


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", OURS)
def test_a_model_that_looks_at_images(kind: str) -> None:
    model, ids = mllama(), tokens(2, 30)
    caches = pair(model, kind)
    for part, seed in ((ids, 0), (ids[:, :1], None), (ids[:, :5], None), (ids[:, 1:2], None)):
        assert_close(*(look(model, cache, part, seed) for cache in caches))
    stats = caches[0].stats()
    assert stats["compressed_layers"] == [0, 2, 4]
    assert "image" in stats["engines"][1]["reason"]
    assert stats["tokens"] == caches[0].get_seq_length() == 37
    assert type(caches[0].layers[1]) is DynamicLayer


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_about_an_image(kind: str, options: dict[str, Any]) -> None:
    model, (inputs, _) = mllama(), padded(2, 30)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    results = []
    for cache in pair(model, kind):
        more = {"cross_attention_mask": cross_mask(2, 30)}
        results.append(model.generate(**inputs, **image(), **more, **cache_kwargs(cache), **settings))
    assert torch.equal(*(out.sequences for out in results))
    assert_close(*(torch.stack(out.logits) for out in results))


@pytest.mark.parametrize("kind", OURS)
def test_an_image_in_a_later_turn(kind: str) -> None:
    """The first has text only, which leaves out the layers that look at images; then a copy, other rows, a crop, a reset."""
    model, caches = mllama(), pair(mllama(), kind)
    for part, seed in ((tokens(2, 20), None), (tokens(2, 1), None), (tokens(2, 6), 0), (tokens(2, 1), None)):
        assert_close(*(look(model, cache, part, seed) for cache in caches))
    caches = copy.deepcopy(caches)
    for cache in caches:
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 1]))
    assert_close(*(look(model, cache, tokens(4, 2)) for cache in caches))
    for cache in caches:
        cache.crop(-3)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    assert_close(*(look(model, cache, tokens(4, 1)) for cache in caches))
    caches[0].reset()
    assert_close(look(model, caches[0], tokens(3, 20), 1), look(model, pair(model, kind)[1], tokens(3, 20), 1))


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("first_cross_layer", [1, 2])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_pass_with_an_image_that_was_broken_off(
    kind: str, first_cross_layer: int, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retry brings the image again; it must not be there twice. Text came before, and layers without an image then."""
    model = mllama(first_cross_layer)
    cache, untouched = pair(model, kind)
    for each in (cache, untouched):
        look(model, each, tokens(2, 20))
    layers = model.model.language_model.layers

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layers[at].mlp, "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            look(model, cache, tokens(2, 5), 1)
    for part, seed in ((tokens(2, 5), 1), (tokens(2, 1), None)):
        assert_close(*(look(model, each, part, seed) for each in (cache, untouched)))


def test_a_layer_that_turns_out_to_hold_no_positions() -> None:
    """Of a model whose config does not say so: its first tokens are not as many as the others'."""
    config, keys = build("llama_deep").config, torch.randn(2, 1, 12, 16)
    cache = PagedKVCache(config, page_size=16)
    for layer in range(5):
        part = keys if layer == 3 else keys[:, :, :7]
        got, _ = cache.update(part, part, layer)
        torch.testing.assert_close(got + 0, part)
    for _ in range(2):
        for layer in (0, 1, 2, 4):
            cache.update(keys[:, :, :1], keys[:, :, :1], layer)
    assert cache.get_seq_length() == 9
    assert cache.layers[3].keys.shape[2] == 12
    assert cache.stats()["compressed_layers"] == [0, 1, 2, 4]
    assert "image" in cache.stats()["engines"][3]["reason"]
    assert not cache.is_compileable
    cache.crop(0)
    assert copy.deepcopy(cache).layers[3].keys.shape[2] == 12


def test_a_codebook_for_a_model_that_looks_at_images_leaves_those_layers_out() -> None:
    model = mllama().model.language_model
    book = calibrate(model, None, tokens(1, 300)[0], SMALL, num_tokens=300)
    assert book.is_normalised
    cache = PagedPQCache(mllama().config, book, SMALL)
    look(mllama(), cache, tokens(2, 60), 0)
    assert cache.stats()["pages_used"] > 0


# -- layers that a model makes for itself ------------------------------------------------------------------------------------
@memoize
def dory(mode: str = "per_loop", is_sliding: bool = False) -> Any:
    """A model that runs two of its four attention layers three times."""
    torch.manual_seed(0)
    kinds = ["sliding_attention" if is_sliding else "full_attention", "mlp", "full_attention", "mlp"] * 2
    shape = {"layer_types": kinds, "num_hidden_layers": 8, "n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2}
    config = tf.DoryConfig(
        **{**COMMON, **shape}, head_dim=16, sliding_window=8, n_recurrent_loops=3, recurrent_kv_cache_mode=mode
    )
    return wild(tf.DoryForCausalLM._from_config(config, attn_implementation="sdpa"))


def steps(model: Any, cache: Any, parts: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part, **cache_kwargs(cache, model)).logits for part in parts], dim=1)


@needs_dory
@pytest.mark.parametrize("mode", ["per_loop", "last_loop"])
@pytest.mark.parametrize("is_sliding", [False, True])
@pytest.mark.parametrize("kind", OURS)
def test_a_model_that_runs_layers_several_times(kind: str, is_sliding: bool, mode: str) -> None:
    model = dory(mode, is_sliding)
    caches = pair(model, kind)
    assert_close(*(steps(model, cache, [tokens(2, 20), tokens(2, 1), tokens(2, 3), tokens(2, 1)]) for cache in caches))
    assert len(caches[0].layers) == len(caches[1].layers)
    made = range(model.config.num_hidden_layers, len(caches[0].layers))
    engines = caches[0].stats()["engines"]
    assert all("copy" in engines[i]["reason"] for i in made)
    assert set(made) <= set(caches[0].stats()["exact_layers"])
    caches = copy.deepcopy(caches)
    for cache in caches:
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 1, 1]))
        cache.batch_select_indices(torch.tensor([0, 1, 3]))
    assert_close(*(steps(model, cache, [tokens(3, 1), tokens(3, 4)]) for cache in caches))
    if not is_sliding:
        for cache in caches:
            cache.crop(-5)
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == 25
        assert_close(*(steps(model, cache, [tokens(3, 2), tokens(3, 1)]) for cache in caches))
    caches[0].reset()
    assert_close(*(steps(model, c, [tokens(1, 9), tokens(1, 1)]) for c in (caches[0], pair(model, kind)[1])))


@needs_dory
@pytest.mark.parametrize("kind", OURS)
def test_beams_and_turns_of_a_looped_model(kind: str) -> None:
    model = dory()
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    results = []
    for cache in pair(model, kind):
        first = model.generate(**padded(2, 20)[0], num_beams=3, **cache_kwargs(cache), **settings)
        ids = torch.cat([tokens(1, 20), tokens(1, 5, seed=2)], dim=1)
        again = pair(model, kind)[0] if isinstance(cache, PagedKVCache | PagedPQCache) else pair(model, kind)[1]
        with torch.no_grad():
            model(ids[:, :20], **cache_kwargs(again, model))
        second = model.generate(ids, **cache_kwargs(copy.deepcopy(again)), **settings)
        results.append((first.sequences, torch.stack(second.logits)))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])


@needs_dory
@pytest.mark.parametrize("kind", OURS)
def test_a_broken_pass_of_a_looped_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dory()
    cache, untouched = pair(model, kind)
    for each in (cache, untouched):
        steps(model, each, [tokens(2, 20), tokens(2, 1)])
    with monkeypatch.context() as patch:
        calls: list[int] = []
        forward = model.model.layers[2].mlp.forward if hasattr(model.model.layers[2], "mlp") else model.model.layers[3].forward

        def broken(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return forward(*args, **kwargs)

        owner = model.model.layers[2].mlp if hasattr(model.model.layers[2], "mlp") else model.model.layers[3]
        patch.setattr(owner, "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            steps(model, cache, [tokens(2, 5, seed=8)])
    assert cache.get_seq_length() == 21
    assert_close(*(steps(model, each, [tokens(2, 5), tokens(2, 1)]) for each in (cache, untouched)))


@pytest.mark.parametrize("kind", OURS)
def test_a_copy_of_a_layer_is_transformers_own(kind: str) -> None:
    """Exact as far as the layer is; empty of an empty one; and its cache goes on."""
    model = build("llama")
    cache, exact = pair(model, kind)
    assert not copy.deepcopy(cache.layers[0]).is_initialized
    for each in (cache, exact):
        steps(model, each, [tokens(2, 40), tokens(2, 1)])
    for layer, want in zip(copy.deepcopy(cache.layers), exact.layers, strict=True):
        assert type(layer) is DynamicLayer
        assert_close(layer.keys, want.keys)
        assert_close(layer.values, want.values)
    assert_close(*(steps(model, each, [tokens(2, 3), tokens(2, 1)]) for each in (cache, exact)))
    assert isinstance(copy.deepcopy({"holds": cache})["holds"].layers[0], PagedLayer), "a copy of the cache is one"
    cache.reset()
    assert not copy.deepcopy(cache.layers[0]).is_initialized
