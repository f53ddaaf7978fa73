"""PagedPQCache under an unchanged generate, on tiny random models: exact while nothing is coded, right once it is."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_pqcache import PagedPQCache
from hf_pqcache.errors import PagesExhaustedError
from hf_pqcache.models.names import cache_kwargs

pytestmark = pytest.mark.cache
COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "llama": lambda: (LlamaForCausalLM, LlamaConfig(**COMMON)),
    "qwen3": lambda: (Qwen3ForCausalLM, Qwen3Config(**COMMON, head_dim=16)),
    "mistral": lambda: (MistralForCausalLM, MistralConfig(**COMMON, sliding_window=None)),
    "gemma3": lambda: (Gemma3ForCausalLM, Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=8, layer_types=GEMMA_LAYERS)),
}
SMALL = {"num_bits": 4, "page_size": 16, "extended_residual": 16, "max_pages": 64}


def build(name: str, implementation: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    model_class, config = MODELS[name]()
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():  # sharpen, so that greedy tokens depend on attention
        for parameter in (p for p in model.parameters() if p.dim() == 2):
            parameter.mul_(6.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompt(batch: int, tokens: int, padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, batch):
            ids[row, : 4 * row], mask[row, : 4 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, cache: object, inputs: dict[str, torch.Tensor], **kwargs: object) -> torch.Tensor:
    options = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, **kwargs}
    out = model.generate(**inputs, **cache_kwargs(cache), **options)
    return torch.stack(out.logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_equals_dynamic_cache_while_nothing_is_coded(name: str, padded: bool, implementation: str) -> None:
    model, inputs = build(name, implementation), prompt(3 if padded else 1, 13, padded)
    expected = generate(model, DynamicCache(config=model.config), inputs)
    cache = PagedPQCache(model.config, num_bits=8)
    torch.testing.assert_close(generate(model, cache, inputs), expected, rtol=1e-4, atol=1e-3)
    assert cache.stats()["pages_used"] == 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_fused_decode_equals_decoding_codes_and_calling_sdpa(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a function in place of torch's attention, the same cache decodes every key and value for whatever it computes."""
    model, inputs = build(name), prompt(3 if padded else 1, 90, padded)
    fused = PagedPQCache(model.config, **SMALL)
    got = generate(model, fused, inputs)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: sdpa(*args, **kwargs))
    plain = PagedPQCache(model.config, **SMALL)
    torch.testing.assert_close(got, generate(model, plain, inputs), rtol=1e-4, atol=2e-3)
    assert fused.stats()["calls"]["attend/torch"] > 0
    assert "attend/torch" not in plain.stats()["calls"]
    assert fused.stats()["pages_used"] > 0


def test_another_cache_on_the_same_model_is_untouched() -> None:
    model, inputs = build("llama"), prompt(2, 40, False)
    expected = generate(model, DynamicCache(config=model.config), inputs)
    generate(model, PagedPQCache(model.config, **SMALL), inputs)
    torch.testing.assert_close(generate(model, DynamicCache(config=model.config), inputs), expected, rtol=0, atol=0)


def test_reset_and_deepcopy_repeat_a_run() -> None:
    model, inputs = build("llama"), prompt(2, 60, True)
    cache = PagedPQCache(model.config, **SMALL)
    expected = generate(model, cache, inputs)
    cache.reset()
    assert cache.stats()["pages_used"] == 0
    torch.testing.assert_close(generate(model, cache, inputs), expected, rtol=0, atol=0)
    twin = copy.deepcopy(cache)
    for layer, other in zip(cache.layers, twin.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=0, atol=0)
    twin.reset()
    assert cache.stats()["pages_used"] > 0


def test_exhausted_pages_leave_the_cache_unchanged() -> None:
    model = build("llama")
    cache = PagedPQCache(model.config, **{**SMALL, "max_pages": 1})
    with torch.no_grad():
        model(**prompt(1, 50, False), **cache_kwargs(cache))
        before = cache.layers[0].keys.clone()
        with pytest.raises(PagesExhaustedError, match=r"PQC001.*max_pages"):
            model(torch.full((1, 40), 5), **cache_kwargs(cache))
    assert cache.get_seq_length() == 50
    torch.testing.assert_close(cache.layers[0].keys, before, rtol=0, atol=0)


def test_a_cache_born_in_inference_mode_is_usable_outside_of_it() -> None:
    model, inputs = build("llama"), prompt(1, 60, False)
    for _ in range(2):  # the second cache takes over the first one's state
        cache = PagedPQCache(model.config, **SMALL)
        with torch.inference_mode():
            model(**inputs, **cache_kwargs(cache))
        with torch.no_grad():
            model(torch.full((1, 1), 5), **cache_kwargs(cache))
        del cache
