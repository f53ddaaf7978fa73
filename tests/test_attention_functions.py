"""Whose attention function runs: transformers' own may be fused, everybody else's is called, in steps as in prompts."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attention_functions import cold, registrations
from tiny_models import SMALL, build, codebook_of, padded, tokens
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_pqcache import PagedKVCache, PagedPQCache
from hf_pqcache.attention.functions import known
from hf_pqcache.attention.interface import Dispatcher
from hf_pqcache.cache.reference import ReferenceCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
IN_WINDOW = SMALL.replace(extended_residual=128)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with registrations():
        yield


def model_with(name: str = "llama", implementation: str = "sdpa") -> Any:
    """A model of its own: its config may be changed."""
    return copy.deepcopy(build(name, implementation))


def run(model: Any, cache: Any, ids: Tensor | None = None, steps: int = 6, between: Callable[[], Any] | None = None) -> Tensor:
    """Logits of a prompt and of some steps, (B, n, V). `between` is called after the prompt."""
    ids = tokens(2, 60) if ids is None else ids
    first = ids.shape[1] - steps
    with torch.no_grad():
        logits = [model(ids[:, :first], **cache_kwargs(cache)).logits]
        if between is not None:
            between()
        logits += [model(ids[:, i : i + 1], **cache_kwargs(cache)).logits for i in range(first, ids.shape[1])]
    return torch.cat(logits, dim=1)


def same(model: Any, ours: Any = None, **options: Any) -> Any:
    """Assert that `run` gives DynamicCache's logits; returns the cache."""
    cache = ours or PagedPQCache(model.config, codebook_of("llama"), IN_WINDOW)
    expected = run(model, DynamicCache(config=model.config), **options)
    torch.testing.assert_close(run(model, cache, **options), expected, rtol=1e-4, atol=1e-4)
    return cache


def engines(cache: Any) -> set[str]:
    return {engine["name"] for engine in cache.stats()["engines"].values()}


def wrapped(inner: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """A wrapper as loggers write them: it looks like what it wraps, and notes the queries of each call."""

    @functools.wraps(inner)
    def wrapper(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert type(key) is type(value) is Tensor
        calls.append(query.shape[2])
        return inner(module, query, key, value / 2, *args, **kwargs)

    return wrapper


@pytest.mark.parametrize("kind", [PagedPQCache, PagedKVCache])
@pytest.mark.parametrize("is_generating", [False, True])
def test_a_registered_function_is_called_in_steps_too(kind: Any, is_generating: bool) -> None:
    AttentionInterface.register("cold", cold)
    AttentionMaskInterface.register("cold", sdpa_mask)
    model = model_with(implementation="cold")
    cache = PagedKVCache(model.config, page_size=16) if kind is PagedKVCache else None
    if is_generating:
        caches = [cache or PagedPQCache(model.config, codebook_of("llama"), IN_WINDOW), DynamicCache(config=model.config)]
        options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        got, want = (model.generate(**padded(2, 50)[0], **cache_kwargs(c), **options) for c in caches)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4)
        cache = caches[0]
    else:
        cache = same(model, cache)
    assert engines(cache) == {"decoded"}
    assert "cold" in cache.stats()["engines"][0]["reason"]


def test_a_registered_function_sees_what_the_cache_holds() -> None:
    """Beyond the window these are decoded codes."""
    AttentionInterface.register("cold", cold)
    AttentionMaskInterface.register("cold", sdpa_mask)
    model, book = model_with(implementation="cold"), codebook_of("llama")
    got = run(model, PagedPQCache(model.config, book, SMALL))
    torch.testing.assert_close(got, run(model, ReferenceCache(model.config, book, SMALL)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["register", "local"])
@pytest.mark.parametrize("when", ["before", "after", "between prompt and steps"])
def test_a_wrapper_around_sdpa_is_called_with_tensors(way: str, when: str) -> None:
    model, calls = model_with(), []

    def put(to: Any) -> None:
        if way == "register":
            AttentionInterface.register("sdpa", to)
        else:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = to

    def wrap() -> None:
        put(wrapped(ALL_ATTENTION_FUNCTIONS["sdpa"], calls))

    if when == "before":
        wrap()
    cache = PagedPQCache(model.config, codebook_of("llama"), IN_WINDOW)
    if when == "after":
        wrap()
    if when == "between prompt and steps":
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        got = run(model, cache, between=wrap)
        assert calls == [1] * 12
        put(plain)
        expected = run(model, DynamicCache(config=model.config), between=wrap)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    else:
        same(model, cache)
    assert engines(cache) == {"decoded"}


def test_a_later_registration_is_honoured_and_can_be_taken_back() -> None:
    model = model_with()
    assert engines(same(model)) == {"torch"}
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AttentionInterface.register("sdpa", cold)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is cold
    assert engines(same(model)) == {"decoded"}
    AttentionInterface.register("sdpa", original)
    assert engines(same(model)) == {"torch"}
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert engines(same(model)) == {"torch"}


def test_nothing_of_ours_hides_what_is_registered_for_all() -> None:
    same(model_with())
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
    assert not AttentionInterface()._local_mapping
    assert isinstance(AttentionInterface()["sdpa"], Dispatcher), "models with an interface of their own see it, too"


def test_a_function_that_looks_sdpa_up_itself() -> None:
    def asking(*args: Any, **kwargs: Any) -> Any:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

    AttentionInterface.register("asking", asking)
    AttentionMaskInterface.register("asking", sdpa_mask)
    same(model_with())
    assert engines(same(model_with(implementation="asking"))) == {"decoded"}


class Callable_:
    """An attention function that is an object, as frameworks write them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return cold(*args, **kwargs)

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "function",
    [Callable_(), functools.partial(cold), functools.partial(sdpa_attention_forward, is_causal=True), Callable_().__call__],
    ids=["object", "partial", "partial of sdpa", "method"],
)
def test_other_callables(function: Any) -> None:
    AttentionInterface.register("other", function)
    AttentionMaskInterface.register("other", sdpa_mask)
    assert engines(same(model_with(implementation="other"))) == {"decoded"}


def test_an_eager_function_that_the_user_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file of the model, or under its name in the interface; before our first cache or after."""
    model, calls = model_with(implementation="eager"), []
    assert engines(same(model)) == {"torch"}
    file = importlib.import_module(type(model).__module__)
    monkeypatch.setattr(file, "eager_attention_forward", wrapped(file.eager_attention_forward, calls))
    assert engines(same(model)) == {"decoded"}
    assert calls.count(1) == 2 * 2 * 6
    monkeypatch.undo()
    assert engines(same(model)) == {"torch"}
    AttentionInterface.register("eager", wrapped(file.eager_attention_forward, calls))
    assert engines(same(model)) == {"decoded"}


def test_another_function_in_place_of_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`F.scaled_dot_product_attention = mine`, a recipe for faster kernels."""
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: 0.5 * original(*args, **kwargs)
    )
    assert engines(same(model_with())) == {"decoded"}


def test_two_implementations_in_one_process() -> None:
    models = [model_with(implementation=i) for i in ("sdpa", "eager")]
    for model in models * 2:
        assert engines(same(model)) == {"torch"}


def test_another_cache_goes_through_untouched() -> None:
    """Whatever was wrapped: same logits to the last bit, also for a model whose eager function has another name."""
    for implementation in ("sdpa", "eager"):
        model = model_with(implementation=implementation)
        expected = run(model, DynamicCache(config=model.config))
        PagedPQCache(model.config, codebook_of("llama"), IN_WINDOW)
        assert torch.equal(run(model, DynamicCache(config=model.config)), expected)


def test_a_model_that_is_compiled_whole_without_a_cache() -> None:
    """No graph breaks at what was wrapped for another model."""
    same(model_with(implementation="eager"))
    torch._dynamo.reset()
    model, ids = build("olmo2", "eager"), tokens(1, 9)
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=0, atol=0)
    torch._dynamo.reset()


def my_default(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    return cold(module, query, key, value, None, scaling=kwargs["scaling"])


class MyAttention(nn.Module):
    """As in a model of the Hub: its own default, by its own name."""

    def forward(self, x: Tensor) -> Tensor:
        function = ALL_ATTENTION_FUNCTIONS.get_interface("eager", my_default)
        return function(self, x, x, x, None, scaling=0.5)[0]


def test_code_with_a_default_of_its_own() -> None:
    x = torch.randn(1, 2, 5, 8)
    expected = MyAttention()(x)
    same(model_with(implementation="eager"))
    assert isinstance(ALL_ATTENTION_FUNCTIONS["eager"], Dispatcher)
    assert torch.equal(MyAttention()(x), expected)


def test_set_attn_implementation_after_the_cache_was_made() -> None:
    model = model_with(implementation="sdpa")
    cache = PagedPQCache(model.config, codebook_of("llama"), IN_WINDOW)
    for implementation in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(implementation)
        cache.reset()
        same(model, cache)
        assert engines(cache) == {"torch"}
    AttentionInterface.register("cold", cold)
    AttentionMaskInterface.register("cold", sdpa_mask)
    model.set_attn_implementation("cold")
    cache.reset()
    same(model, cache)
    assert engines(cache) == {"decoded"}


# -- attention weights -----------------------------------------------------------------------------------------------------
def weights_of_steps(model: Any, cache: Any, look: Callable[[Any, Tensor, Any], Any]) -> list[Any]:
    ids, found = tokens(2, 54), []
    with torch.no_grad():
        model(ids[:, :50], **cache_kwargs(cache))
        for i in range(50, 54):
            found += look(model, ids[:, i : i + 1], cache)
    return found


def by_keyword(model: Any, ids: Tensor, cache: Any) -> Any:
    return model(ids, **cache_kwargs(cache), output_attentions=True).attentions


def by_config(model: Any, ids: Tensor, cache: Any) -> Any:
    model.config.output_attentions = True
    return model(ids, **cache_kwargs(cache)).attentions


def by_hook(model: Any, ids: Tensor, cache: Any) -> Any:
    found: list[Any] = []
    layers = [layer.self_attn for layer in model.model.layers]
    hooks = [layer.register_forward_hook(lambda m, a, out: found.append(out[1])) for layer in layers]
    model(ids, **cache_kwargs(cache))
    for hook in hooks:
        hook.remove()
    return found


def by_global_hook(model: Any, ids: Tensor, cache: Any) -> Any:
    found: list[Any] = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, a, out: found.append(out[1]) if type(m).__name__ == "LlamaAttention" else None
    )
    model(ids, **cache_kwargs(cache))
    hook.remove()
    return found


def by_replaced_forward(model: Any, ids: Tensor, cache: Any) -> Any:
    found: list[Any] = []

    def noting(forward: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            found.append(out[1])
            return out

        return wrapper

    for layer in model.model.layers:
        vars(layer.self_attn).pop("forward", None)
        layer.self_attn.forward = noting(layer.self_attn.forward)
    model(ids, **cache_kwargs(cache))
    return found


@pytest.mark.parametrize("look", [by_keyword, by_config, by_hook, by_global_hook, by_replaced_forward])
def test_attention_weights_of_steps(look: Any) -> None:
    model = model_with(implementation="eager")
    got = weights_of_steps(model, PagedPQCache(model.config, codebook_of("llama"), IN_WINDOW), look)
    model = model_with(implementation="eager")
    want = weights_of_steps(model, DynamicCache(config=model.config), look)
    assert len(got) == len(want) == 8
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_weights_through_generate() -> None:
    model = model_with(implementation="eager")
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    caches = PagedPQCache(model.config, codebook_of("llama"), IN_WINDOW), DynamicCache(config=model.config)
    got, want = (model.generate(**padded(2, 30)[0], **cache_kwargs(cache), **options).attentions for cache in caches)
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_who_once_asked_for_weights_does_not_pay_for_ever() -> None:
    """transformers leaves its hooks on the modules; a hook of the user's counts while it is there."""
    model = model_with(implementation="eager")
    weights_of_steps(model, DynamicCache(config=model.config), by_keyword)
    weights_of_steps(model, DynamicCache(config=model.config), by_hook)
    cache = same(model)
    assert engines(cache) == {"torch"}
    weights_of_steps(model, cache_of(model), by_keyword)
    assert engines(same(model)) == {"torch"}


def cache_of(model: Any) -> Any:
    return PagedPQCache(model.config, codebook_of("llama"), IN_WINDOW)


# -- keywords and masks that mean something to one function only ---------------------------------------------------------
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("extra", [{"s_aux": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {"anything": 1}, {"softcap": 0.5}])
def test_keywords_mean_what_the_function_makes_of_them(implementation: str, extra: dict[str, Any]) -> None:
    """Llama's functions ignore them all, but for what sdpa refuses."""
    model = model_with(implementation=implementation)
    results = []
    for cache in (cache_of(model), DynamicCache(config=model.config)):
        ids = tokens(2, 53)
        try:
            with torch.no_grad():
                parts = [model(ids[:, :50], **cache_kwargs(cache), **extra).logits]
                parts += [model(ids[:, i : i + 1], **cache_kwargs(cache), **extra).logits for i in range(50, 53)]
            results.append(torch.cat(parts, dim=1))
        except ValueError as error:
            results.append(str(error))
    if isinstance(results[1], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_means_what_the_function_makes_of_it(implementation: str, dtype: torch.dtype) -> None:
    """Eager attention adds a bool mask to the scores; that is no masking, and it is what DynamicCache gives."""
    model = model_with(implementation=implementation)
    results = []
    for cache in (cache_of(model), DynamicCache(config=model.config)):
        mask = torch.ones(1, 1, 1, 51, dtype=torch.bool)
        mask[..., 3:30] = False
        if dtype is not torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
        with torch.no_grad():
            model(tokens(2, 50), **cache_kwargs(cache))
            results.append(model(tokens(2, 1), attention_mask=mask, **cache_kwargs(cache)).logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_every_eager_function_of_transformers_is_known_or_new() -> None:
    """Those of the models that the other tests fuse; a new one that names something new is not."""
    for name in ("llama", "gemma3", "gpt2", "opt", "gpt_oss", "llama4", "phi3"):
        file = importlib.import_module(type(build(name)).__module__)
        facts = known(file.eager_attention_forward)
        assert facts is not None, name
        assert facts.caps == (name == "gemma3")
        assert facts.sinks == ("module" if name == "gpt_oss" else "")
    scope = {"__name__": "transformers.models.new.modeling_new"}
    exec("def eager_attention_forward(module, query, key, value): return module.temperature * query", scope)
    assert known(scope["eager_attention_forward"]) is None


# -- a broken pass -----------------------------------------------------------------------------------------------------------
class Stop(BaseException):
    """As Ctrl-C is: no Exception."""


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("is_fused", [True, False])
def test_a_failure_inside_attention_is_no_pass(
    count: int, failing: int, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_pqcache.cache.layer import PagedLayer

    model, ids = model_with(), tokens(2, 50)
    if not is_fused:
        AttentionInterface.register("sdpa", lambda *args, **kwargs: sdpa_attention_forward(*args, **kwargs))
    cache, untouched = cache_of(model), cache_of(model)
    with torch.no_grad():
        for each in (cache, untouched):
            model(ids, **cache_kwargs(each))
        attend, dense = PagedLayer.attend, PagedLayer.dense

        def broken(self: Any, *args: Any, inner: Any) -> Any:
            if self.index == failing and self.storage is cache.storage:
                raise Stop
            return inner(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(PagedLayer, "attend", functools.partialmethod(broken, inner=attend))
            patch.setattr(PagedLayer, "dense", functools.partialmethod(broken, inner=dense))
            with pytest.raises(Stop):
                model(tokens(2, count, seed=3), **cache_kwargs(cache))
        assert cache.get_seq_length() == 50
        assert [cache.get_seq_length(i) for i in range(2)] == [50, 50]
        for _ in range(2):
            more = tokens(2, count, seed=4)
            got, want = (model(more, **cache_kwargs(each)).logits for each in (cache, untouched))
            torch.testing.assert_close(got, want, rtol=0, atol=0)
