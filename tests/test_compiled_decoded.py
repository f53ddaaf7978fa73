"""Compiled decode steps that cannot read codes: of models that compute with keys, and of attention that is not fused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from attention_functions import cold, registrations
from graphs import Graphs, assert_same, generate
from tiny_models import COMMON, SMALL, build, codebook_of, padded, tokens
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig, DynamicCache, LogitsProcessorList
from transformers.masking_utils import sdpa_mask
from transformers.models.llama import modeling_llama

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.cache import base
from hf_pqcache.cache.reference import ReferenceCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with registrations():
        yield


@pytest.fixture(params=["whole", "broken"])
def config(request: pytest.FixtureRequest) -> Iterator[CompileConfig]:
    """One graph, run as it is; the same where graphs may break, as in generate's default; the compiler of that default."""
    torch._dynamo.reset()
    if request.param == "inductor":
        config = CompileConfig(fullgraph=True, mode=None)
        config._compile_all_devices = True
    else:
        config = Graphs().config
        config.fullgraph = request.param == "whole"
    yield config
    torch._dynamo.reset()


def compared(model: Any, cache: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return generate(model, cache, inputs, max_new_tokens=6, **options)


def cache_for(model: Any) -> Any:
    return PagedPQCache(model.config, codebook_of("llama"), SMALL, compile=True)


def model_with(implementation: str = "sdpa") -> Any:
    return copy.deepcopy(build("llama", implementation))


def diffllama() -> Any:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64}
    model = tf.DiffLlamaForCausalLM._from_config(tf.DiffLlamaConfig(**COMMON | sizes), attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() == 2):
            parameter.mul_(6.0)
    model.generation_config.eos_token_id = None
    return model


def test_models_that_compute_with_keys_are_known_before_they_run() -> None:
    """generate asks whether it may compile before anything has run."""
    doge = tf.DogeConfig(**COMMON | {"num_key_value_heads": 2})
    for config in (diffllama().config, doge, build("falcon").config, build("deepseek_v3").config, build("reader").config):
        cache = PagedKVCache(config, compile=True)
        assert not cache.is_compileable
        assert "reads keys and values itself" in cache.stats()["eager_because"]


@pytest.mark.parametrize(
    ("config", "kind"),
    [("whole", "codes"), ("broken", "pages"), pytest.param("inductor", "codes", marks=pytest.mark.slow)],
    indirect=["config"],
)
def test_a_model_that_computes_with_keys_unforeseen(kind: str, config: CompileConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time its steps are compiled all the same, and decode in the graph; from then on they run eagerly."""
    monkeypatch.setattr(base, "gives_attention_what_it_caches", lambda config: True)
    model, (inputs, _) = diffllama(), padded(2, 50)
    cache = PagedKVCache(model.config, page_size=16, compile=True)
    if kind == "codes":
        cache = PagedPQCache(model.config, None, SMALL.replace(extended_residual=128), compile=True)
    assert cache.is_compileable
    expected = compared(model, DynamicCache(config=model.config), inputs)
    for is_first in (True, False):
        assert_same(compared(model, cache, inputs, compile_config=config), expected)
        assert {engine["name"] for engine in cache.stats()["engines"].values()} == {"decoded"}
        assert cache.is_compileable == is_first
        cache.reset()


def test_a_keyword_that_is_not_known(config: CompileConfig) -> None:
    """The first generate decodes in its graph, the next with it runs eagerly, and after one without it all is as before."""
    model, (inputs, starts) = build("llama", "eager"), padded(2, 50)
    expected = compared(model, ReferenceCache(model.config, codebook_of("llama"), SMALL, starts), inputs)
    cache = cache_for(model)
    for options, is_compileable in (
        ({"output_attentions": True}, True),
        ({"output_attentions": True}, False),
        ({}, False),
        ({}, True),
    ):
        assert_same(compared(model, cache, inputs, compile_config=config, **options), expected)
        assert cache.is_compileable == is_compileable
        cache.reset()


def test_an_attention_function_of_the_user(config: CompileConfig) -> None:
    """Known for one before anything has run: its steps are not compiled."""
    AttentionInterface.register("cold", cold)
    AttentionMaskInterface.register("cold", sdpa_mask)
    model, (inputs, starts) = model_with("cold"), padded(2, 50)
    expected = compared(model, ReferenceCache(model.config, codebook_of("llama"), SMALL, starts), inputs)
    cache = cache_for(model)
    assert not cache.is_compileable
    assert_same(compared(model, cache, inputs, compile_config=config), expected)
    assert "cold" in cache.stats()["eager_because"]


def test_an_attention_function_that_is_replaced_between_compiled_steps(config: CompileConfig) -> None:
    def run(cache: Any, **options: Any) -> tuple[Tensor, Tensor]:
        AttentionInterface.register("sdpa", original)
        steps = iter(range(100))

        def replace(ids: Tensor, scores: Tensor) -> Tensor:
            if next(steps) == 9:
                AttentionInterface.register("sdpa", cold)
            return scores

        return compared(model, cache, inputs, logits_processor=LogitsProcessorList([replace]), **options)

    original, model = AttentionInterface._global_mapping["sdpa"], build("llama")
    inputs, starts = padded(2, 50)
    expected = run(ReferenceCache(model.config, codebook_of("llama"), SMALL, starts))
    assert_same(run(cache_for(model), compile_config=config), expected)


@pytest.mark.parametrize(
    ("config", "use"),
    [("whole", "method"), ("whole", "function"), ("broken", "operator"), ("whole", "slice")],
    indirect=["config"],
)
def test_a_model_that_computes_with_keys_in_steps_only(
    use: str, config: CompileConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface
    uses = {
        "method": lambda x: x.mul(1.5),
        "function": lambda x: torch.mul(x, 1.5),
        "operator": lambda x: x * 1.5,
        "slice": lambda x: x[..., :].mul(1.5),
    }

    def get_interface(name: str, default: Any) -> Any:
        function = inner(name, default)

        def attend(module: Any, query: Tensor, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            if query.shape[2] == 1:
                key = uses[use](key)
            return function(module, query, key, value, *args, **kwargs)

        return attend

    class Interface:
        def __init__(self) -> None:
            self.get_interface = get_interface

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Interface())
    model, (inputs, starts) = build("llama"), padded(2, 50)
    expected = compared(model, ReferenceCache(model.config, codebook_of("llama"), SMALL, starts), inputs)
    assert_same(compared(model, cache_for(model), inputs, compile_config=config), expected)


def test_attention_weights_of_compiled_steps() -> None:
    """As StaticCache gives them: as wide as the mask, zeros beyond the tokens."""
    torch._dynamo.reset()
    model, graphs = build("llama", "eager"), Graphs()
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    got, want = (
        model.generate(tokens(2, 20), **options, **more, **cache_kwargs(cache)).attentions
        for cache, more in ((cache_for(model), {"compile_config": graphs.config}), (DynamicCache(config=model.config), {}))
    )
    assert graphs.count == 1
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x[..., : y.shape[-1]], y, rtol=1e-4, atol=1e-5)
            assert not x[..., y.shape[-1] :].any()


def test_other_models_do_not_make_a_graph_again() -> None:
    """What is known of their attention functions is no part of it."""
    torch._dynamo.reset()
    model, graphs, (inputs, _) = build("llama", "eager"), Graphs(), padded(2, 20)
    others = [build(name, "eager") for name in ("qwen3", "gpt2")]
    for _ in range(2):
        compared(model, PagedKVCache(model.config, compile=True), inputs, compile_config=graphs.config)
        for other in others:
            compared(other, PagedKVCache(other.config), inputs)
    assert graphs.count == 1
