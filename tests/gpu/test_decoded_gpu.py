"""Models and attention that need tensors, on a GPU, where generate compiles what it may: DynamicCache's logits, no error."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers as tf
from gpu_models import first_difference, llama_config
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_pqcache import PagedKVCache
from hf_pqcache.models.names import cache_kwargs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

COMMON = {
    "vocab_size": 300, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip


def louder(*args: Any, **kwargs: Any) -> Any:
    """Not transformers' own: another scale."""
    return sdpa_attention_forward(*args, **{**kwargs, "scaling": 0.3})


def _llama(implementation: str, **more: Any) -> Any:
    config = llama_config(2)
    for name, value in more.items():
        setattr(config, name, value)
    return tf.LlamaForCausalLM._from_config(config, attn_implementation=implementation)


MODELS: dict[str, Any] = {
    "diffllama": lambda: tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**COMMON, head_dim=32)),
    "doge": lambda: tf.DogeForCausalLM(tf.DogeConfig(**COMMON)),
    "jetmoe": lambda: tf.JetMoeForCausalLM(
        tf.JetMoeConfig(**{**COMMON, "num_key_value_heads": 2}, kv_channels=32, num_local_experts=2, num_experts_per_tok=1)
    ),
    "softcap under sdpa": lambda: tf.Gemma2ForCausalLM._from_config(
        tf.Gemma2Config(**COMMON, head_dim=32, layer_types=["full_attention"] * 2, attn_logit_softcapping=5.0),
        attn_implementation="sdpa",
    ),
    "own function": lambda: _llama("louder"),
    "eager weights": lambda: _llama("eager", output_attentions=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_generate_by_default(name: str) -> None:
    torch.compiler.reset()
    AttentionInterface.register("louder", louder)
    torch.manual_seed(0)
    try:
        model = MODELS[name]().to("cuda", torch.float16).eval()
    except (TypeError, ValueError, AttributeError) as error:
        pytest.skip(f"this transformers builds no such model: {error}")
    ids = torch.randint(3, 300, (2, 70), generator=torch.Generator().manual_seed(1)).cuda()
    ids[1, :9] = 0
    run = functools.partial(
        model.generate, ids, attention_mask=(ids != 0).long(), max_new_tokens=40, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    cache = PagedKVCache(model.config, page_size=16)
    ours, exact = run(**cache_kwargs(cache)), run(**cache_kwargs(DynamicCache(config=model.config)))
    assert first_difference(ours, exact) < 0.03
    print(name, "compiled" if cache.is_compileable else cache.stats()["eager_because"], cache.stats()["engines"][0])
    assert cache.get_seq_length() == 109
