"""Tiny random models of many architectures, their codebooks and inputs; shared by the tests, knows no cache of ours."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as tf
from own_attention import ReaderConfig, ReaderForCausalLM
from torch import Tensor
from transformers import DynamicCache

from hf_pqcache.codebook import shipped
from hf_pqcache.codebook.codebook import Codebook
from hf_pqcache.config import PQConfig
from hf_pqcache.models.names import cache_kwargs
from hf_pqcache.models.support import KEEPING

#: A cache in which 50 tokens already fill a page of codes, and whose borders are passed every 16 tokens.
SMALL = PQConfig(num_bits=4, page_size=16, extended_residual=16, max_pages=64)
VOCABULARY = 128
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
#: The upper two layers attend to the keys and values of the lower two.
SHARED = {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "sliding_window": 8, "layer_types": 2 * MIXED["layer_types"]}


def _config(name: str) -> tuple[type, Any]:
    """(model class, config) of an architecture."""
    heads = {"head_dim": 16}
    match name:
        case "llama":
            groups = {"num_attention_heads": 4, "num_key_value_heads": 2}
            return tf.LlamaForCausalLM, tf.LlamaConfig(**{**COMMON, **heads, **groups})
        case "llama_deep":
            return tf.LlamaForCausalLM, tf.LlamaConfig(**{**COMMON, **heads, "num_hidden_layers": 5})
        case "qwen3":
            return tf.Qwen3ForCausalLM, tf.Qwen3Config(**COMMON, **heads)
        case "mistral":
            return tf.MistralForCausalLM, tf.MistralConfig(**COMMON, sliding_window=None)
        case "mistral_sliding":  # nothing to compress
            return tf.MistralForCausalLM, tf.MistralConfig(**COMMON, sliding_window=8)
        case "phi3":
            return tf.Phi3ForCausalLM, tf.Phi3Config(**COMMON)
        case "granite":
            scales = {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}
            return tf.GraniteForCausalLM, tf.GraniteConfig(**COMMON, **scales)
        case "olmo2":
            return tf.Olmo2ForCausalLM, tf.Olmo2Config(**COMMON)
        case "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
            ids = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
            return tf.GPT2LMHeadModel, tf.GPT2Config(**sizes, **ids)
        case "opt":
            shape = {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}
            return tf.OPTForCausalLM, tf.OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32)
        case "gemma2":
            window = {"sliding_window": 8, "attn_logit_softcapping": 5.0}
            return tf.Gemma2ForCausalLM, tf.Gemma2Config(**COMMON, **heads, **MIXED, **window)
        case "gemma3":
            return tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**COMMON, **heads, **MIXED, sliding_window=8)
        case "gpt_oss":
            experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
            return tf.GptOssForCausalLM, tf.GptOssConfig(**COMMON, **heads, **MIXED, **experts, sliding_window=8)
        case "llama4":
            experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
            chunks = {"attention_chunk_size": 16, "layer_types": ["chunked_attention", "full_attention"]}
            sizes = {"intermediate_size_mlp": 48, "no_rope_layers": [1, 0]}
            return tf.Llama4ForCausalLM, tf.Llama4TextConfig(**COMMON, **heads, **chunks, **experts, **sizes)
        case "qwen3_next":
            linear = {
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
            }
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            experts |= {"shared_expert_intermediate_size": 16}
            types = {"layer_types": ["linear_attention", "full_attention"]}
            return tf.Qwen3NextForCausalLM, tf.Qwen3NextConfig(**COMMON, **heads, **linear, **experts, **types)
        case "falcon_h1":  # each layer has both
            state = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
            return tf.FalconH1ForCausalLM, tf.FalconH1Config(**COMMON, **state)
        case "gptj":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "rotary_dim": 8}
            return tf.GPTJForCausalLM, tf.GPTJConfig(vocab_size=VOCABULARY, **sizes, eos_token_id=None, bos_token_id=1)
        case "reader":
            return ReaderForCausalLM, ReaderConfig(**COMMON, **heads)
        case "falcon":
            return tf.FalconForCausalLM, tf.FalconConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"})
        case "deepseek_v3":
            latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
            experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2}
            experts |= {"topk_group": 1, "first_k_dense_replace": 1}
            return tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config(**{**COMMON, "num_key_value_heads": 2}, **latent, **experts)
        case "gemma3n":
            extra = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 4}
            extra |= {"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": 48}
            return tf.Gemma3nForCausalLM, tf.Gemma3nTextConfig(**{**COMMON, **SHARED, **extra}, **heads)
        case "gemma4":
            extra = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 32}
            return tf.Gemma4ForCausalLM, tf.Gemma4TextConfig(**{**COMMON, **SHARED, **extra}, **heads)
    raise ValueError(f"unknown architecture {name!r}")


#: Decoder-only models whose full-attention layers are compressed and read by the fused path.
FUSED = ("llama", "qwen3", "mistral", "phi3", "opt", "gemma3", "gpt_oss", "llama4", "qwen3_next", "falcon_h1")
#: More of them, for the tests that need not see every mode.
MORE_FUSED = ("granite", "olmo2", "gpt2", "gemma2")
#: To a cache they are as Llama and Qwen 3 are: what those are tested for they are by hand.
ALIKE = ("mistral", "phi3")
#: Those that transformers' own mask code can compile: every layer is full attention.
COMPILED = ("llama", "qwen3", "mistral", "phi3", "granite", "olmo2", "gpt2", "opt")
#: Models that do not support torch's SDPA.
EAGER_ONLY = ("gpt_oss", "gemma2", "gptj", "reader")


@cache
def build(name: str, implementation: str = "sdpa") -> Any:
    """A model in float32 and eval mode whose greedy tokens depend on attention. Shared: do not change it."""
    torch.manual_seed(0)
    model_class, config = _config(name)
    implementation = "eager" if name in EAGER_ONLY else implementation
    model = model_class._from_config(config, attn_implementation=implementation).eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() == 2):
            parameter.mul_(6.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def asks_for_attention(model: Any) -> bool:
    """Whether the file that the model comes from looks an attention function up; more of them do with each transformers."""
    return "get_interface" in inspect.getsource(sys.modules[type(model).__module__])


@cache
def assistant_of(name: str, implementation: str = "sdpa") -> Any:
    """A model that agrees with `build(name)` now and then, so that assisted decoding accepts some and rejects some."""
    model = copy.deepcopy(build(name, implementation))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            parameter.add_(0.1 * noise * parameter.std() if parameter.numel() > 1 else 0)
    model.generation_config.num_assistant_tokens = 5
    model.generation_config.num_assistant_tokens_schedule = "constant"
    return model


@cache
def codebook_of(name: str, settings: PQConfig = SMALL) -> Codebook | None:
    """A codebook that is not the shipped one; None if the model has no full-attention layer."""
    model = build(name)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 256, seed=99), **cache_kwargs(past))
    for layer in past.layers:
        if type(layer) in KEEPING and layer.is_initialized:
            book = shipped.codebook(settings, layer.keys.shape[3], layer.values.shape[3])
            return Codebook(1.05 * book.keys, 0.95 * book.values)
    return None


def tokens(batch: int, count: int, seed: int = 1) -> Tensor:
    """Random token ids (batch, count) int64, none of them special."""
    return torch.randint(3, VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, count: int, step: int = 7) -> tuple[dict[str, Tensor], list[int]]:
    """({input_ids, attention_mask} (batch, count), left padding of each row): row r lacks r * step tokens."""
    ids = tokens(batch, count)
    mask = torch.ones_like(ids)
    starts = [row * step for row in range(batch)]
    for row, start in enumerate(starts):
        ids[row, :start], mask[row, :start] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}, starts


MakeCache = Callable[..., Any]
